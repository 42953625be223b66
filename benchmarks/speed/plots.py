"""The plots of the speed report. Needs matplotlib: the extra "bench"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Result


def draw(title: str, rows: Sequence[Result], directory: Path) -> list[str]:
    """The plots of one group of rows, as PNG files in `directory`; returns their names."""
    measured = [row for row in rows if row.measured.loop is not None]
    if not measured:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    slug = re.sub(r"[^a-z0-9]+", "-", f"{title} {measured[0].environment['device_name']}".lower()).strip("-")
    names = []
    for kind, make in (("speedup", _speedup), ("steps", _steps)):
        figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
        if make(axes, measured):
            axes.set_title(title, fontsize=10)
            names.append(f"{slug}-{kind}.png")
            figure.savefig(directory / names[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return names


def _speedup(axes: Any, rows: Sequence[Result]) -> bool:
    """Speed-up of the loop over eager against the interval, and what MACs alone would give."""
    rows = [row for row in rows if row.derived.over_eager is not None and "-without-" not in row.case.arm]
    cached = [row for row in rows if "s" in row.measured.kinds]
    control = [row for row in rows if row.case.arm.endswith("-fewer-steps")]
    intervals = sorted({row.case.interval for row in cached})
    if len(intervals) < 2:
        return False
    bounds = {row.case.interval: row.derived.bound for row in cached}
    axes.plot(intervals, [bounds[n] for n in intervals], color="black", linestyle="--", label="MAC bound")
    for arm in dict.fromkeys(row.case.arm for row in [*cached, *control]):
        own = sorted((row for row in [*cached, *control] if row.case.arm == arm), key=lambda row: row.case.interval)
        style = ":" if arm.endswith("-fewer-steps") else "-"
        axes.plot([r.case.interval for r in own], [r.derived.over_eager for r in own], style, marker="o", label=arm)
    for row in rows:
        if row.case.interval == 1 and row.case.arm.startswith("compile"):
            axes.axhline(row.derived.over_eager, color="gray", linewidth=0.8)
            axes.annotate(row.case.arm, (intervals[0], row.derived.over_eager), fontsize=7, va="bottom")
    axes.set_xticks(intervals)
    axes.set_xlabel("interval N (1:N caching)")
    axes.set_ylabel("speed-up of the denoising loop over eager")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return True


def _steps(axes: Any, rows: Sequence[Result]) -> bool:
    """Median time of a full and a shallow UNet call by arm, with the 20 % and 80 % quantiles."""
    first: dict[str, Result] = {}
    for row in sorted(rows, key=lambda row: row.case.interval):
        if row.measured.full_step is not None and not row.case.arm.endswith("-fewer-steps"):
            first.setdefault(row.case.arm, row)
    arms = sorted(first, key=lambda arm: -first[arm].measured.full_step.median)  # type: ignore[union-attr]
    if not arms:
        return False
    for offset, label, color in ((-0.2, "full", "tab:blue"), (0.2, "shallow", "tab:orange")):
        for position, arm in enumerate(arms):
            time = getattr(first[arm].measured, f"{label}_step")
            if time is None:
                continue
            spread = [[(time.median - time.low) * 1e3], [(time.high - time.median) * 1e3]]
            axes.barh(position + offset, time.median * 1e3, 0.38, xerr=spread, color=color, label=label)
    work = first[arms[0]].work
    if work is not None:
        axes.axvline(work.floor_shallow * 1e3, color="tab:orange", linestyle=":", label="floor, shallow")
        axes.axvline(work.floor_full * 1e3, color="tab:blue", linestyle=":", label="floor, full")
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("one UNet call, ms (log scale)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=7)
    return True
