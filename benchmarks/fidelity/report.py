"""docs/fidelity.md and its pictures, from the rows under benchmarks/results alone."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.fidelity.arms import all_arms
from benchmarks.fidelity.cases import Case, Row, is_rows_file, read_rows
from benchmarks.fidelity.orders import ABOUT_ORDERS, each_kind, each_sampler
from benchmarks.fidelity.plots import draw, sheet
from benchmarks.fidelity.samplers import SAMPLERS, title
from benchmarks.fidelity.targets import CONTROL, PUBLISHED, find, psnr, targets
from deepcache_fx.errors import DeepCacheError

COMMAND = "python -m benchmarks.fidelity --report"
SHEET_INTERVALS = (3, 5, 10)

INTRODUCTION = """\
How close images made with a cache are to those made without one, and what they cost. All arms start from the same
noise; image i has prompt i (in turn) and a seed of its own.

- *calls*: full + shallow calls of the UNet in one run (full + from branch 3 + shallow for *nested*). *MACs*: of these
  calls, as `deepcache_fx` counts them on its graphs, over those of the uncached run. *time*: the same of measured
  seconds: the median call of each kind times their number, over what the row's own full calls would take uncached, so
  that drift between rows cancels. The first call of each kind, which captures or compiles, is left out.
- *PSNR*, *SSIM*, *LPIPS*: to the uncached images of the same seeds. PSNR is of all pixels together, in dB; a few images
  that come out as others decide it. *median*: PSNR of each image by itself, the median.
- *FID*, *precision*, *recall*: to real images, in the feature space named below the table; they depend on the number of
  images and can be compared within a table only. *agreement*: images in which the classifier sees what was asked for.
- *fewer-steps* is the honest control: no cache, as many steps as cost the MACs of uniform 1:N. *zeroed* is the negative
  control: a cache that holds zeros; its time is not that of a method and is left out."""

Column = tuple[str, Callable[[Row], str]]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _decibels(row: Row) -> str:
    value = psnr(row)
    return (
        "" if value is None or row.case.arm == "uncached" else "identical" if value == float("inf") else f"{value:.1f}"
    )


def _calls(row: Row) -> str:
    calls = row.outcome.calls if row.outcome is not None else ""
    deeper = sorted(set(calls) - {"F", "s"}, reverse=True)
    return " + ".join(str(calls.count(kind)) for kind in ("F", *deeper, "s"))


COLUMNS: tuple[Column, ...] = (
    ("arm", lambda r: r.case.arm),
    ("1:N", lambda r: str(r.case.interval)),
    ("calls", _calls),
    ("MACs", lambda r: _number(r.outcome.macs_share if r.outcome else None, ".1%")),
    ("time", lambda r: _number(r.outcome.time_share if r.outcome else None, ".1%")),
    ("PSNR", _decibels),
    ("median", lambda r: _number(r.scores.psnr_median, ".1f")),
    ("SSIM", lambda r: _number(r.scores.ssim, ".4f")),
    ("LPIPS", lambda r: _number(r.scores.lpips, ".4f")),
    ("FID", lambda r: _number(r.scores.fid, ".3f")),
    ("precision", lambda r: _number(r.scores.precision, ".3f")),
    ("recall", lambda r: _number(r.scores.recall, ".3f")),
    ("agreement", lambda r: _number(r.scores.agreement, ".1%")),
    ("CLIP score", lambda r: _number(r.scores.clip_score, ".2f")),
)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; columns in which no line has anything are left out."""
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in rows)


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


def slug(group: Case) -> str:
    text = f"{group.model} {group.sampler} {group.steps} {group.images} branch {group.branch} {group.device}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("++", "pp")).strip("-")


