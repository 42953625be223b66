"""The published pipelines: those of diffusers, told with each call how to cache.

`pipe(prompt, cache_interval=5, cache_layer_id=0, cache_block_id=0, uniform=False, pow=1.4, center=15)`. Calls without
these run as any pipeline; other values in the next call capture nothing anew, unless they name another skip connection.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from deepcache_fx.compat.published import both_or_none, interval_steps, pipeline_branch
from deepcache_fx.compat.switch import AS_PUBLISHED, Switch
from deepcache_fx.errors import OptionError
from deepcache_fx.schedules.branch import Branch

_SETTINGS: Mapping[str, Any] = {
    "cache_interval": 1,
    "cache_layer_id": None,
    "cache_block_id": None,
    "uniform": True,
    "pow": None,
    "center": None,
}
"""What the calls of the Stable Diffusion pipelines take, and its defaults, as published."""
_VIDEO_SETTINGS: Mapping[str, Any] = {"cache_interval": 1, "cache_branch": None}

_NOTHING = "this caches nothing, as in the published pipelines: "


@dataclass(frozen=True)
class _Setting:
    """What a call asked for."""

    interval: int
    branch: Branch
    uniform: bool = True
    power: float | None = None
    center: int | None = None

    def options(self, num_steps: int) -> dict[str, Any]:
        """Arguments of `optimize`."""
        schedule = interval_steps(num_steps, self.interval, uniform=self.uniform, power=self.power, center=self.center)
        return {"schedule": schedule, "branch": self.branch}


class _PerCall:
    """A pipeline that is told with each call how to cache."""

    cache_options: Mapping[str, Any] = AS_PUBLISHED
    """Arguments of `optimize` for the cached calls; a pipeline may be given its own."""
    _needs_attention = False
    """As published for Stable Diffusion: up blocks without attention keep no feature."""

    def _setting(self, told: Mapping[str, Any]) -> _Setting | None:
        """None where nothing is cached."""
        if told["cache_interval"] == 1:
            return None
        given = both_or_none(told["cache_layer_id"], told["cache_block_id"])
        if given is None:
            warnings.warn(_NOTHING + "give cache_layer_id=0 and cache_block_id=0", stacklevel=4)
            return None
        branch = self._branch(*given)
        if branch is None:
            return None
        return _Setting(told["cache_interval"], branch, bool(told["uniform"]), told["pow"], told["center"])

    def _branch(self, block: int, module: int) -> Branch | None:
        unet: Any = self.unet  # type: ignore[attr-defined]
        branch = pipeline_branch(unet, block, module)
        if isinstance(branch, tuple) and self._needs_attention and not _attends(unet, branch[0]):
            branch = None
        if branch is None:
            warnings.warn(f"{_NOTHING}block {block}, module {module} is too deep", stacklevel=5)
        return branch

    def _call(self, call: Callable[..., Any], told: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The call of diffusers' pipeline, with the cache switched on for its length."""
        setting = self._setting(told)
        if setting is None:
            return call(self, *args, **kwargs)
        arguments = inspect.signature(call).bind(self, *args, **kwargs)
        arguments.apply_defaults()
        switch: Switch = self.__dict__.setdefault("_deepcache_fx_switch", Switch())
        self._asked_for = setting, arguments.arguments.get("denoising_end")
        try:
            self._cache(switch, setting, self._count(arguments.arguments, setting))
            return call(self, *args, **kwargs)
        finally:
            del self._asked_for
            switch.off()

    def _cache(self, switch: Switch, setting: _Setting, num_steps: int) -> None:
        switch.on(self, **{**self.cache_options, **setting.options(num_steps)})

    def _count(self, arguments: Mapping[str, Any], setting: _Setting) -> int:
        """The steps that the call is told to make."""
        for name in ("timesteps", "sigmas"):
            if arguments.get(name) is not None:
                return len(arguments[name])
        count: int = arguments["num_inference_steps"]
        end = arguments.get("denoising_end")
        if end is None or setting.uniform:  # a uniform interval is the same in a shorter run
            return count
        scheduler: Any = copy.deepcopy(self.scheduler)  # type: ignore[attr-defined]
        scheduler.set_timesteps(count)
        return _steps_before(scheduler, scheduler.timesteps, end)


