"""Speed of every way to run a UNet: `python -m benchmarks.speed --model sd15 --arms all --json results.json`."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from benchmarks.speed.arms import Arm, all_arms
from benchmarks.speed.cases import Case, Quantiles, Result
from benchmarks.speed.runner import Group, Note
from benchmarks.speed.setup import Settings
from benchmarks.speed.store import ResultsFile
from benchmarks.speed.subjects import DTYPES, KINDS, find_preset

CPU_ARMS = (
    "eager,ours-eager,helper,*openvino*,eager-bf16,helper-bf16,eager-fewer-steps,eager-channels-last,ours-forecast,"
    "ours-without-*"
)
"""Without Inductor: for this model on a CPU that alone takes many minutes (--arms all has it)."""

GPU_MODELS = "sd15,sd21,sdxl,svd,ldm4-imagenet,ddpm-church"

MAIN_INTERVAL = 3
"""Where an arm is measured at one interval alone, if it is among those asked for."""


@dataclass(frozen=True)
class Sensible:
    """What is measured where the command line says nothing."""

    models: str
    arms: str
    latent: str
    dtype: str
    steps: int
    intervals: str
    settings: Settings


def sensible(device: torch.device) -> Sensible:
    """CPU: one model, scaled down, a quarter of an hour on two cores. GPU: every model, ten minutes each."""
    if device.type == "cuda":
        settings = Settings(rounds=7, minutes=10, pipeline_rounds=3, end_to_end_rounds=1, warm=True)
        return Sensible(GPU_MODELS, "all", "published", "bf16", 50, "2,3,5,10", settings)
    settings = Settings(rounds=3, minutes=14, pipeline_rounds=1, end_to_end_rounds=0)
    return Sensible("sd15", CPU_ARMS, "32", "fp32", 6, "2,3,6", settings)


def quiet() -> None:
    """Keep libraries from talking into the progress bar: about models that nobody will use the output of."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def select_arms(text: str, known: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms of a comma-separated list ("all": every one; * stands for anything), in the order they are set up in.

    Raises:
        typer.BadParameter: there is no such arm; lists those there are.
    """
    patterns = ["*"] if text == "all" else [part.strip() for part in text.split(",")]
    unknown = [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]
    if unknown:
        raise typer.BadParameter(f"no such arm: {', '.join(unknown)}; there are: {', '.join(known)}")
    return {name: arm for name, arm in known.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


def expand(case: Case, arms: Mapping[str, Arm], intervals: Sequence[int]) -> Iterator[Case]:
    """The cases of one group: an arm that caches nothing has interval 1 alone, the others all that apply to them."""
    main_interval = MAIN_INTERVAL if MAIN_INTERVAL in intervals else intervals[0]
    for name, arm in arms.items():
        own = [main_interval] if arm.one_interval else intervals
        for interval in own if arm.caches else [1]:
            yield replace(case, arm=name, interval=interval)


def latent_size(text: str, model: str) -> tuple[int, int]:
    """(height, width) of "32", "72x128" or "published"."""
    if text == "published":
        preset = find_preset(model)
        return preset.height, preset.width
    try:
        height, _, width = text.partition("x")
        return int(height), int(width or height)
    except ValueError:
        raise typer.BadParameter(f"--latent takes 64, 72x128 or published, got {text!r}") from None


def names(text: str, known: Collection[str], what: str) -> list[str]:
    """The names of a comma-separated list.

    Raises:
        typer.BadParameter: one of them is unknown; lists those there are.
    """
    result = [part.strip() for part in text.split(",")]
    for name in result:
        if name not in known:
            raise typer.BadParameter(f"no such {what}: {name}; there are: {', '.join(known)}")
    return result


def numbers(text: str) -> list[int]:
    """The integers of a comma-separated list, each at least 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"takes integers separated by commas, got {text!r}") from None
    if min(values) < 1:
        raise typer.BadParameter(f"takes integers of at least 1, got {text!r}")
    return values


