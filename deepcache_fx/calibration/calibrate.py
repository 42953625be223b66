"""calibrate: find the steps to run in full that bring a pipeline's images closest to the uncached ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from deepcache_fx.api import __version__
from deepcache_fx.calibration.file import CalibrationFile, Evaluation
from deepcache_fx.calibration.runs import METRICS, Job, Measured, Runs, argument_digest, left_as_found, weights_digest
from deepcache_fx.calibration.search import Candidate, Search, uniform
from deepcache_fx.errors import DeepCacheError, OptionError
from deepcache_fx.files.writing import check_writable
from deepcache_fx.options import Options
from deepcache_fx.schedules.branch import Branch, check_branch
from deepcache_fx.schedules.made_for import MadeFor
from deepcache_fx.schedules.schedule import Achieved, Calibrated

Progress = Callable[[str, int, int], None]
"""Called as (what is known so far, schedules tried, schedules that may be tried)."""


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | int,
    *,
    budget: float | None = None,
    target_error: float | None = None,
    steps: int = 50,
    seed: int = 0,
    forecast: int | Sequence[int] = (0, 1, 2),
    branch: Branch | Sequence[int] = 0,
    deeper: Branch | Sequence[int] | None = None,
    metric: str = "latents",
    trials: int = 100,
    batch_size: int | None = None,
    out: str | Path | None = None,
    optimize_arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **call_arguments: Any,
) -> Calibrated:
    """Search for the full steps, and the order of the forecast, that suit a model, a scheduler and a number of steps.

    Every schedule that is tried makes the images of all prompts; its error is their relative L2 distance to the
    uncached images of the same seeds. The search begins with equally spaced refreshes, so that its result is at least
    as good. It is deterministic. The pipeline is afterwards as it was, also where this raises.

    Args:
        pipe: A diffusers pipeline with a UNet.
        prompts: One image each, image i from the noise of seed + i; repeat a prompt for another seed. For a pipeline
            that takes no prompt, the number of images. Too few, and the schedule suits those images alone: take 16 or
            more, and judge the result on other seeds.
        budget: What a run may cost: the number of full steps, or, below 1, its share of the uncached run's
            multiply-accumulates as `report` counts them.
        target_error: Instead of `budget`: find the fewest full steps with at most this error.
        steps: Denoising steps (`num_inference_steps`). The result is for this number alone.
        seed: Of the first image's noise, drawn on the CPU.
        forecast: Orders of the forecast to choose from, see `optimize`. Each costs a capture.
        branch: The skip connection to cut at, see `optimize`.
        deeper: A deeper skip connection that some shallow steps may begin at (see `Nested`), where that brings more
            than the full steps that cost as much. Needs `budget`, and an order of the forecast above 0.
        metric: "latents", or "images" to compare decoded images in [0, 1].
        trials: How many schedules may be tried; each costs a cached run of all images. Without captures, 100 take
            about as long as 40 uncached runs at 1:3.
        batch_size: Images in one pipeline call; all of them if None. A schedule that is already worse than the best
            known after a few batches is not run to the end. One that does not divide the images costs a second capture.
        out: A JSON file for `Schedule.load`, written after every trial. Where it is there, from the same settings, the
            search goes on from it; `trials` may differ.
        optimize_arguments: More arguments of `optimize`: backend, passes, ...
        progress: Told of every trial.
        call_arguments: Handed to the pipeline with every batch: guidance_scale, height, class_labels, ...

    Returns:
        A schedule that holds what it was made for and what it achieves: `optimize(pipe, **found.options)`.

    Raises:
        DeepCacheError: an argument makes no sense, the pipeline does not take it, `optimize` refuses, the target cannot
            be reached, or `out` comes from other settings.

    Example:
        >>> found = deepcache_fx.calibrate(pipe, prompts, budget=17, steps=50, out="schedule.json")
        >>> found.achieved.error, found.achieved.uniform_error
        >>> deepcache_fx.optimize(pipe, **found.options)
    """
    orders = (forecast,) if isinstance(forecast, int) else tuple(forecast)
    if not orders:
        raise OptionError("forecast must name at least one order: 0, 1 or 2")
    for order in orders:  # all mistakes in what `optimize` will be asked, before anything runs
        chosen = Options.make(branch=branch, forecast=order, **(optimize_arguments or {})).branch
    deeper_branch = None if deeper is None else check_branch(deeper)
    _check_goal(budget, target_error)
    if deeper_branch is not None and (budget is None or not any(orders)):
        raise OptionError("deeper needs a budget, and an order of the forecast above 0: leave it out")
    if not isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        raise DeepCacheError(f"calibrate takes a diffusers pipeline with a .unet, got {type(pipe).__name__}")
    count = prompts if isinstance(prompts, int) else len(prompts)
    batch = count if batch_size is None else batch_size
    for name, value in {"the number of prompts": count, "steps": steps, "trials": trials, "batch_size": batch}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")
    if metric not in METRICS:
        raise OptionError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(prompts, str):
        raise OptionError(f"prompts must be a list of prompts, got one: {prompts!r}")
    job = Job(
        pipe=pipe,
        prompts=prompts if isinstance(prompts, int) else tuple(prompts),
        steps=steps,
        seed=seed,
        metric=metric,
        batch_size=batch,
        call_arguments=call_arguments,
    )
    job.check()
    path = Path(out) if out is not None else None
    if path is not None:
        check_writable(path)
    with left_as_found(pipe):
        made_for = MadeFor.of(pipe.unet, pipe.scheduler)
        settings = {
            "budget": budget,
            "target_error": target_error,
            "forecast": list(orders),
            "branch": chosen if isinstance(chosen, int) else list(chosen),
            "deeper": list(deeper_branch) if isinstance(deeper_branch, tuple) else deeper_branch,
            "prompts": prompts if isinstance(prompts, int) else list(prompts),
            "seed": seed,
            "steps": steps,
            "metric": metric,
            "call_arguments": argument_digest(call_arguments),
            "optimize_arguments": argument_digest(optimize_arguments or {}),
            "model": made_for.model,
            "model_config": made_for.model_config,
            "weights": weights_digest(pipe.unet),
            "scheduler": made_for.scheduler,
            "scheduler_config": json.loads(made_for.scheduler_config),
        }
        notes = CalibrationFile.open(path, settings)
        runs = Runs(job, chosen, optimize_arguments or {}, deeper_branch)
        with closing(runs):
            return _search(
                runs, notes, made_for, job, orders, (chosen, deeper_branch), budget, target_error, trials, progress
            )


def _search(
    runs: Runs,
    notes: CalibrationFile,
    made_for: MadeFor,
    job: Job,
    orders: tuple[int, ...],
    branches: tuple[Branch, Branch | None],
    budget: float | None,
    target_error: float | None,
    trials: int,
    progress: Progress | None,
) -> Calibrated:
    tell: Progress = progress or (lambda stage, done, total: None)
    tell("capturing", 0, trials)
    if notes.measured is None:
        notes.measured = runs.measure(orders[0])
    measured = notes.measured

    def measure(candidate: Candidate, limit: float) -> float:
        known = notes.evaluations.get(candidate)
        if known is None or not (known.images == job.count or known.error > limit):
            known = Evaluation(*runs.error(candidate, limit))
            notes.add(candidate, known)
        tell(_told(search, measured), min(len(search.known) + 1, trials), trials)
        return known.error if known.images == job.count else math.inf

    # Half of the trials are for full steps alone where there is more to try.
    search = Search(measure, measured.num_steps, orders, trials if branches[1] is None else -(-trials // 2))
    if target_error is not None:
        best = search.at_error(target_error)
    else:
        assert budget is not None, "checked: there is one of the two"
        best = search.at_budget(full_steps_for(budget, measured))
    plain, plain_error = best, search.known[best]
    if not math.isfinite(plain_error):
        raise DeepCacheError("every schedule that was tried gives values that are not finite: try another dtype")
    even = Candidate(uniform(measured.num_steps, len(plain.steps)), plain.forecast)
    even_error = search.known[even] if even in search.known else measure(even, math.inf)
    if branches[1] is not None:
        search.trials = trials
        best = search.deepen(plain, measured.exchange)
    found = Calibrated(
        steps=best.steps,
        num_steps=measured.num_steps,
        forecast=best.forecast,
        branch=branches[0],
        made_for=made_for,
        achieved=Achieved(
            metric=job.metric,
            error=search.known[best],
            uniform_error=even_error,
            cost=measured.cost(len(best.steps), len(best.deeper)),
            images=job.count,
            trials=len(search.known),
            plain_error=None if branches[1] is None else plain_error,
        ),
        library=__version__,
        deeper=best.deeper,
        deeper_branch=branches[1] if best.deeper else None,
    )
    notes.finish(found)
    return found


def full_steps_for(budget: float, measured: Measured) -> int:
    """How many full steps a budget pays for.

    Raises:
        OptionError: none, or more than a run has steps.
    """
    if isinstance(budget, int):
        if budget > measured.num_steps:
            raise OptionError(f"budget must be at most the {measured.num_steps} steps of a run, got {budget}")
        return budget
    affordable = [n for n in range(1, measured.num_steps + 1) if measured.cost(n) <= budget + 1e-9]
    if not affordable:
        least = measured.cost(1)
        raise OptionError(f"budget must be at least {least:.3f}, the share of a run with one full step, got {budget}")
    return affordable[-1]


def _check_goal(budget: float | None, target_error: float | None) -> None:
    if (budget is None) == (target_error is None):
        raise OptionError("calibrate needs either budget or target_error")
    wrong = isinstance(budget, bool) or not isinstance(budget, (int, float))
    if budget is not None and (wrong or not (0 < budget < 1 or (isinstance(budget, int) and budget >= 1))):
        raise OptionError(f"budget must be a number of full steps, or a share between 0 and 1, got {budget!r}")
    wrong = isinstance(target_error, bool) or not isinstance(target_error, (int, float))
    if target_error is not None and (wrong or not 0 < target_error < math.inf):
        raise OptionError(f"target_error must be a number above 0, got {target_error!r}")


def _told(search: Search, measured: Measured) -> str:
    if not search.known:
        return "first schedule"
    latest = next(reversed(search.known))
    best = min((one for one in search.known if len(one.steps) == len(latest.steps)), key=search.known.__getitem__)
    return f"error {search.known[best]:.3g} with {len(best.steps)} of {measured.num_steps} steps full"
