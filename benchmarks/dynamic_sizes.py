"""What one capture for many sizes costs: full and shallow steps, and captures, against one capture for each size.

    python -m benchmarks.dynamic_sizes [--model tiny] [--backend eager] [--size 8x8 --size 8x12] [--json OUT]

Two copies of a model with the same weights, one with `dynamic=True`, make the same steps in turn at every size. Ratios
are of times measured side by side, dynamic by static; above 1 the symbols cost.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import deepcache_fx
from benchmarks.environment import RESULTS, environment
from benchmarks.speed.cases import Quantiles
from benchmarks.speed.subjects import find_preset
from deepcache_fx.files.writing import write_json

INTERVAL = 2


@dataclass(frozen=True)
class Row:
    """One size of one model."""

    model: str
    backend: str
    size: str
    first_static: float
    first_dynamic: float
    """Seconds of the first full step at this size, with all that is made for it."""
    full: Quantiles
    shallow: Quantiles
    """Ratios of steps, dynamic by static."""
    error: float
    """The largest relative L2 difference of the two."""


@torch.no_grad()
def measure(model: str, backend: str, sizes: list[tuple[int, int]], rounds: int) -> list[Row]:
    """Every size, in order: the first one pays for the dynamic capture."""
    preset = find_preset(model)
    static = preset.build().eval()
    arms = {"static": static, "dynamic": copy.deepcopy(static)}
    for name, unet in arms.items():
        deepcache_fx.optimize(unet, interval=INTERVAL, backend=backend, dynamic=name == "dynamic", max_captures=64)
    rows = []
    for height, width in sizes:
        inputs: dict[str, Any] = preset.inputs(static, batch=preset.batch, height=height, width=width)
        times: dict[str, list[float]] = {"static": [], "dynamic": []}
        outputs: dict[str, list[torch.Tensor]] = {"static": [], "dynamic": []}
        for step in range(2 * rounds + 2):
            timestep = torch.tensor(900 - step)
            for name in sorted(arms, reverse=step // 2 % 2 == 0):
                started = time.perf_counter()
                outputs[name].append(arms[name](**{**inputs, "timestep": timestep}, return_dict=False)[0])
                times[name].append(time.perf_counter() - started)
        ratios = [mine / other for mine, other in zip(times["dynamic"], times["static"], strict=True)]
        differences = zip(outputs["dynamic"], outputs["static"], strict=True)
        full, shallow = Quantiles.of(ratios[2::2]), Quantiles.of(ratios[3::2])
        assert full is not None
        assert shallow is not None
        error = max(float((mine - other).norm() / other.norm()) for mine, other in differences)
        first = times["static"][0], times["dynamic"][0]
        rows.append(Row(model, backend, f"{height}x{width}", *first, full, shallow, error))
        for unet in arms.values():
            deepcache_fx.reset(unet)
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Print a table of the rows."""
    table = Table("model", "backend", "size", "first step, s", "full, ratio (20-80 %)", "shallow, ratio", "error")
    for row in rows:
        first = f"{row.first_static:.2f} static, {row.first_dynamic:.2f} dynamic"
        ratios = (f"{each.median:.3f} ({each.low:.3f}-{each.high:.3f})" for each in (row.full, row.shallow))
        table.add_row(row.model, row.backend, row.size, first, *ratios, f"{row.error:.1e}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--size", action="append", help="of the latents, height x width", default=None)
    parser.add_argument("--rounds", type=int, default=20, help="full and shallow steps of each arm at each size")
    parser.add_argument("--json", type=Path, default=RESULTS / "dynamic-sizes-cpu.json", help="where the rows go")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.size or ["8x8", "8x12", "16x8", "9x12"]]
    facts = environment("cpu")
    rows = measure(options.model, options.backend, [(height, width) for height, width in sizes], options.rounds)
    show(rows, Console(width=140))
    write_json(options.json, {"environment": facts, "rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