def run_cases(
    cases: Sequence[Case],
    arms: Mapping[str, Arm],
    settings: Settings,
    store: ResultsFile,
    facts: dict[str, Any],
    note: Note = lambda text: None,
) -> list[Result]:
    """Measure what the file does not yet hold of one group, and return the rows of all of it."""
    commit = str(facts["commit"])
    missing = [case for case in cases if not store.done(case, commit)]
    if missing:
        Group(arms, settings, facts, store.put).run(missing, note)
    return [store.rows[case.key, commit] for case in cases if (case.key, commit) in store.rows]


def table(rows: list[Result]) -> Table:
    """A short summary for the terminal."""
    first = rows[0].case
    title = (
        f"{first.model} {first.height}x{first.width}, batch {first.batch}, {first.dtype}, {first.device}, "
        f"{first.steps} steps, branch {first.branch}"
    )
    result = Table(title=title)
    for heading in ("arm", "1:N", "full ms", "shallow ms", "loop s", "x eager", "bound", "kernels", "error"):
        result.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for row in rows:
        case, m, d = row.case, row.measured, row.derived
        if m.loop is None:
            continue
        result.add_row(
            case.arm,
            str(case.interval),
            _milliseconds(m.full_step),
            _milliseconds(m.shallow_step),
            _number(m.loop.median, 3),
            _number(d.over_eager, 2),
            _number(d.bound, 2),
            f"{m.kernels_full or '-'}/{m.kernels_shallow or '-'}",
            "-" if m.error is None else f"{m.error:.1e}",
        )
    return result


def _milliseconds(time: Quantiles | None) -> str:
    return "-" if time is None else f"{time.median * 1e3:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main(
    model: Annotated[str, typer.Option(help=f"One or several of {', '.join(KINDS)}, separated by commas.")] = "",
    arms: Annotated[str, typer.Option(help="all, or names with or without *, separated by commas.")] = "",
    batch: Annotated[str, typer.Option(help="Images at a time; several separated by commas.")] = "1",
    latent: Annotated[str, typer.Option(help="Latent size: 64, 72x128 or published.")] = "",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; several separated by commas.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "",
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    interval: Annotated[str, typer.Option(help="1:N caching; several separated by commas.")] = "",
    branch: Annotated[int, typer.Option(min=0, help="Skip connection, 0 is the shallowest.")] = 0,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of all arms in turn.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Time for each model and size.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Rounds that end with the VAE's decoder.")] = None,
    warm: Annotated[bool | None, typer.Option(help="Compile a second time, with warm caches.")] = None,
    backend: Annotated[str, typer.Option(help="torch.compile's, wherever an arm compiles.")] = "inductor",
    json: Annotated[Path | None, typer.Option(help="The results file; one that exists is resumed.")] = None,
) -> None:
    """Measure, in one run and in turn, what a user could run instead, and keep every row."""
    quiet()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = sensible(where)
    known = all_arms(backend)
    chosen = select_arms(arms or default.arms, known)
    intervals = numbers(interval or default.intervals)
    size = latent or default.latent
    groups = [
        Case(name, *latent_size(size, name), count, kind, str(where), steps or default.steps, 1, branch, "eager")
        for name in names(model or default.models, KINDS, "model")
        for kind in names(dtype or default.dtype, DTYPES, "dtype")
        for count in numbers(batch)
    ]
    base = default.settings
    settings = replace(
        base,
        rounds=rounds or base.rounds,
        minutes=base.minutes if minutes is None else minutes,
        end_to_end_rounds=base.end_to_end_rounds if decode is None else decode,
        warm=base.warm if warm is None else warm,
        backend=backend,
    )
    facts = environment(str(where))
    slug = "cpu" if where.type == "cpu" else facts["device_name"].lower().replace(" ", "-")
    store = ResultsFile(json or RESULTS / f"speed-{slug}.json")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width of its own
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(groups))
        for group in groups:

            def note(text: str, group: Case = group) -> None:
                progress.update(task, description=f"{group.model} {group.dtype} batch {group.batch}: {text}")

            rows = run_cases(list(expand(group, chosen, intervals)), known, settings, store, facts, note)
            console.print(table(rows))
            for row in rows:
                if row.measured.loop is None:
                    console.print(f"{row.case.arm} 1:{row.case.interval} {row.status}: {row.reason}", soft_wrap=True)
            progress.advance(task)
    console.print(f"rows are in {store.path.name}")


if __name__ == "__main__":
    typer.run(main)
