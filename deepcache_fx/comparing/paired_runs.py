"""The same images without and with caching, timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from deepcache_fx.api import optimized, report
from deepcache_fx.comparing.comparison import Comparison as Comparison
from deepcache_fx.comparing.comparison import UNetCalls
from deepcache_fx.comparing.job import Job, Progress, paused
from deepcache_fx.errors import DeepCacheError


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
    job = Job(pipe, refiner, tuple(prompts), steps, seed, guidance_scale, call_arguments, progress)
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
            with paused(pipes):
                job.run("warm-up")
        for turn in range(1, repeats + 1):
            with paused(pipes):
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
