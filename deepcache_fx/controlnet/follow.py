"""Follows a pipeline for its UNet's runtime: its scheduler, which marks the steps, and its ControlNet."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from deepcache_fx.controlnet.companion import Companion, Companions, why_not_accompanied
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.attach import attach, attached_to, check_attachable, detach, original_class
from deepcache_fx.runtime.follow import SchedulerWatch
from deepcache_fx.runtime.report import CompanionReport
from deepcache_fx.runtime.runtime import Runtime


class PipelineWatch:
    """Keeps to a pipeline's scheduler and ControlNet, also after the user has replaced them by others.

    Args:
        pipeline: Held weakly.
        runtime: Of the pipeline's UNet; held weakly.
        before: The watch that this one takes over from: a companion of the same ControlNet keeps its programs.
    """

    def __init__(self, pipeline: Any, runtime: Runtime, before: PipelineWatch | None = None) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._runtime = weakref.ref(runtime)
        self._scheduler = SchedulerWatch(pipeline, runtime)
        self._controlnet: weakref.ref[torch.nn.Module] | None = None
        self._companion: weakref.ref[Companion] | None = None
        self._stopped: Companion | None = None
        """Kept while no ControlNet holds it, in case it is to go on."""
        self._refused: CompanionReport | None = None
        self._before = before

    def pipeline(self) -> Any:
        """The pipeline, or None where it is gone."""
        return self._pipeline()

    def report(self) -> CompanionReport | None:
        """Of the ControlNet; None where there is none."""
        companion = self.companion()
        return self._refused if companion is None else companion.report()

    def companion(self) -> Companion | None:
        return self._stopped or (self._companion() if self._companion is not None else None)

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
            self._stopped = self._refused = None
            self._controlnet = None
        if isinstance(network, torch.nn.Module):
            self._take(network, runtime)
        self._before = None

    def stop(self) -> None:
        """Until the next call."""
        self._scheduler.stop()
        self._stopped = self.companion()
        self._let_go()

    def _answers(self, network: torch.nn.Module) -> bool:
        found = attached_to(network)
        return isinstance(found, Companions) and self.companion() in found

    def _take(self, network: torch.nn.Module, runtime: Runtime) -> None:
        self._controlnet = weakref.ref(network)
        model_class = original_class(network)
        reason = why_not_accompanied(model_class)
        if reason is None and isinstance(attached_to(network), Runtime):
            reason = "optimize was called on it"
        try:
            check_attachable(network)
        except DeepCacheError as error:
            reason = reason or str(error)
        if reason is not None:
            self._refused = CompanionReport(model=model_class.__name__, refused=reason)
            return
        companion = self._stopped or Companion(model_class, runtime)
        if self._before is not None and self._before.known() is network:
            former = self._before.companion()
            if former is not None:
                companion.adopt(former)
        companions = attached_to(network)
        if not isinstance(companions, Companions):
            companions = Companions(model_class)
            attach(network, companions)
        companions.add(companion)
        self._companion, self._stopped = weakref.ref(companion), None

    def _let_go(self) -> None:
        """Give the ControlNet its forward back, unless it answers another UNet too."""
        network, companion = self.known(), self.companion()
        companions = attached_to(network) if network is not None else None
        if companion is None or not isinstance(companions, Companions):
            return
        companions.remove(companion)
        if not companions:
            detach(network)
        companion.model_state.restore()
