"""The engine of `deepcache-fx compare`: the same images without and with caching, timed in turn."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deepcache_fx.api import optimized, report
from deepcache_fx.cli.comparison import Comparison as Comparison
from deepcache_fx.cli.comparison import UNetCalls
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.attach import bring_back, pause

Progress = Callable[[str, int, int], None]
"""Called as (stage, denoising steps done, denoising steps of this stage)."""

REFINER_START = 0.8
"""The share of the denoising that the base model does where there is a refiner, as in SDXL's published pipeline."""


def compare(
    pipe: Any,
    *,
    prompts: Sequence[str],
    optimize_arguments: Mapping[str, Any] | None = None,
    steps: int = 50,
    seed: int = 0,
    guidance_scale: float | None = None,
    refiner: Any = None,
    repeats: int = 3,
    warmup: bool = True,
    progress: Progress | None = None,
    **call_arguments: Any,
) -> Comparison:
    """Run a text-to-image pipeline without and with caching, on the same seeds, in turn.

    The pipeline is afterwards as it was, also where this raises. All prompts form one batch; prompt i starts from
    seed + i.

    Args:
        pipe: A diffusers text-to-image pipeline with a UNet.
        prompts: One image each.
        optimize_arguments: Keyword arguments of `deepcache_fx.optimize`.
        steps: Denoising steps (`num_inference_steps`).
        seed: Of the first prompt's initial noise, drawn on the CPU.
        guidance_scale: None leaves it to the pipeline.
        refiner: An image-to-image pipeline that takes over after 80 % of the denoising (SDXL); optimised likewise.
        repeats: How often each of the two is timed.
        warmup: Run both once, untimed, first. Without it the first times hold what is paid once, except for the graph
            capture, which is taken off: then trust them only with the eager backend.
        progress: Told of every denoising step.
        call_arguments: Handed to the pipeline: height, width, negative_prompt, ...

    Raises:
        DeepCacheError: an argument makes no sense, the pipeline has no UNet or takes no prompt, or `optimize` refuses.
    """
    if not prompts:
        raise DeepCacheError("compare needs at least one prompt")
    for name, value in (("steps", steps), ("repeats", repeats)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DeepCacheError(f"{name} must be an integer of at least 1, got {value!r}")
    job = _Job(pipe, refiner, tuple(prompts), steps, seed, guidance_scale, call_arguments, progress)
    job.check()
    pipes = (pipe,) if refiner is None else (pipe, refiner)
    baseline: list[float] = []
    cached: list[float] = []
    first = 0.0
    with ExitStack() as stack:
        for item in pipes:
            stack.enter_context(optimized(item, **(optimize_arguments or {})))
        if warmup:  # optimised first: what capture refuses shows at once
            first, _ = job.run("capture")
            with _paused(pipes):
                job.run("warm-up")
        for turn in range(1, repeats + 1):
            with _paused(pipes):
                seconds, baseline_images = job.run(f"baseline {turn}/{repeats}")
            baseline.append(seconds)
            before = [report(item) for item in pipes]
            seconds, optimized_images = job.run(f"optimised {turn}/{repeats}")
            after = [report(item) for item in pipes]
            captured = sum(a.capture_seconds - b.capture_seconds for a, b in zip(after, before, strict=True))
            cached.append(seconds - max(0.0, captured))
            first = first if warmup or turn > 1 else seconds
    return Comparison(
        prompts=tuple(prompts),
        steps=steps,
        seed=seed,
        baseline_seconds=tuple(baseline),
        optimized_seconds=tuple(cached),
        preparation_seconds=max(0.0, first - statistics.median(cached)),
        calls=tuple(UNetCalls.between(b, a) for b, a in zip(before, after, strict=True)),
        reports=tuple(after),
        baseline_images=baseline_images,
        optimized_images=optimized_images,
    )


@contextmanager
def _paused(pipes: Sequence[Any]) -> Iterator[None]:
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
class _Job:
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
        _require(self.pipe, needed | ({"denoising_end"} if self.refiner is not None else set()))
        if self.refiner is not None:
            _require(self.refiner, {"prompt", "num_inference_steps", "generator", "image", "denoising_start"})

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
            shared = {k: v for k, v in self.call_arguments.items() if k in _parameters(self.refiner)}
            split = {"output_type": "pt", "denoising_start": REFINER_START, "image": latents}
            images = self._call(self.refiner, f"{stage}, refiner", generators, **{**shared, **split})
        _synchronize()
        return time.perf_counter() - started, images.float().cpu()

    def _call(self, pipe: Any, stage: str, generators: list[torch.Generator], **arguments: Any) -> Any:
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if self.progress is not None:
            self.progress(stage, 0, self.steps)
            if "callback_on_step_end" in _parameters(pipe):
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


def _parameters(pipe: Any) -> set[str]:
    return set(inspect.signature(type(pipe).__call__).parameters)


def _require(pipe: Any, names: set[str]) -> None:
    missing = sorted(names - _parameters(pipe))
    if missing:
        raise DeepCacheError(f"{type(pipe).__name__} does not take {', '.join(missing)}")


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
