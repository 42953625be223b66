"""The plots of the fidelity report, and the sheet of images. Needs matplotlib: the extra "bench"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from benchmarks.fidelity.arms import all_arms
from benchmarks.fidelity.cases import Row
from benchmarks.fidelity.sweep import strip_path
from benchmarks.fidelity.targets import psnr

Value = Callable[[Row], "float | None"]


def error(row: Row) -> float | None:
    """Root mean square of the difference to the uncached images, of pixels in [0, 1]; None where there is none."""
    value = psnr(row)
    return None if value is None or math.isinf(value) else 10 ** (-value / 20)


def macs(row: Row) -> float | None:
    return row.outcome.macs_share if row.outcome is not None else None


def time(row: Row) -> float | None:
    return row.outcome.time_share if row.outcome is not None else None


def fid(row: Row) -> float | None:
    return row.scores.fid


COSTS: tuple[tuple[str, Value], ...] = (
    ("multiply-accumulates, share of the uncached run", macs),
    ("measured time of the UNet, share of the uncached run", time),
)
ERRORS: tuple[tuple[str, Value, bool], ...] = (
    ("RMS error to the uncached images", error, True),
    ("FID (see the text)", fid, False),
)


class Point(NamedTuple):
    """Of a curve."""

    cost: float
    value: float
    interval: int


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, error) those that no other beats in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((cost, value))
    return front


def draw(title: str, rows: Sequence[Row], path: Path) -> bool:
    """Error against cost, one curve an arm, and the Pareto front. False, and no file, where there is nothing to see."""
    plots = [item for item in ERRORS if any(_points(rows, macs, item[1]).values())]
    if not any(len(points) > 1 for points in _points(rows, macs, error).values()):
        return False
    plt = _pyplot()
    figure, grid = plt.subplots(
        len(plots), len(COSTS), figsize=(6.0 * len(COSTS), 4.2 * len(plots)), layout="constrained", squeeze=False,
        sharey="row", sharex=True,
    )  # fmt: skip
    for line, (label, value, logarithmic) in zip(grid, plots, strict=True):
        for axes, (cost_label, cost) in zip(line, COSTS, strict=True):
            _panel(axes, _points(rows, cost, value), cost_label, marks=logarithmic)
        line[0].set_ylabel(label)
        if logarithmic:
            line[0].set_yscale("log")
    grid[0][0].set_xlim(0, 1.04)
    grid[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return True


def _panel(axes: Any, found: Mapping[str, Sequence[Point]], cost_label: str, marks: bool) -> None:
    """One curve an arm, the intervals beside the points, and the Pareto front behind."""
    if not marks:  # beside the negative control, on a linear scale, all others would look the same
        found = {arm: points for arm, points in found.items() if arm != "zeroed"}
    for arm, points in found.items():
        points = sorted(points)
        axes.plot(
            [p.cost for p in points],
            [p.value for p in points],
            {"fewer-steps": ":", "zeroed": "--"}.get(arm, "-"),
            marker="*" if arm == "uncached" else "o",
            markersize=5,
            color=f"C{list(all_arms()).index(arm)}" if arm in all_arms() else None,
            label=arm,
        )
        for point in points:
            text = arm if arm == "uncached" else str(point.interval)
            where = (point.cost, point.value)
            axes.annotate(text, where, fontsize=6, textcoords="offset points", xytext=(3, 3))
    front = pareto([(p.cost, p.value) for arm, points in found.items() if arm != "zeroed" for p in points])
    style: dict[str, Any] = dict(where="post", color="black", alpha=0.25, linewidth=3, zorder=0)
    axes.step(*zip(*front, strict=True), label="Pareto front", **style)
    axes.set_xlabel(cost_label)
    axes.grid(alpha=0.3)


def _points(rows: Sequence[Row], cost: Value, value: Value) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for row in rows:
        x, y = cost(row), value(row)
        if x is not None and y is not None:
            found.setdefault(row.case.arm, []).append(Point(x, y, row.case.interval))
    return found


def sheet(rows: Sequence[Row], work: Path, path: Path) -> bool:
    """One sheet of images: a row for every arm and interval, a column for every seed.

    False, and no file, where not all of the images are on disk: they are made by the run that makes the rows.
    """
    rows = [row for row in rows if row.outcome is not None]
    if len(rows) < 2 or not all(strip_path(work, row.case).exists() for row in rows):
        return False
    strips = [load_file(strip_path(work, row.case))["images"].float() for row in rows]
    plt = _pyplot()
    count = min(map(len, strips))
    figure, grid = plt.subplots(len(rows), 1, figsize=(1.6 + 0.5 * count, 0.52 * len(rows)), squeeze=False)
    for axes, row, strip in zip(grid.flat, rows, strips, strict=True):
        pixels = strip[:count].permute(0, 2, 3, 1)  # (count, height, width, channels)
        line = pixels.permute(1, 0, 2, 3).flatten(1, 2).numpy()
        axes.imshow(line.squeeze(-1) if line.shape[-1] == 1 else line, cmap="gray", vmin=0, vmax=1)
        label = row.case.arm if row.case.interval == 1 else f"{row.case.arm} 1:{row.case.interval}"
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.subplots_adjust(left=1.4 / (1.6 + 0.5 * count), right=0.99, top=0.995, bottom=0.005, hspace=0.05)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
