"""The caching of one MODEL: three wrappers of ComfyUI that announce runs and steps, and call the captured UNet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch

import deepcache_fx
from deepcache_fx import DeepCacheError, Schedule

from .run import FEW_STEPS, Run, are_uneven, draws_noise
from .summary import summary
from .unet import UNetOfTensors, capturable, running

KEY = "deepcache_fx"
"""Of the wrappers, and of the attachment of a model."""

FORECASTS: dict[str, int | Literal["auto"]] = {"auto": "auto", "repeat": 0, "linear": 1, "quadratic": 2}


@dataclass(frozen=True)
class Settings:
    """What the node was asked for."""

    interval: int = 3
    branch: int | tuple[int, int] = 0
    schedule: Schedule | None = None
    """None: every `interval`-th evaluation is full."""
    forecast: int | Literal["auto"] = "auto"
    backend: str = "auto"
    precision: Literal["fp32", "bf16"] | None = None
    start: float = 0.0
    end: float = 1.0
    """From where to where in the run features are reused, as shares of it."""


@dataclass(eq=False)
class _Captured:
    """The adapter of one UNet, shared by all cached models that are clones of each other."""

    adapter: UNetOfTensors
    run: Run | None = None
    """Whose announcements it follows."""
    users: WeakSet[Caching] = field(default_factory=WeakSet)


_captured: WeakKeyDictionary[torch.nn.Module, _Captured] = WeakKeyDictionary()
"""By ComfyUI's model, which a UNet knows nothing of: what was captured lives as long as that."""


def _let_go(captured: _Captured) -> None:
    """The last cached model is gone. On a device weights were given another layout: give it back."""
    if not list(captured.users) and any(weight.device.type != "cpu" for weight in captured.adapter.parameters()):
        deepcache_fx.restore(captured.adapter)


