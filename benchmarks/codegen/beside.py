"""The modelled time of every kernel beside the measured one: `python -m benchmarks.codegen.beside CODEGEN PROFILE`.

CODEGEN is a file of `python -m benchmarks.codegen --json`, PROFILE one of `python -m benchmarks.speed.profile --json`
of the same model and step. Kernels that Inductor wrote are matched by name; the number at the end of one counts kernels
of a graph, and may differ where versions do. What libraries are called for is compared by kind.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.codegen.results import Step, read
from benchmarks.speed.profile import category

_KINDS = {"convolution": "conv", "matrix product": "mm", "attention": "attention"}


_OWN = ("whole_groups", "statistics", "normalize")
"""Kernels of `passes.kernels`."""


@dataclass(frozen=True)
class Pair:
    """Seconds of all launches of one name in a step; None where a side has none of it."""

    name: str
    modelled: float | None
    measured: float | None


def pairs(step: Step, kernels: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The longest first."""
    modelled: dict[str, float] = defaultdict(float)
    measured: dict[str, float] = defaultdict(float)
    for launch in step.launches:
        modelled[_plain(launch.name) if launch.kind == "triton" else launch.kind] += launch.floor(step.device)
    for kernel in kernels:
        name = str(kernel["name"])
        kind = "own" if name in _OWN else _KINDS.get(category(name), category(name))
        measured[_plain(name) if name.startswith("triton_") else kind] += float(kernel["seconds"])
    found = [Pair(name, modelled.get(name), measured.get(name)) for name in {**modelled, **measured}]
    return sorted(found, key=lambda pair: -max(pair.modelled or 0.0, pair.measured or 0.0))


def _plain(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def main(
    modelled: Annotated[Path, typer.Argument(help="Of benchmarks.codegen.")],
    measured: Annotated[Path, typer.Argument(help="Of benchmarks.speed.profile.")],
) -> None:
    """Print the modelled and the measured time of every kernel of a step."""
    profile = json.loads(measured.read_text())
    step = next((one for one in read(modelled) if one.step == profile["step"]), None)
    if step is None:
        raise typer.BadParameter(f"{modelled.name} has no {profile['step']} step")
    table = Table("kernel", "modelled us", "measured us", title=f"{step.model}, {step.step} step, {step.device.name}")
    for pair in pairs(step, profile["calls"]["kernels"]):
        cells = ("-" if value is None else f"{value * 1e6:.1f}" for value in (pair.modelled, pair.measured))
        table.add_row(pair.name, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
