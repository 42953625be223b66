"""The command line: deepcache-fx compare, plan, draw and calibrate.

A wrong argument is one line on stderr and exit code 2; Ctrl-C is exit code 130 and leaves no half-written file.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deepcache_fx.cli import options as option
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.options import DEFAULT_FORECAST
from deepcache_fx.schedules.branch import Branch


class _OneLineErrors(TyperGroup):
    """A command group whose errors are one line each, for scripts and for people alike."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):  # which of these, or a returned 130, depends on typer's version
            code = 130
        except DeepCacheError as error:
            _complain(str(error))
            code = 2
        except Exception as error:
            if not hasattr(error, "format_message"):  # neither typer's nor click's: not a matter of arguments
                raise
            _complain(f"{error.format_message()} (--help tells more)")
            code = getattr(error, "exit_code", 2)
        if code == 130:
            _complain("interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    typer.echo("deepcache-fx: " + " ".join(message.split()), err=True)


main = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeepCache for diffusion UNets, as two static graphs.",
    epilog="A wrong argument is one line on stderr and exit code 2; Ctrl-C is exit code 130.",
)


class ScheduleName(str, enum.Enum):
    """The schedules that have a name on the command line."""

    uniform = "uniform"
    power = "power"


def _branch(text: str, option_name: str = "--branch") -> Branch:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 0:
        raise typer.BadParameter(
            f"{text!r} is neither a number of at least 0 nor block,layer as in 1,2", param_hint=option_name
        )
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


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


@main.command()
def compare(
    model: option.Pipeline,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Repeat it for more images. Otherwise: the model's prompts.json, or a landscape."),
    ] = None,
    interval: Annotated[int, typer.Option(min=1, help="1:N caching: every N-th step is full.")] = 3,
    branch: option.Branch = "0",
    schedule: Annotated[ScheduleName, typer.Option(help="Where the full steps lie.")] = ScheduleName.uniform,
    forecast: Annotated[
        int,
        typer.Option(min=0, max=2, help="Of the cached feature: 1 is linear, 2 quadratic; 0 repeats it, as for LCM."),
    ] = DEFAULT_FORECAST,
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
    guidance_scale: option.GuidanceScale = None,
    height: option.Pixels = None,
    width: option.Pixels = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each pipeline is timed.")] = 3,
    warmup: Annotated[bool, typer.Option(help="Run each once before it is timed.")] = True,
    out: Annotated[Path, typer.Option(help="The picture: baseline above, optimised below.")] = Path("output.png"),
    json: option.Json = None,
) -> None:
    """Run a text-to-image pipeline without and with caching: times, similarity, a picture of both."""
    from deepcache_fx.cli import compare as cli_compare
    from deepcache_fx.schedules.patterns import Power, Uniform

    uniform = schedule is ScheduleName.uniform
    cli_compare.compare_command(
        cli_compare.Request(
            model=model,
            refiner=refiner,
            prompts=tuple(prompt or ()),
            schedule=Uniform(interval) if uniform else Power(interval, power, center),
            branch=_branch(branch),
            forecast=forecast,
            backend=backend,
            scheduler=scheduler,
            steps=steps,
            seed=seed,
            dtype=dtype.value if dtype is not None else None,
            variant=variant,
            device=device,
            guidance_scale=guidance_scale,
            size={name: value for name, value in (("height", height), ("width", width)) if value is not None},
            repeats=repeats,
            warmup=warmup,
            out=out,
            json=json,
        )
    )


@main.command()
def plan(
    model: option.Model,
    height: Annotated[int | None, typer.Option(min=1, help="Of the picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the picture, in pixels.")] = None,
    batch: option.Batch = None,
    dtype: option.CacheDtype = option.DtypeName.float16,
    json: option.Json = None,
) -> None:
    """What each skip connection would save: arithmetic, cache size, speed-up bound. Needs no weights."""
    from deepcache_fx.cli.plan import plan_command

    plan_command(model, height=height, width=width, batch=batch, dtype=dtype.value, json=json)


@main.command()
def draw(
    model: option.Model,
    out: Annotated[Path, typer.Option(help="The picture, an SVG file.")] = Path("unet.svg"),
    branch: Annotated[str, typer.Option(help="The skip connection to cut at: its number, or block,layer.")] = "0",
    height: Annotated[int | None, typer.Option(min=1, help="Of the model's pictures, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the model's pictures, in pixels.")] = None,
    batch: option.Batch = None,
    dtype: option.CacheDtype = option.DtypeName.float16,
) -> None:
    """Draw the UNet as an SVG file: what runs at every step, what is cached, what each part costs. Needs no weights."""
    from deepcache_fx.cli.draw import draw_command

    where = _branch(branch)
    draw_command(model, out, branch=where, height=height, width=width, batch=batch, dtype=dtype.value)


class MetricName(str, enum.Enum):
    """What `calibrate` compares with the uncached run."""

    latents = "latents"
    images = "images"


@main.command()
def calibrate(
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
    guidance_scale: option.GuidanceScale = None,
    height: option.Pixels = None,
    width: option.Pixels = None,
) -> None:
    """Search for the full steps that bring a model's images closest to the uncached ones, at a given cost."""
    from deepcache_fx.cli.calibrate import CalibrationRequest, calibrate_command

    given = {"guidance_scale": guidance_scale, "height": height, "width": width}
    calibrate_command(
        CalibrationRequest(
            model=model,
            prompts=tuple(prompt or ()),
            budget=_budget(budget) if budget is not None else None,
            target_error=target_error,
            forecast=_orders(forecast),
            branch=_branch(branch),
            deeper=_branch(deeper, "--deeper") if deeper else None,
            metric=metric.value,
            trials=trials,
            batch_size=batch_size,
            backend=backend,
            scheduler=scheduler,
            steps=steps,
            seed=seed,
            dtype=dtype.value if dtype is not None else None,
            variant=variant,
            device=device,
            call_arguments={name: value for name, value in given.items() if value is not None},
            out=out,
        )
    )