@dataclass(eq=False)
class Caching:
    """The caching of one MODEL, and of those that are cloned from it. It holds no model, and none holds it for long.

    A run of a sampler is announced by OUTER_SAMPLE, a step by PREDICT_NOISE; a call of the UNet goes through
    DIFFUSION_MODEL. Whatever the library cannot capture, and whatever is not known to be right, runs as it is.
    """

    settings: Settings
    text: str = "no run yet"
    """About the last run."""
    _run: Run | None = None
    _model: Any = None

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """By ComfyUI's names of their kinds."""
        return {
            "outer_sample": self.outer_sample,
            "predict_noise": self.predict_noise,
            "diffusion_model": self.diffusion_model,
        }

    def attach(self, model: Any) -> Any:
        """A clone of a MODEL (ComfyUI's ModelPatcher) that is cached. What cached it before does so no more."""
        cached = model.clone()
        for kind, wrapper in self.wrappers().items():
            cached.remove_wrappers_with_key(kind, KEY)
            cached.add_wrapper_with_key(kind, KEY, wrapper)
        cached.set_attachments(KEY, self)
        return cached

    def outer_sample(
        self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *rest: Any, **named: Any
    ) -> Any:
        """A run, from its first evaluation to the last."""
        outer, outer_model = self._run, self._model
        guider = executor.class_obj
        self._model = guider.model_patcher.model
        self._run = self._new_run(guider, sampler, sigmas)
        try:
            return executor(noise, latent, sampler, sigmas, *rest, **named)
        finally:
            run, captured = self._run, _captured.get(self._model)
            followed = captured if captured is not None and captured.run is run else None
            self.text = summary(run, deepcache_fx.report(followed.adapter) if followed is not None else None)
            logging.info("DeepCache FX: %s", self.text.splitlines()[0])
            if followed is not None:
                followed.run = None
                deepcache_fx.reset(followed.adapter)  # frees the features; what was captured stays
            self._run, self._model = outer, outer_model

    def _new_run(self, guider: Any, sampler: Any, sigmas: Any) -> Run:
        sampling = guider.model_patcher.get_model_object("model_sampling")
        start, end = self.settings.start, self.settings.end
        timesteps = [float(sampling.timestep(sigma)) for sigma in sigmas.cpu() if sigma > 0]
        run = Run(
            self.settings.interval,
            tuple(sigmas.tolist()),
            schedule=self.settings.schedule,
            may_forecast=not draws_noise(sampler)
            and not (len(timesteps) <= FEW_STEPS and are_uneven([*timesteps, 0.0])),
            high=math.inf if start == 0 else float(sampling.percent_to_sigma(start)),
            low=0.0 if end == 1 else float(sampling.percent_to_sigma(end)),
        )
        wrapped = guider.model_options.get("transformer_options", {}).get("wrappers", {}).get("apply_model", {})
        if "torch.compile" in wrapped:
            run.refusal = "TorchCompileModel compiles this model already: take one of the two nodes"
        if getattr(guider.model_patcher, "hook_patches", None):
            run.refusal = "a conditioning has weights of its own (a LoRA by hooks), which change from call to call"
        return run

    def predict_noise(self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """An evaluation of the model: of all conditions, in one call of the UNet or in several."""
        run = self._run
        if run is None:
            return executor(x, timestep, *rest, **named)
        try:
            run.evaluation_begins(float(timestep.flatten()[0]) if run.needs_sigma else None)
        except DeepCacheError as error:
            run.refusal = str(error)
        try:
            return executor(x, timestep, *rest, **named)
        finally:
            captured = _captured.get(self._model)
            if captured is not None and captured.run is run:
                deepcache_fx.step(captured.adapter)

    def diffusion_model(
        self,
        executor: Any,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        """A call of the UNet."""
        options = {} if transformer_options is None else transformer_options

        def plain() -> torch.Tensor:
            result: torch.Tensor = executor(x, timesteps, context, y, control, options, **extra)
            return result

        run = self._run
        if run is None:
            return plain()
        reason = run.refusal or self._why_uncached(executor)
        if reason is not None:
            run.bypassed[reason] += 1
            return plain()
        try:
            adapter = self._follow(run, executor.class_obj)
            if options.get("uuids"):
                deepcache_fx.condition(adapter, _condition(options))
            with running(plain):
                result: torch.Tensor = adapter(x, timesteps, context, y, control, capturable(options), **extra)
        except DeepCacheError as error:
            run.refusal = str(error)
            run.bypassed[run.refusal] += 1
            return plain()
        return result

    def _why_uncached(self, executor: Any) -> str | None:
        if len(executor.wrappers) > executor.idx + 1:
            return "another node wraps the UNet inside this one, and a graph would not call it: put it before this node"
        if executor.class_obj is not self._model.diffusion_model:
            return "another node runs a UNet of its own in the place of the model's"
        return None

    def _follow(self, run: Run, unet: torch.nn.Module) -> UNetOfTensors:
        """The adapter of this UNet, which follows this run."""
        captured = _captured.get(self._model)
        if captured is None or captured.adapter.unet is not unet:
            captured = _captured[self._model] = _Captured(UNetOfTensors(unet))
        if self not in captured.users:
            captured.users.add(self)
            finalize(self, _let_go, captured).atexit = False
        if captured.run is not run:
            settings = self.settings
            deepcache_fx.optimize(
                captured.adapter,
                branch=settings.branch,
                schedule=lambda step: run.is_full,
                forecast=settings.forecast,
                backend=settings.backend,
                precision=settings.precision,
                on_failure="uncached",
            )
            captured.run = run
            deepcache_fx.begin(captured.adapter, may_forecast=run.may_forecast)
        return captured.adapter


def _condition(options: Mapping[str, Any]) -> Hashable:
    """What a call is conditioned on, by ComfyUI's own names for it, and which part of a longer video it is."""
    window = getattr(options.get("context_window"), "index_list", None)
    return (tuple(options["uuids"]), None if window is None else tuple(window))
