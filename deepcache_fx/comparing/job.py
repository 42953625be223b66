"""One generation by a text-to-image pipeline, timed, with and without its caching."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.attach import bring_back, pause

Progress = Callable[[str, int, int], None]
"""Called as (stage, denoising steps done, denoising steps of this stage). What it raises ends the run."""

REFINER_START = 0.8
"""The share of the denoising that the base model does where there is a refiner, as in SDXL's published pipeline."""


@contextmanager
def paused(pipes: Sequence[Any]) -> Iterator[None]:
    """The pipelines without caching, for the length of a with block; captures are kept.

    Weights keep the layout that programs want: to undo it would have every graph recorded anew in a run that is timed.
    """
    runtimes = [(item.unet, pause(item.unet)) for item in pipes]
    try:
        yield
    finally:
        for unet, runtime in runtimes:
            if runtime is not None:
                bring_back(unet, runtime)


@dataclass(frozen=True)
class Job:
    """One generation, to be run several times."""

    pipe: Any
    refiner: Any
    prompts: tuple[str, ...]
    steps: int
    seed: int
    guidance_scale: float | None
    call_arguments: Mapping[str, Any]
    progress: Progress | None

    def check(self) -> None:
        """Raise a DeepCacheError where a pipeline does not take what will be passed."""
        needed = {"prompt", "num_inference_steps", "generator", *self.call_arguments}
        require_parameters(self.pipe, needed | ({"denoising_end"} if self.refiner is not None else set()))
        if self.refiner is not None:
            require_parameters(self.refiner, {"prompt", "num_inference_steps", "generator", "image", "denoising_start"})

    def run(self, stage: str) -> tuple[float, torch.Tensor]:
        """(seconds, images); see `Comparison`."""
        generators = [torch.Generator().manual_seed(self.seed + index) for index in range(len(self.prompts))]
        _synchronize()
        started = time.perf_counter()
        if self.refiner is None:
            images = self._call(self.pipe, stage, generators, output_type="pt", **self.call_arguments)
        else:
            split: dict[str, Any] = {"output_type": "latent", "denoising_end": REFINER_START}
            latents = self._call(self.pipe, f"{stage}, base", generators, **split, **self.call_arguments)
            shared = {k: v for k, v in self.call_arguments.items() if k in parameters_of(self.refiner)}
            split = {"output_type": "pt", "denoising_start": REFINER_START, "image": latents}
            images = self._call(self.refiner, f"{stage}, refiner", generators, **{**shared, **split})
        _synchronize()
        return time.perf_counter() - started, images.float().cpu()

    def _call(self, pipe: Any, stage: str, generators: list[torch.Generator], **arguments: Any) -> Any:
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if self.progress is not None:
            self.progress(stage, 0, self.steps)
            if "callback_on_step_end" in parameters_of(pipe):
                arguments["callback_on_step_end"] = _Reporter(self.progress, stage, self.steps)
        return pipe(list(self.prompts), num_inference_steps=self.steps, generator=generators, **arguments).images


@dataclass(frozen=True)
class _Reporter:
    """A pipeline's `callback_on_step_end`. Reads no tensor: nothing waits for a device."""

    progress: Progress
    stage: str
    steps: int

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.progress(self.stage, step + 1, getattr(pipe, "num_timesteps", self.steps))
        return tensors


def parameters_of(pipe: Any) -> set[str]:
    """The names of what a pipeline's call takes."""
    return set(inspect.signature(type(pipe).__call__).parameters)


def require_parameters(pipe: Any, names: set[str]) -> None:
    """Raise a DeepCacheError that names what the pipeline's call does not take."""
    missing = sorted(names - parameters_of(pipe))
    if missing:
        raise DeepCacheError(f"{type(pipe).__name__} does not take {', '.join(missing)}")


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
