"""Follows a pipeline for its UNet's runtime: its scheduler, which marks the steps, and its ControlNet."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from deepcache_fx.controlnet.controlnet_runtime import ControlNetRuntime, ControlNetRuntimes, why_controlnet_runs_alone
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.attach import attach, attached_to, check_attachable, detach, original_class
from deepcache_fx.runtime.follow import SchedulerFollower
from deepcache_fx.runtime.report import ControlNetReport
from deepcache_fx.runtime.runtime import Runtime


class PipelineFollower:
    """Keeps to a pipeline's scheduler and ControlNet, also after the user has replaced them by others.

    Args:
        pipeline: Held weakly.
        runtime: Of the pipeline's UNet; held weakly.
        before: The follower that this one takes over from: the runtime of the same ControlNet keeps its programs.
    """

    def __init__(self, pipeline: Any, runtime: Runtime, before: PipelineFollower | None = None) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._runtime = weakref.ref(runtime)
        self._scheduler = SchedulerFollower(pipeline, runtime)
        self._controlnet: weakref.ref[torch.nn.Module] | None = None
        self._controlnet_runtime: weakref.ref[ControlNetRuntime] | None = None
        self._stopped: ControlNetRuntime | None = None
        """Kept while no ControlNet holds it, in case it is to go on."""
        self._refused: ControlNetReport | None = None
        self._before = before

    def pipeline(self) -> Any:
        """The pipeline, or None where it is gone."""
        return self._pipeline()

    def report(self) -> ControlNetReport | None:
        """Of the ControlNet; None where there is none."""
        controlnet_runtime = self.controlnet_runtime()
        return self._refused if controlnet_runtime is None else controlnet_runtime.report()

    def controlnet_runtime(self) -> ControlNetRuntime | None:
        return self._stopped or (self._controlnet_runtime() if self._controlnet_runtime is not None else None)

    def known(self) -> Any:
        """The ControlNet that was there at the last call."""
        return self._controlnet() if self._controlnet is not None else None

    def __call__(self) -> None:
        """Called before every call of the UNet and of the ControlNet: cheap where nothing has changed."""
        self._scheduler()
        pipeline, runtime = self._pipeline(), self._runtime()
        network = getattr(pipeline, "controlnet", None)
        is_known = network is self.known()
        if runtime is None or (is_known and (network is None or self._refused or self._answers(network))):
            return
        if not is_known:
            self._let_go()
            self.release()
            self._stopped = self._refused = None
            self._controlnet = None
        if isinstance(network, torch.nn.Module):
            self._take(network, runtime)
        self._before = None

    def stop(self) -> None:
        """Until the next call."""
        self._scheduler.stop()
        self._stopped = self.controlnet_runtime()
        self._let_go()

    def undo_layout(self) -> None:
        """Give the ControlNet's weights the strides that it had them in."""
        controlnet_runtime = self.controlnet_runtime()
        if controlnet_runtime is not None:
            controlnet_runtime.model_state.restore()

    def release(self) -> None:
        """Give back what the ControlNet's programs hold."""
        controlnet_runtime = self.controlnet_runtime()
        if controlnet_runtime is not None:
            controlnet_runtime.release()

    def _answers(self, network: torch.nn.Module) -> bool:
        found = attached_to(network)
        return isinstance(found, ControlNetRuntimes) and self.controlnet_runtime() in found

    def _take(self, network: torch.nn.Module, runtime: Runtime) -> None:
        self._controlnet = weakref.ref(network)
        model_class = original_class(network)
        reason = why_controlnet_runs_alone(model_class)
        if reason is None and isinstance(attached_to(network), Runtime):
            reason = "optimize was called on it"
        try:
            check_attachable(network)
        except DeepCacheError as error:
            reason = reason or str(error)
        if reason is not None:
            self._refused = ControlNetReport(model=model_class.__name__, refused=reason)
            return
        controlnet_runtime = self._stopped or ControlNetRuntime(model_class, runtime)
        if self._before is not None and self._before.known() is network:
            former = self._before.controlnet_runtime()
            if former is not None:
                controlnet_runtime.adopt(former)
        runtimes = attached_to(network)
        if not isinstance(runtimes, ControlNetRuntimes):
            runtimes = ControlNetRuntimes(model_class)
            attach(network, runtimes)
        runtimes.add(controlnet_runtime)
        self._controlnet_runtime, self._stopped = weakref.ref(controlnet_runtime), None

    def _let_go(self) -> None:
        """Give the ControlNet its forward back, unless it answers another UNet too."""
        network, controlnet_runtime = self.known(), self.controlnet_runtime()
        runtimes = attached_to(network) if network is not None else None
        if controlnet_runtime is None or not isinstance(runtimes, ControlNetRuntimes):
            return
        runtimes.remove(controlnet_runtime)
        if not runtimes:
            detach(network)
