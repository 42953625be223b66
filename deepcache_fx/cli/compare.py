"""What `deepcache-fx compare` does: load a pipeline, compare, print a table, write the picture."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from deepcache_fx.cli import options as option
from deepcache_fx.cli.progress import load_pipeline, progress_bar
from deepcache_fx.comparing import loading, picture
from deepcache_fx.comparing.comparison import describe_psnr, describe_ssim
from deepcache_fx.comparing.paired_runs import Comparison, compare
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files import writing as files
from deepcache_fx.schedules.patterns import Power, Uniform
from deepcache_fx.schedules.schedule import Schedule

DEFAULT_PROMPT = "a photograph of a mountain lake at sunrise"


class ScheduleName(str, enum.Enum):
    """The schedules that have a name on the command line."""

    uniform = "uniform"
    power = "power"


def compare_command(
    model: option.Pipeline,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Repeat it for more images. Otherwise: the model's prompts.json, or a landscape."),
    ] = None,
    interval: Annotated[int, typer.Option(min=1, help="1:N caching: every N-th step is full.")] = 3,
    branch: option.Branch = "0",
    schedule: Annotated[ScheduleName, typer.Option(help="Where the full steps lie.")] = ScheduleName.uniform,
    forecast: Annotated[
        str, typer.Option(help="Of the cached feature: 1 is linear, 2 quadratic, 0 repeats it; auto: by the scheduler.")
    ] = "auto",
    power: Annotated[float, typer.Option(help="Of the power schedule: how fast full steps thin out.")] = 1.4,
    center: Annotated[int, typer.Option(help="Of the power schedule: the step around which they are dense.")] = 15,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    scheduler: option.Scheduler = None,
    refiner: Annotated[str | None, typer.Option(help="An SDXL refiner, for the last 20 % of the denoising.")] = None,
    seed: option.Seed = 0,
    dtype: option.Dtype = None,
    variant: option.Variant = None,
    device: option.Device = None,
    backend: option.Backend = "auto",
    precision: option.Precision = None,
    guidance_scale: option.GuidanceScale = None,
    height: option.Pixels = None,
    width: option.Pixels = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each pipeline is timed.")] = 3,
    warmup: Annotated[bool, typer.Option(help="Run each once before it is timed.")] = True,
    out: Annotated[Path, typer.Option(help="The picture: baseline above, optimised below.")] = Path("output.png"),
    json: option.Json = None,
) -> None:
    """Run a text-to-image pipeline without and with caching: times, similarity, a picture of both."""
    where, order = option.read_branch(branch), option.read_forecast(forecast)
    timetable = Uniform(interval) if schedule is ScheduleName.uniform else Power(interval, power, center)
    _check(timetable, steps, scheduler, out, json)
    local = loading.check_model(model)
    if refiner is not None:
        local &= loading.check_model(refiner)
    prompts = tuple(prompt or loading.read_prompts(model) or (DEFAULT_PROMPT,))
    at = loading.pick_device(device)
    kind = loading.pick_dtype(None if dtype is None else dtype.value, at)
    console = Console(stderr=True)
    with loading.quiet(keep_download_bars=not local):
        pipes = [
            load_pipeline(console, name, dtype=kind, device=at, variant=variant, scheduler=scheduler)
            for name in filter(None, (model, refiner))
        ]
        remedy = "fewer prompts, a smaller picture or another --dtype"
        with progress_bar(console, time_stages=True) as progress, loading.one_line_errors(remedy):
            found = compare(
                pipes[0],
                prompts=prompts,
                optimize_arguments={
                    "schedule": timetable,
                    "branch": where,
                    "forecast": order,
                    "backend": backend,
                    "precision": precision,
                },
                steps=steps,
                seed=seed,
                guidance_scale=guidance_scale,
                refiner=pipes[1] if len(pipes) > 1 else None,
                repeats=repeats,
                warmup=warmup,
                progress=progress,
                **{name: value for name, value in (("height", height), ("width", width)) if value is not None},
            )
    picture.save(picture.draw_comparison(found), out)
    settings = {
        "model": model,
        "refiner": refiner,
        "schedule": str(timetable),
        "branch": where,
        "forecast": order,
        "scheduler": type(pipes[0].scheduler).__name__,
        "backend": found.reports[0].backend,
        "precision": found.reports[0].precision,
        "device": torch.cuda.get_device_name(at) if at.type == "cuda" else at.type,
        "dtype": str(kind).removeprefix("torch."),
        "torch": torch.__version__,
        "height": found.baseline_images.shape[-2],
        "width": found.baseline_images.shape[-1],
    }
    if json is not None:
        files.write_json(json, {**settings, **found.to_dict()})
    output = Console()
    output.print(_table(found, settings))
    for remark in (*(f"no speed-up is told: {doubt}" for doubt in found.doubts), *found.remarks):
        output.print(f"note: {remark}", markup=False, highlight=False)
    output.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)


def _check(schedule: Schedule, steps: int, scheduler: str | None, out: Path, json: Path | None) -> None:
    """What can be known to be wrong before a model is loaded."""
    if scheduler is not None:
        loading.check_scheduler(scheduler)
    if schedule.needs_num_steps:
        schedule.full_steps(steps)
    try:
        picture.check_suffix(out)
    except ValueError as error:
        raise DeepCacheError(str(error)) from error
    for path in (out, json):
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
