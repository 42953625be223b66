"""Fidelity of every way to cache: `python -m benchmarks.fidelity --model t2i --images 200`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import RESULTS, ROOT, environment
from benchmarks.fidelity.arms import all_arms, select
from benchmarks.fidelity.cases import Case, RowsFile
from benchmarks.fidelity.judges import CLIP, fashion_judge, hub_judge
from benchmarks.fidelity.metrics import load_lpips
from benchmarks.fidelity.models import DIRECTORIES, load_model
from benchmarks.fidelity.report import write_report
from benchmarks.fidelity.samplers import SAMPLERS, title
from benchmarks.fidelity.sweep import Sweep, groups
from benchmarks.speed.__main__ import names, numbers, quiet
from deepcache_fx.errors import DeepCacheError


@dataclass(frozen=True)
class Sensible:
    """What is run where the command line says nothing."""

    images: int
    batch: int
    samplers: str
    steps: str
    intervals: str


def sensible(device: torch.device, embedded: bool) -> Sensible:
    """CPU: one sampler, 100 images, about half an hour a model on two cores. GPU: everything.

    100 images are enough for the paired scores. FID and recall depend on the number of images and want 2,000 at least:
    compare them between rows of one table only.
    """
    if device.type == "cuda":
        return Sensible(
            10_000 if embedded else 5_000, 500 if embedded else 16, ",".join(SAMPLERS), "20,50,100", "2,3,5,8,10,20"
        )
    return Sensible(100 if embedded else 4, 50 if embedded else 1, "ddim", "50", "2,3,5,10")


def table(file: RowsFile, cases: list[Case]) -> Table:
    """A short summary of one group for the terminal."""
    group = cases[0]
    result = Table(title=f"{group.model}, {title(group.sampler)} {group.steps} steps, {group.images} images")
    for heading in ("arm", "1:N", "MACs", "time", "PSNR", "SSIM", "FID", "agreement", "CLIP"):
        result.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for case in cases:
        row = file.rows.get(case.key)
        if row is None or row.outcome is None:
            continue
        found, s = row.outcome, row.scores
        result.add_row(
            case.arm,
            str(case.interval),
            f"{found.macs_share:.1%}",
            "-" if found.time_share is None else f"{found.time_share:.1%}",
            *("-" if value is None else format(value, form) for value, form in (
                (s.psnr, ".1f"), (s.ssim, ".3f"), (s.fid, ".2f"), (s.agreement, ".1%"), (s.clip_score, ".2f"))),
        )  # fmt: skip
    return result


@dataclass(frozen=True)
class Request:
    """What the command line asks for; empty is what is sensible."""

    prompts: Path | None
    reference: Path | None
    clip: str
    images: int | None
    batch: int | None
    samplers: str
    steps: str
    intervals: str
    arms: str
    branch: int
    seed: int
    device: str | None
    json: Path | None
    fresh: bool
    work: Path

    def run(self, name: str, console: Console) -> None:
        """Sweep one model.

        Raises:
            DeepCacheError: the model, or what judges it, cannot be had.
            FileNotFoundError: the data set is not installed.
        """
        model = load_model(name, device=self.device, prompts=self.prompts)
        embedded = name in DIRECTORIES
        default = sensible(model.device, embedded)
        known = all_arms()
        usual = [name for name, arm in known.items() if arm.usual]
        chosen = usual if self.arms == "all" else names(self.arms, known, "arm")
        judge = fashion_judge(model) if embedded else hub_judge(model, self.clip, self.reference)
        lpips, why = load_lpips(model.device)
        if why:
            judge = replace(judge, notes=(*judge.notes, why))
        facts = {**environment(str(model.device)), "judge": judge.about}
        slug = "cpu" if model.device.type == "cpu" else facts["device_name"].lower().replace(" ", "-")
        file = RowsFile(self.json or RESULTS / f"fidelity-{model.name}-{slug}.json")
        base = Case(
            model.name, model.fingerprint(), "ddim", 50, self.images or default.images, self.seed, self.branch,
            model.dtype, str(model.device), "uncached", 1,
        )  # fmt: skip
        wanted = [
            list(select(chosen, numbers(self.intervals or default.intervals), group, known))
            for group in groups(
                base,
                names(self.samplers or default.samplers, SAMPLERS, "sampler"),
                numbers(self.steps or default.steps),
            )
        ]
        if self.fresh:
            file.forget(case for cases in wanted for case in cases)
        sweep = Sweep(model, judge, known, file, facts, self.batch or default.batch, self.work, lpips)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=sum(case.images for cases in wanted for case in sweep.missing(cases)))
            finished = 0

            def advance(case: Case, done: int) -> None:
                nonlocal finished
                text = f"{case.model} {case.sampler} {case.steps} {case.arm} 1:{case.interval}"
                progress.update(task, description=text, completed=finished + done)
                finished += case.images if done == case.images else 0

            sweep.advance = advance
            sweep.run(*wanted)
            for cases in wanted:
                console.print(table(file, cases))
                for row in (file.rows[case.key] for case in cases):
                    if row.outcome is None:
                        text = f"{row.case.arm} 1:{row.case.interval} {row.status}: {row.reason}"
                        console.print(text, soft_wrap=True)
        console.print(f"rows are in {file.path.name}")


def main(
    model: Annotated[
        str, typer.Option(help="t2i, ddpm (both: t2i,ddpm), or a pipeline's directory or Hub id.")
    ] = "t2i",
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line, for a model that brings none.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Real images, for the FID of other models.")] = None,
    clip: Annotated[str, typer.Option(help="The CLIP model for other models: directory or Hub id.")] = CLIP,
    images: Annotated[int | None, typer.Option(min=1, help="Of every case; FID wants 2,000.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at a time, at most.")] = None,
    samplers: Annotated[str, typer.Option(help=f"Of {', '.join(SAMPLERS)}; several separated by commas.")] = "",
    steps: Annotated[str, typer.Option(help="Denoising steps; several separated by commas.")] = "",
    intervals: Annotated[str, typer.Option(help="1:N caching; several separated by commas.")] = "",
    arms: Annotated[str, typer.Option(help=f"all, or of {', '.join(all_arms())}.")] = "all",
    branch: Annotated[int, typer.Option(min=0, help="Skip connection, 0 is the shallowest.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the first image.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    json: Annotated[Path | None, typer.Option(help="The results file; one that exists is resumed.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure also what the results file has.")] = False,
    work: Annotated[Path, typer.Option(help="Where uncached images are kept for a resumed run.")] = ROOT
    / "build/fidelity",
    report: Annotated[bool, typer.Option("--report", help="Only write docs/fidelity.md and its plots anew.")] = False,
) -> None:
    """Make the same images in every way, score them against the uncached ones and the data, and keep every row."""
    quiet()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width of its own
    try:
        if report:
            console.print(f"{write_report(RESULTS, ROOT / 'docs')} rows: docs/fidelity.md")
            return
        request = Request(
            prompts, reference, clip, images, batch, samplers, steps, intervals, arms, branch, seed, device, json,
            fresh, work,
        )  # fmt: skip
        for name in model.split(","):
            request.run(name.strip(), console)
    except (DeepCacheError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