class _FromImage(_PerCall):
    """Runs a part of the steps that it is told."""

    def get_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        timesteps, count = super().get_timesteps(*args, **kwargs)  # type: ignore[misc]
        asked_for = self.__dict__.get("_asked_for")
        if asked_for is not None:
            setting, end = asked_for
            if end is not None and not setting.uniform:
                count = _steps_before(self.scheduler, timesteps, end)  # type: ignore[attr-defined]
            self._cache(self.__dict__["_deepcache_fx_switch"], setting, count)
        return timesteps, count


def _attends(unet: Any, block: int) -> bool:
    """Whether an up block, counted from the output, has attention."""
    return hasattr(unet.up_blocks[len(unet.up_blocks) - 1 - block], "attentions")


def _steps_before(scheduler: Any, timesteps: torch.Tensor, end: float) -> int:
    """How many of the steps a pipeline makes that is told `denoising_end`."""
    total = scheduler.config.num_train_timesteps
    return int((timesteps >= round(total - end * total)).sum())


def _told_per_call(pipeline: Any, settings: Mapping[str, Any] = _SETTINGS) -> Callable[..., Any]:
    """The `__call__` of a pipeline of diffusers, which takes these settings besides."""
    call = pipeline.__call__

    @functools.wraps(call)
    def __call__(self: _PerCall, *args: Any, **kwargs: Any) -> Any:
        told = {name: kwargs.pop(name, default) for name, default in settings.items()}
        if kwargs.get("output_all_sequence"):
            raise OptionError("output_all_sequence is not supported: take the latents in callback_on_step_end")
        return self._call(call, told, args, kwargs)

    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in settings.items()
    ]
    __call__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return __call__


class StableDiffusionPipeline(_PerCall, diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    _needs_attention = True
    __call__ = _told_per_call(diffusers.StableDiffusionPipeline)


class StableDiffusionImg2ImgPipeline(_FromImage, diffusers.StableDiffusionImg2ImgPipeline):  # type: ignore[misc]
    _needs_attention = True
    __call__ = _told_per_call(diffusers.StableDiffusionImg2ImgPipeline)


class StableDiffusionInpaintPipeline(_FromImage, diffusers.StableDiffusionInpaintPipeline):  # type: ignore[misc]
    _needs_attention = True
    __call__ = _told_per_call(diffusers.StableDiffusionInpaintPipeline)


class StableDiffusionXLPipeline(_PerCall, diffusers.StableDiffusionXLPipeline):  # type: ignore[misc]
    __call__ = _told_per_call(diffusers.StableDiffusionXLPipeline)


class StableDiffusionXLImg2ImgPipeline(_FromImage, diffusers.StableDiffusionXLImg2ImgPipeline):  # type: ignore[misc]
    __call__ = _told_per_call(diffusers.StableDiffusionXLImg2ImgPipeline)


class StableDiffusionXLInpaintPipeline(_FromImage, diffusers.StableDiffusionXLInpaintPipeline):  # type: ignore[misc]
    __call__ = _told_per_call(diffusers.StableDiffusionXLInpaintPipeline)


class StableVideoDiffusionPipeline(_PerCall, diffusers.StableVideoDiffusionPipeline):  # type: ignore[misc]
    """Takes `cache_interval` and `cache_branch`, which counts the modules of all down blocks."""

    __call__ = _told_per_call(diffusers.StableVideoDiffusionPipeline, _VIDEO_SETTINGS)

    def _setting(self, told: Mapping[str, Any]) -> _Setting | None:
        if told["cache_interval"] == 1:
            return None
        if told["cache_branch"] is None:
            warnings.warn(_NOTHING + "give cache_branch=0", stacklevel=4)
            return None
        modules = len(self.unet.down_blocks[0].resnets) + 1
        branch = self._branch(*divmod(told["cache_branch"], modules))
        return None if branch is None else _Setting(told["cache_interval"], branch)
