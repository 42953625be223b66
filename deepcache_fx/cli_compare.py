"""What `deepcache-fx compare` does: load a pipeline, compare, print a table, write the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deepcache_fx import files, loading, picture
from deepcache_fx.branch import Branch
from deepcache_fx.cli_progress import progress_bar
from deepcache_fx.compare import Comparison, compare
from deepcache_fx.compare import Progress as StepProgress
from deepcache_fx.comparison import describe_psnr, describe_ssim
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.schedule import Schedule

DEFAULT_PROMPT = "a photograph of a mountain lake at sunrise"


@dataclass(frozen=True)
class Request:
    """The command's options; None stands for a default that depends on the model or the machine."""

    model: str
    refiner: str | None
    prompts: tuple[str, ...]
    schedule: Schedule
    branch: Branch
    forecast: int
    backend: str
    scheduler: str | None
    steps: int
    seed: int
    dtype: str | None
    variant: str | None
    device: str | None
    guidance_scale: float | None
    size: Mapping[str, int]
    repeats: int
    warmup: bool
    out: Path
    json: Path | None


def compare_command(request: Request) -> None:
    """Compare, print the table on stdout, write the picture and the numbers; progress goes to stderr.

    Raises:
        DeepCacheError: an option makes no sense, found before anything runs where that is possible.
    """
    _check(request)
    local = loading.check_model(request.model)
    if request.refiner is not None:
        local &= loading.check_model(request.refiner)
    prompts = request.prompts or loading.read_prompts(request.model) or (DEFAULT_PROMPT,)
    device = loading.pick_device(request.device)
    dtype = loading.pick_dtype(request.dtype, device)
    console = Console(stderr=True)
    with loading.quiet(keep_download_bars=not local):
        pipes = _load(request, device, dtype, console, spin=local)
        with progress_bar(console, time_stages=True) as progress:
            found = _compare(request, prompts, pipes, progress)
    picture.save(picture.draw_comparison(found), request.out)
    settings = {
        "model": request.model,
        "refiner": request.refiner,
        "schedule": str(request.schedule),
        "branch": request.branch,
        "forecast": request.forecast,
        "scheduler": type(pipes[0].scheduler).__name__,
        "backend": found.reports[0].backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "height": found.baseline_images.shape[-2],
        "width": found.baseline_images.shape[-1],
    }
    if request.json is not None:
        files.write_json(request.json, {**settings, **found.to_dict()})
    output = Console()
    output.print(_table(found, settings))
    for remark in (*(f"no speed-up is told: {doubt}" for doubt in found.doubts), *found.remarks):
        output.print(f"note: {remark}", markup=False, highlight=False)
    output.print(f"picture: {request.out}", markup=False, highlight=False, soft_wrap=True)


def _load(request: Request, device: torch.device, dtype: torch.dtype, console: Console, *, spin: bool) -> list[Any]:
    """The pipeline, and the refiner where there is one. `spin`: nothing else will show that something happens."""
    pipes = []
    for name in (request.model, request.refiner):
        if name is not None:
            with console.status(f"loading {name}") if spin else nullcontext():
                pipes.append(loading.load_pipeline(name, dtype=dtype, device=device, variant=request.variant))
    for pipe in pipes if request.scheduler is not None else ():
        loading.use_scheduler(pipe, str(request.scheduler))
    return pipes


def _compare(request: Request, prompts: tuple[str, ...], pipes: list[Any], progress: StepProgress) -> Comparison:
    arguments = {name: getattr(request, name) for name in ("schedule", "branch", "forecast", "backend")}
    try:
        return compare(
            pipes[0],
            prompts=prompts,
            optimize_arguments=arguments,
            steps=request.steps,
            seed=request.seed,
            guidance_scale=request.guidance_scale,
            refiner=pipes[1] if len(pipes) > 1 else None,
            repeats=request.repeats,
            warmup=request.warmup,
            progress=progress,
            **request.size,
        )
    except ValueError as error:  # the pipeline's own checks: a height that is no multiple of 8, too many steps
        raise DeepCacheError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise DeepCacheError("out of memory: try fewer prompts, a smaller picture or another --dtype") from error


def _check(request: Request) -> None:
    """What can be known to be wrong before a model is loaded."""
    if request.scheduler is not None:
        loading.check_scheduler(request.scheduler)
    if request.schedule.needs_num_steps:
        request.schedule.full_steps(request.steps)
    try:
        picture.check_suffix(request.out)
    except ValueError as error:
        raise DeepCacheError(str(error)) from error
    for path in (request.out, request.json):
        if path is not None:
            files.check_writable(path)


def _table(found: Comparison, settings: Mapping[str, Any]) -> Table:
    where = f"{settings['device']} {settings['dtype']}, {settings['width']}x{settings['height']}"
    how = f"{found.steps} steps {settings['scheduler']}, {settings['schedule']}, branch {settings['branch']}"
    how += f", forecast {settings['forecast']}"
    table = Table(title=f"{settings['model']}\n{how}\n{where}, batch {len(found.prompts)}", title_justify="left")
    table.add_column("")
    table.add_column("baseline", justify="right")
    table.add_column(f"deepcache_fx ({settings['backend']})", justify="right")
    repeats = len(found.baseline_seconds)
    times = [found.baseline_seconds, found.optimized_seconds]
    name = "time" if repeats == 1 else f"time, median of {repeats}"
    table.add_row(name, *(f"{statistics.median(seconds):.3g} s" for seconds in times))
    if repeats > 1:
        table.add_row("  fastest to slowest", *(f"{min(seconds):.3g} to {max(seconds):.3g} s" for seconds in times))
    table.add_row("capture and compilation, once", "", f"{found.preparation_seconds:.3g} s")
    for model, calls in zip(("UNet", "refiner"), found.calls, strict=False):
        parts = {"full": calls.full, "shallow": calls.shallow, "uncached": calls.uncached}
        split = " + ".join(f"{count} {kind}" for kind, count in parts.items() if count)
        table.add_row(f"{model} calls", f"{sum(parts.values())} full", split)
    table.add_row("speed-up", "", _speedup(found))
    table.add_row("  bound from the UNet's arithmetic", "", f"{found.bound:.2f}x")
    table.add_row("PSNR", "", describe_psnr(found.psnr))
    table.add_row("SSIM", "", describe_ssim(found.ssim))
    return table


def _speedup(found: Comparison) -> str:
    """The median of the paired ratios and their range, or that there is no such figure."""
    if found.doubts:
        return "[bold]not measured[/bold] (see below)"
    low, high = found.speedup_range
    spread = f" ({low:.2f} to {high:.2f})" if len(found.ratios) > 1 else ""
    return f"[bold]{found.speedup:.2f}x[/bold]{spread}"
