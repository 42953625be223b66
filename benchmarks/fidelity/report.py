"""docs/fidelity.md, one page, and a plot a model, from the rows under benchmarks/results alone."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.fidelity.arms import all_arms
from benchmarks.fidelity.cases import Case, Row, is_rows_file, read_rows
from benchmarks.fidelity.orders import ABOUT_ORDERS, INTERVALS, each_kind
from benchmarks.fidelity.plots import draw
from benchmarks.fidelity.samplers import SAMPLERS, title
from benchmarks.fidelity.targets import CONTROL, OURS, PUBLISHED, find, psnr, targets
from deepcache_fx.errors import DeepCacheError

COMMAND = "python -m benchmarks.fidelity --report"

INTRODUCTION = f"""\
How close images made with a cache are to those made without one. `{COMMAND}` writes this page
and its plots from the JSON files in `benchmarks/results`. These hold every row: each arm at each interval with its
calls, multiply-accumulates (MACs), measured time, PSNR, SSIM, FID, precision, recall and the agreement of a classifier.

## Method

- Two small models trained on Fashion-MNIST, which lie in the repository: *ddpm*, a class-conditional DDPM, and *t2i*, a
  text-to-image pipeline. Larger models have not been measured.
- An *arm* is a way to make the images. All arms start from the same noise; image i has prompt i (in turn) and a seed of
  its own. 1:N is the interval: every N-th step is full, the others are shallow.
- PSNR compares with the uncached images of the same seeds, over all pixels together, in dB. A few images that come out
  as others decide it.
- *fewer-steps* is the control: no cache, and as many steps as cost the MACs of uniform 1:N. *zeroed* is the negative
  control: a cache that holds zeros.

```
.venv/bin/python -m benchmarks.fidelity --model t2i,ddpm --samplers ddim,euler --steps 20,50 --images 32
.venv/bin/{COMMAND}
```

A run that was interrupted goes on from its file. `--model` also takes a pipeline's directory or Hub id."""

ABOUT_SUMMARY = """\
PSNR of *forecast-1* in dB. In brackets: how many dB closer to the uncached images that is than *repeat* and than
*fewer-steps*. Where a sampler draws noise at its steps, fewer of them draw other noise: there *fewer-steps* comes out
as other images, and is no control."""

ABOUT_TARGETS = f"""\
What the arms were meant to reach, and in how many of the rows above they did (groups of one model, sampler and number
of steps). *{PUBLISHED}* is published DeepCache; slower and closer mean the measured time and the PSNR."""


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))


