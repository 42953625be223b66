"""What it costs the host to see that a model's settings are as they were when its graphs were captured.

    python -m benchmarks.settings_check [--model sd15,sdxl] [--json OUT]

Three looks at one UNet: `call`, at its settings, as at every call; `run`, at all that a graph depends on, as at the
start of a run; and `read`, everything read again, as after a change. Each is repeated at once, and then with the
processor's caches emptied before it, as other work of the host may leave them. The UNet has no weights: none of this
looks at their values. The time is the processor's. A look waits for nothing: on an idle machine that is the time by the
clock; on a busy one it leaves out what others take, not that they empty the caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from benchmarks.speed.cases import Quantiles
from benchmarks.speed.subjects import find_preset
from deepcache_fx.files.writing import write_json
from deepcache_fx.guards.fingerprint import Fingerprint

CACHES = 2**28
"""Bytes, more than a processor keeps."""


@dataclass(frozen=True)
class Look:
    """Seconds of one look."""

    fastest: float
    repeated: Quantiles
    cold: Quantiles
    """With nothing of the model in the processor's caches."""


@dataclass(frozen=True)
class Row:
    """One model, and what each look at it takes."""

    model: str
    modules: int
    attributes: int
    """Instance attributes of all modules."""
    call: Look
    run: Look
    read: Look


def measure(model: str, rounds: int) -> Row:
    """Look `rounds` times in each way at the UNet of a preset."""
    unet, kept = find_preset(model).build(), Fingerprint()
    kept.read(unet)
    modules = list(unet.modules())
    return Row(
        model,
        len(modules),
        attributes=sum(len(vars(module)) for module in modules),
        call=_look(lambda: kept.known(unet, at_run_start=False), rounds),
        run=_look(lambda: kept.known(unet, at_run_start=True), rounds),
        read=_look(lambda: Fingerprint().read(unet).structure, rounds),
    )


def _look(function: Callable[[], object], rounds: int) -> Look:
    repeated = [_seconds(function) for _ in range(rounds)]
    other = np.zeros(CACHES, np.uint8)
    cold = []
    for _ in range(-(-rounds // 10)):
        other += 1
        cold.append(_seconds(function))
    quantiles = Quantiles.of(repeated), Quantiles.of(cold)
    assert quantiles[0] is not None
    assert quantiles[1] is not None
    return Look(min(repeated), *quantiles)


def _seconds(function: Callable[[], object]) -> float:
    started = time.thread_time()
    found = function()
    seconds = time.thread_time() - started
    assert found is not None, "the model has changed"
    return seconds


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table of the rows."""
    table = Table("model", "look", "ms, fastest", "median (20-80 %)", "cold")
    for row in rows:
        for look in ("call", "run", "read"):
            found = getattr(row, look)
            times = f"{found.fastest * 1e3:.3g}", _milliseconds(found.repeated), _milliseconds(found.cold)
            table.add_row(row.model, look, *times)
    console.print(table)


def _milliseconds(time: Quantiles) -> str:
    return f"{time.median * 1e3:.3g} ({time.low * 1e3:.3g}-{time.high * 1e3:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15,sdxl", help="presets, separated by commas")
    parser.add_argument("--rounds", type=int, default=300, help="a tenth of them with cold caches")
    parser.add_argument("--json", type=Path, default=RESULTS / "settings-check-cpu.json", help="where the rows go")
    options = parser.parse_args()
    facts = environment("cpu")
    rows = [measure(model, options.rounds) for model in options.model.split(",")]
    show(rows, Console())
    write_json(options.json, {"environment": facts, "models": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
