"""What `deepcache-fx calibrate` does: load a pipeline, search for a schedule, write it, print what it achieves."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deepcache_fx.calibration.calibrate import calibrate
from deepcache_fx.cli import options as option
from deepcache_fx.cli.progress import load_pipeline, progress_bar
from deepcache_fx.comparing import loading
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files import writing as files
from deepcache_fx.schedules.schedule import Calibrated


class MetricName(str, enum.Enum):
    """What `calibrate` compares with the uncached run."""

    latents = "latents"
    images = "images"


def calibrate_command(
    model: option.Pipeline,
    out: Annotated[Path, typer.Option(help="The schedule, a JSON file. An interrupted search goes on from it.")],
    budget: Annotated[
        str | None, typer.Option(help="Full steps, as 17, or a share of the uncached arithmetic, as 0.4.")
    ] = None,
    target_error: Annotated[
        float | None, typer.Option(help="Instead of a budget: as few full steps as keep the error below this.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeat it: 16 or more are best. Otherwise: the model's prompts.json.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the schedule is for this number alone.")] = 50,
    scheduler: option.Scheduler = None,
    forecast: Annotated[str, typer.Option(help="Orders of the forecast to choose from.")] = "0,1,2",
    branch: option.Branch = "0",
    deeper: Annotated[
        str, typer.Option(help="A deeper skip connection that shallow steps may begin at, named as --branch is.")
    ] = "",
    metric: Annotated[MetricName, typer.Option(help="What is compared.")] = MetricName.latents,
    trials: Annotated[int, typer.Option(min=1, help="How many schedules may be tried.")] = 100,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; all of them if not given.")] = None,
    seed: option.Seed = 0,
    dtype: option.Dtype = None,
    variant: option.Variant = None,
    device: option.Device = None,
    backend: option.Backend = "auto",
    precision: option.Precision = None,
    guidance_scale: option.GuidanceScale = None,
    height: option.Pixels = None,
    width: option.Pixels = None,
) -> None:
    """Search for the full steps that bring a model's images closest to the uncached ones, at a given cost."""
    chosen, deeper_branch = option.read_branch(branch), option.read_branch(deeper, "--deeper") if deeper else None
    goal, orders = None if budget is None else _budget(budget), _orders(forecast)
    if scheduler is not None:
        loading.check_scheduler(scheduler)
    if (goal is None) == (target_error is None):
        raise DeepCacheError("calibrate needs either --budget or --target-error")
    files.check_writable(out)
    local = loading.check_model(model)
    prompts = prompt or loading.read_prompts(model)
    if not prompts:
        raise DeepCacheError(f"{model} suggests no prompts of its own: give some with --prompt, 16 or more")
    at = loading.pick_device(device)
    kind = loading.pick_dtype(None if dtype is None else dtype.value, at)
    given = {"guidance_scale": guidance_scale, "height": height, "width": width}
    console = Console(stderr=True)
    with loading.quiet(keep_download_bars=not local):
        pipe = load_pipeline(console, model, dtype=kind, device=at, variant=variant, scheduler=scheduler)
        remedy = "a smaller --batch-size or another --dtype"
        with progress_bar(console, time_stages=False) as progress, loading.one_line_errors(remedy):
            found = calibrate(
                pipe,
                tuple(prompts),
                budget=goal,
                target_error=target_error,
                steps=steps,
                seed=seed,
                forecast=orders,
                branch=chosen,
                deeper=deeper_branch,
                metric=metric.value,
                trials=trials,
                batch_size=batch_size,
                out=out,
                optimize_arguments={"backend": backend, "precision": precision},
                progress=progress,
                **{name: value for name, value in given.items() if value is not None},
            )
    output = Console()
    output.print(_table(found, model))
    output.print(f"schedule: {out}", markup=False, highlight=False, soft_wrap=True)


def _budget(text: str) -> float:
    """A number of full steps, or a share below 1."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint="--budget") from None


def _orders(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} lists no numbers, as 0,1,2 does", param_hint="--forecast") from None


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