def grouped(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """Rows whose images may be compared, in the order of arms and intervals; groups by model, sampler, steps."""
    order = list(all_arms())
    groups: defaultdict[Case, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.case.group].append(row)

    def place(row: Row) -> tuple[int, int]:
        return (order.index(row.case.arm) if row.case.arm in order else len(order), row.case.interval)

    samplers = list(SAMPLERS)

    def rank(group: Case) -> tuple[str, int, int, int]:
        known = group.sampler in samplers
        return group.model, samplers.index(group.sampler) if known else len(samplers), group.steps, -group.images

    return {group: sorted(groups[group], key=place) for group in sorted(groups, key=rank)}


def heading(group: Case) -> str:
    sampler = title(group.sampler)
    return f"{group.model}, {sampler} {group.steps} steps, {group.images} images, branch {group.branch}"


def summary(groups: Mapping[Case, Sequence[Row]]) -> str:
    """Of all groups in one table: how much closer a linear forecast is than repeating and than fewer steps."""
    lines = []
    for group, rows in groups.items():
        cells = []
        for interval in INTERVALS:
            ours, *others = (psnr(find(rows, arm, interval)) for arm in ("forecast-1", PUBLISHED, CONTROL))
            gains = ", ".join("-" if one is None or ours is None else f"{ours - one:+.1f}" for one in others)
            cells.append("" if ours is None else f"{ours:.1f} ({gains})")
        if any(cells):
            lines.append((group.model, title(group.sampler), str(group.steps), str(group.images), *cells))
    head = ("model", "sampler", "steps", "images", *(f"N={interval}" for interval in INTERVALS))
    return markdown(head, lines)


def targets_met(groups: Mapping[Case, Sequence[Row]]) -> str:
    """A line a target, a column an arm: in how many groups it was met."""
    reached = [target for rows in groups.values() for target in targets(rows)]
    of = Counter((target.wanted, target.arm) for target in reached)
    met = Counter((target.wanted, target.arm) for target in reached if target.met)
    arms = [arm for arm in reversed(OURS) if any(arm == target.arm for target in reached)]
    lines = [
        (wanted, *(f"{met[wanted, arm]} of {of[wanted, arm]}" if of[wanted, arm] else "" for arm in arms))
        for wanted in dict.fromkeys(target.wanted for target in reached)
    ]
    total = f"{sum(met.values())} of {len(reached)} targets were met, {len(reached) - sum(met.values())} missed."
    return "\n\n".join([total, markdown(("target", *arms), lines)])


def left_out(rows: Sequence[Row]) -> list[str]:
    """What there are rows of but no measurements, a line a reason."""
    reasons = Counter((row.case.arm, row.status, row.reason) for row in rows if row.outcome is None)
    return [f"- {arm}: {count} rows {status}, {reason}" for (arm, status, reason), count in reasons.items()]


def provenance(rows: Sequence[Row]) -> str:
    """Devices, versions, dates and judges; commit and command of a row are in its file."""
    facts = [row.environment for row in rows]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(one[name]) for one in facts if name in one}))

    dates = sorted(one["date"] for one in facts if "date" in one)
    when = f"{dates[0]} to {dates[-1]}" if dates else "at unknown dates"
    versions = "; ".join(f"{name} {all_of(name)}" for name in ("torch", "diffusers") if all_of(name))
    return f"{len(rows)} rows, measured {when} on: {all_of('device_name')}. {versions}.\n\n{all_of('judge')}."


def newest(rows: Sequence[Row]) -> list[Row]:
    """Without rows of older weights: of each model and device those of the weights measured last."""

    def subject(row: Row) -> Case:
        return replace(row.case.group, weights="")

    weights = {subject(row): row.case.weights for row in rows}
    return [row for row in rows if weights[subject(row)] == row.case.weights]


def plots(groups: Mapping[Case, Sequence[Row]], docs: Path) -> list[str]:
    """Draw of every model the group with the most rows; returns what shows them."""
    richest: dict[str, Case] = {}
    for group, rows in groups.items():
        if group.model not in richest or len(rows) > len(groups[richest[group.model]]):
            richest[group.model] = group
    shown = []
    for model, group in richest.items():
        path = docs / "fidelity" / f"{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if draw(heading(group), groups[group], path):
            shown.append(f"![{heading(group)}]({path.relative_to(docs).as_posix()})")
    return shown


def write_report(results: Path, docs: Path) -> int:
    """Write fidelity.md and its plots; returns how many rows there are.

    Raises:
        DeepCacheError: there are no rows, or matplotlib is missing.
    """
    paths = [path for path in sorted(results.glob("*.json")) if is_rows_file(path)]
    rows = [row for path in paths for row in newest(read_rows(path))]
    if not rows:
        raise DeepCacheError(f"no rows in {results.name}: run python -m benchmarks.fidelity first")
    if importlib.util.find_spec("matplotlib") is None:
        raise DeepCacheError("the plots need matplotlib: pip install 'deepcache-fx[bench]'")
    groups = grouped(rows)
    parts = ["# Fidelity", INTRODUCTION, "## Summary", ABOUT_SUMMARY, summary(groups)]
    parts += ["## Which order of the forecast", ABOUT_ORDERS, markdown(*each_kind(groups))]
    parts += ["## Targets", ABOUT_TARGETS, targets_met(groups)]
    parts += ["## Error against cost", "Of each model the group with the most arms.", *plots(groups, docs)]
    parts += [arms_table({row.case.arm for row in rows}), *left_out(rows), provenance(rows)]
    (docs / "fidelity.md").write_text("\n\n".join(parts) + "\n")
    return len(rows)


def arms_table(names: Collection[str]) -> str:
    """What these arms are."""
    return markdown(("arm", "what it is"), [(arm.name, arm.about) for arm in all_arms().values() if arm.name in names])