def section(group: Case, rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """What is known of one group."""
    measured = [row for row in rows if row.outcome is not None]
    parts = [
        f"## {heading(group)}",
        markdown([name for name, _ in COLUMNS], [[f(r) for _, f in COLUMNS] for r in measured]),
    ]
    parts += [f"![{heading(group)}]({name})" for name in pictures]
    found = targets(rows)
    if found:
        lines = [(t.arm, t.wanted, t.found, "yes" if t.met else "**no**") for t in found]
        parts += ["Targets:", markdown(("arm", "wanted", "found", "met"), lines)]
    missing: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in rows:
        if row.outcome is None:
            missing[row.case.arm, row.status, row.reason].append(row.case.interval)
    notes = [
        f"{arm} at N = {', '.join(map(str, intervals))}: {status}, {reason}"
        for (arm, status, reason), intervals in missing.items()
    ]
    notes += dict.fromkeys(note for row in measured for note in row.outcome.notes)  # type: ignore[union-attr]
    parts += ["\n".join(f"- {note}" for note in notes)] * bool(notes)
    return "\n\n".join([*parts, provenance(measured)])


def provenance(rows: Sequence[Row]) -> str:
    """Judge, device, versions, commits and commands of these rows."""
    lines = []
    for facts in {json.dumps(row.environment, sort_keys=True): row.environment for row in rows}.values():
        plain = {k: v for k, v in facts.items() if k not in ("command", "device_name", "judge")}
        text = ", ".join(f"{name} {value}" for name, value in plain.items())
        lines.append(f"{facts.get('judge', '')}. {facts.get('device_name')}: {text}; `{facts.get('command')}`")
    return "\n\n".join(lines)


SUMMARY_INTERVALS = (2, 3, 5, 10)
PICTURED = 48
"""Groups with fewer images have a table and no pictures."""


def summary(groups: Mapping[Case, Sequence[Row]]) -> str:
    """Of all groups in one table: how much closer a linear forecast is than repeating and than fewer steps."""
    lines = []
    for group, rows in groups.items():
        cells = []
        for interval in SUMMARY_INTERVALS:
            ours, *others = (psnr(find(rows, arm, interval)) for arm in ("forecast-1", PUBLISHED, CONTROL))
            gains = ", ".join("-" if one is None or ours is None else f"{ours - one:+.1f}" for one in others)
            cells.append("" if ours is None else f"{ours:.1f} ({gains})")
        if any(cells):
            sampler = title(group.sampler)
            lines.append((group.model, sampler, str(group.steps), str(group.images), *cells))
    head = ("model", "sampler", "steps", "images", *(f"N={interval}" for interval in SUMMARY_INTERVALS))
    text = (
        "PSNR of *forecast-1* in dB, and in brackets how many dB closer to the uncached images that is than *repeat* "
        "and than *fewer-steps*. Where a sampler draws noise at its steps, fewer of them draw other noise: there "
        "*fewer-steps* comes out as other images, and is no control."
    )
    return "\n\n".join(["## In one table", text, markdown(head, lines)])


def orders(groups: Mapping[Case, Sequence[Row]]) -> str:
    """Which order of the forecast is closest: by kind of sampler, then one by one."""
    return "\n\n".join(["## Which order", ABOUT_ORDERS, markdown(*each_kind(groups)), markdown(*each_sampler(groups))])


def on_the_sheet(rows: Sequence[Row]) -> list[Row]:
    """Of a group: the uncached row, and of every arm a few intervals."""
    intervals = sorted({row.case.interval for row in rows} - {1})
    shown = [n for n in SHEET_INTERVALS if n in intervals] or intervals[:3]
    return [row for row in rows if row.outcome is not None and row.case.interval in (1, *shown)]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Without rows of older weights: of each model and device those of the weights measured last."""

    def subject(row: Row) -> Case:
        return replace(row.case.group, weights="")

    weights = {subject(row): row.case.weights for row in rows}
    return [row for row in rows if weights[subject(row)] == row.case.weights]


def write_report(results: Path, docs: Path, work: Path, pictured: int = PICTURED) -> int:
    """Write fidelity.md and its pictures; returns how many rows there are.

    Sheets of images are drawn where `work` holds the images; those that are there already stay otherwise.

    Raises:
        DeepCacheError: there are no rows, or matplotlib is missing.
    """
    paths = [path for path in sorted(results.glob("*.json")) if is_rows_file(path)]
    rows = [row for path in paths for row in newest(read_rows(path))]
    if not rows:
        raise DeepCacheError(f"no rows in {results.name}: run python -m benchmarks.fidelity first")
    if importlib.util.find_spec("matplotlib") is None:
        raise DeepCacheError("the plots need matplotlib: pip install 'deepcache-fx[bench]'")
    pictures = docs / "fidelity"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Fidelity",
        f"Made by `{COMMAND}` from the JSON files in benchmarks/results.",
        INTRODUCTION,
        arms_section({row.case.arm for row in rows}),
    ]
    groups = grouped(rows)
    parts += [summary(groups), orders(groups)]
    for group, members in groups.items():
        if group.images < pictured:
            parts.append(section(group, members, []))
            continue
        plot, images = pictures / f"{slug(group)}.png", pictures / f"{slug(group)}-sheet.png"
        names = [plot] * draw(heading(group), members, plot)
        sheet(on_the_sheet(members), work, images)
        names += [images] * images.exists()
        parts.append(section(group, members, [f"fidelity/{path.name}" for path in names]))
    (docs / "fidelity.md").write_text("\n\n".join(parts) + "\n")
    return len(rows)


def arms_section(names: Collection[str]) -> str:
    """What these arms are."""
    return markdown(("arm", "what it is"), [(arm.name, arm.about) for arm in all_arms().values() if arm.name in names])
