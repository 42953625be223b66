"""What `deepcache-fx calibrate` does: load a pipeline, search for a schedule, write it, print what it achieves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from deepcache_fx.calibration.calibrate import calibrate
from deepcache_fx.cli import loading
from deepcache_fx.cli.progress import progress_bar
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files import writing as files
from deepcache_fx.schedules.branch import Branch
from deepcache_fx.schedules.schedule import Calibrated


@dataclass(frozen=True)
class CalibrationRequest:
    """The command's options; None stands for a default that depends on the model or the machine."""

    model: str
    prompts: tuple[str, ...]
    budget: float | None
    """An integer is a number of full steps."""
    target_error: float | None
    forecast: tuple[int, ...]
    branch: Branch
    deeper: Branch | None
    metric: str
    trials: int
    batch_size: int | None
    backend: str
    scheduler: str | None
    steps: int
    seed: int
    dtype: str | None
    variant: str | None
    device: str | None
    call_arguments: Mapping[str, object]
    """Of the pipeline."""
    out: Path


def calibrate_command(request: CalibrationRequest) -> Calibrated:
    """Calibrate, write the schedule, print the table on stdout; progress goes to stderr.

    Raises:
        DeepCacheError: an option makes no sense, found before anything runs where that is possible.
    """
    if request.scheduler is not None:
        loading.check_scheduler(request.scheduler)
    if (request.budget is None) == (request.target_error is None):
        raise DeepCacheError("calibrate needs either --budget or --target-error")
    files.check_writable(request.out)
    local = loading.check_model(request.model)
    prompts = request.prompts or loading.read_prompts(request.model)
    if not prompts:
        raise DeepCacheError(f"{request.model} suggests no prompts of its own: give some with --prompt, 16 or more")
    device = loading.pick_device(request.device)
    dtype = loading.pick_dtype(request.dtype, device)
    console = Console(stderr=True)
    with loading.quiet(keep_download_bars=not local):
        with console.status(f"loading {request.model}") if local else nullcontext():
            pipe = loading.load_pipeline(request.model, dtype=dtype, device=device, variant=request.variant)
        if request.scheduler is not None:
            loading.use_scheduler(pipe, request.scheduler)
        with progress_bar(console, time_stages=False) as progress:
            try:
                found = calibrate(
                    pipe,
                    prompts,
                    budget=request.budget,
                    target_error=request.target_error,
                    steps=request.steps,
                    seed=request.seed,
                    forecast=request.forecast,
                    branch=request.branch,
                    deeper=request.deeper,
                    metric=request.metric,
                    trials=request.trials,
                    batch_size=request.batch_size,
                    out=request.out,
                    optimize_arguments={"backend": request.backend},
                    progress=progress,
                    **request.call_arguments,
                )
            except torch.OutOfMemoryError as error:
                raise DeepCacheError("out of memory: try a smaller --batch-size or another --dtype") from error
            except DeepCacheError:
                raise
            except ValueError as error:  # the pipeline's own checks: a height that is no multiple of 8
                raise DeepCacheError(str(error)) from error
    output = Console()
    output.print(_table(found, request.model))
    output.print(f"schedule: {request.out}", markup=False, highlight=False, soft_wrap=True)
    return found


def _table(found: Calibrated, model: str) -> Table:
    achieved, made_for = found.achieved, found.made_for
    where = f"{made_for.scheduler}, branch {found.branch}, {achieved.images} images, {achieved.trials} schedules tried"
    table = Table(title=f"{model}\n{where}", title_justify="left", show_header=False)
    more = f", t from branch {found.deeper_branch}" if found.deeper else ""
    table.add_row(f"steps: F full, s shallow{more}", found.letters)
    table.add_row("full steps", f"{len(found.steps)} of {found.num_steps}")
    table.add_row("forecast", {0: "0 (repeat)", 1: "1 (linear)", 2: "2 (quadratic)"}[found.forecast])
    table.add_row("cost, of the uncached arithmetic", f"{achieved.cost:.1%}")
    table.add_row(f"error of the {achieved.metric}", f"[bold]{achieved.error:.3g}[/bold]")
    table.add_row("  equally spaced, as many", f"{achieved.uniform_error:.3g}")
    if achieved.plain_error is not None:
        table.add_row("  without deeper steps", f"{achieved.plain_error:.3g}")
    return table
