"""The plots of the fidelity report. Needs matplotlib: the extra "bench"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fidelity.arms import all_arms
from benchmarks.fidelity.cases import Row
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


COSTS: tuple[tuple[str, Value], ...] = (
    ("multiply-accumulates, share of the uncached run", macs),
    ("measured time of the UNet, share of the uncached run", time),
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
    if not any(len(points) > 1 for points in _points(rows, macs).values()):
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, line = plt.subplots(
        1, len(COSTS), figsize=(6.0 * len(COSTS), 4.2), layout="constrained", sharey=True, sharex=True
    )
    for axes, (label, cost) in zip(line, COSTS, strict=True):
        _panel(axes, _points(rows, cost), label)
    line[0].set_ylabel("RMS error to the uncached images")
    line[0].set_yscale("log")
    line[0].set_xlim(0, 1.04)
    line[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return True


def _panel(axes: Any, found: Mapping[str, Sequence[Point]], cost_label: str) -> None:
    """One curve an arm, the intervals beside the points, and the Pareto front behind."""
    for arm, points in found.items():
        points = sorted(points)
        axes.plot(
            [p.cost for p in points],
            [p.value for p in points],
            {"fewer-steps": ":", "zeroed": "--"}.get(arm, "-"),
            marker="o",
            markersize=5,
            color=f"C{list(all_arms()).index(arm)}" if arm in all_arms() else None,
            label=arm,
        )
        for point in points:
            where = (point.cost, point.value)
            axes.annotate(str(point.interval), where, fontsize=6, textcoords="offset points", xytext=(3, 3))
    front = pareto([(p.cost, p.value) for arm, points in found.items() if arm != "zeroed" for p in points])
    style: dict[str, Any] = dict(where="post", color="black", alpha=0.25, linewidth=3, zorder=0)
    axes.step(*zip(*front, strict=True), label="Pareto front", **style)
    axes.set_xlabel(cost_label)
    axes.grid(alpha=0.3)


def _points(rows: Sequence[Row], cost: Value) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for row in rows:
        x, y = cost(row), error(row)
        if x is not None and y is not None:
            found.setdefault(row.case.arm, []).append(Point(x, y, row.case.interval))
    return found
