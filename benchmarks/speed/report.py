"""docs/speed.md, between its markers, and its plots, from the rows under benchmarks/results alone."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.environment import RESULTS, ROOT
from benchmarks.speed.cases import Quantiles, Result, over
from benchmarks.speed.plots import draw
from benchmarks.speed.profiles import profiles_section, read_profiles
from benchmarks.speed.store import read_results
from benchmarks.speed.targets import targets_table

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

Group = tuple[object, ...]


def load(paths: Iterable[Path]) -> list[Result]:
    """The rows of these files, of every case and device the latest."""
    latest: dict[tuple[str, object], Result] = {}
    for path in paths:
        for row in read_results(path):
            key = (row.case.key, row.environment.get("device_name"))
            old = latest.get(key)
            if old is None or (row.final, row.environment["date"]) >= (old.final, old.environment["date"]):
                latest[key] = row
    return list(latest.values())


def is_results(path: Path) -> bool:
    """True for a file that `benchmarks.speed` wrote; other results may lie beside it."""
    if path.suffix == ".jsonl":
        return True
    data = json.loads(path.read_text())
    return isinstance(data, list) and all(isinstance(row, dict) and {"case", "status"} <= set(row) for row in data)


def grouped(rows: Sequence[Result]) -> dict[Group, list[Result]]:
    """Rows whose times may be compared: one device, one model at one size."""
    groups: defaultdict[Group, list[Result]] = defaultdict(list)
    for row in rows:
        groups[(row.environment["device_name"], *row.case.group)].append(row)
    return dict(groups)


def find(rows: Sequence[Result], arm: str, interval: int) -> Result | None:
    """The measured row of an arm; of an arm that caches nothing, for any interval."""
    for row in rows:
        if row.case.arm == arm and row.case.interval in (1, interval) and row.measured.loop is not None:
            return row
    return None


# Markdown.

Column = tuple[str, Callable[[Result, Sequence[Result]], str]]


def _times(value: Quantiles | None, scale: float = 1e3) -> str:
    """Median, and behind it the 20 % and 80 % quantiles."""
    if value is None:
        return ""
    median, low, high = (_short(each * scale) for each in (value.median, value.low, value.high))
    return f"{median} ({low}-{high})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _pair(first: object, second: object) -> str:
    return " / ".join(str(item) for item in (first, second) if item is not None)


def _kernels(row: Result) -> str:
    """PyTorch's profiler sees none of OpenVINO's."""
    return "" if "openvino" in row.case.arm else _pair(row.measured.kernels_full, row.measured.kernels_shallow)


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


COLUMNS: tuple[Column, ...] = (
    ("arm", lambda r, rows: r.case.arm),
    ("1:N", lambda r, rows: str(r.case.interval)),
    ("steps", lambda r, rows: str(len(r.measured.kinds))),
    ("full step, ms", lambda r, rows: _times(r.measured.full_step)),
    ("shallow step, ms", lambda r, rows: _times(r.measured.shallow_step)),
    ("shallow / full", lambda r, rows: _number(r.derived.shallow_share, ".3f")),
    ("loop, s", lambda r, rows: _times(r.measured.loop, 1)),
    ("pipeline, s", lambda r, rows: _times(r.measured.pipeline, 1)),
    ("with VAE, s", lambda r, rows: _times(r.measured.end_to_end, 1)),
    ("x eager", lambda r, rows: _number(r.derived.over_eager)),
    ("x compile", lambda r, rows: _number(over(r, find(rows, "compile", 1)))),
    ("x helper", lambda r, rows: _number(over(r, find(rows, "helper", r.case.interval)))),
    ("x itself uncached", lambda r, rows: _number(r.derived.over_itself)),
    ("MAC bound", lambda r, rows: _number(r.derived.bound)),
    ("x floor", lambda r, rows: _number(r.derived.floor_distance)),
    ("kernels", lambda r, rows: _kernels(r)),
    ("launches", lambda r, rows: _pair(r.measured.launches_full, r.measured.launches_shallow)),
    ("host, ms", lambda r, rows: _times(r.measured.host_shallow or r.measured.host_full)),
    ("first run, s", lambda r, rows: _pair(*(_seconds(r.measured.cold_seconds), _seconds(r.measured.warm_seconds)))),
    ("peak, MiB", lambda r, rows: _mebibytes(r.measured.peak_bytes)),
    ("error", lambda r, rows: _number(r.measured.error, ".1e")),
    ("error to helper", lambda r, rows: _number(r.measured.error_helper, ".1e")),
)

LEGEND = """\
Times are medians, with the 20 % and 80 % quantiles in brackets; arms were measured in one run, in turn.

- *full step*, *shallow step*: UNet calls within the *loop*, the denoising loop around the bare UNet. *pipeline*: the
  real pipeline class, up to the latents; *with VAE*: up to the images. Prompt embeddings are given.
- *x eager*, *x compile*, *x helper*: speed-ups of the loop, the last over `DeepCacheSDHelper` at the same interval.
- *x itself uncached*: speed-up over the same arm's full steps. *MAC bound*: what that would be if time were
  multiply-accumulates.
- *x floor*: time of the shallow step (where there is none, of the full one) over its roofline floor: every contraction
  at this device's measured matrix rate or copy rate, whichever takes longer.
- *kernels*, *launches*: of a full / a shallow step. On a CPU, kernels are outermost ATen operators: what Inductor
  generated is not among them, and nothing of OpenVINO's is seen.
- *host*: from the call of a shallow (else a full) step to its return, on an idle device.
- *first run*: two steps with everything that happens once, with cold / warm compilation caches.
- *peak*: allocated above the weights.
- *error*: |x - eager| / |eager| of the final latents. Weights are random: it says how exactly an arm computes and how
  much it leaves out, not how good its images are."""


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def markdown_table(rows: Sequence[Result], columns: Sequence[Column] = COLUMNS) -> str:
    """The measured rows; columns in which no row has anything are left out."""
    measured = [row for row in rows if row.measured.loop is not None]
    cells = [[value(row, rows) for _, value in columns] for row in measured]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    head = ["| " + " | ".join(columns[i][0] for i in kept) + " |", "|" + " --- |" * len(kept)]
    return "\n".join([*head, *("| " + " | ".join(line[i] for i in kept) + " |" for line in cells)])


def heading(row: Result) -> str:
    """What the rows of a group have in common."""
    case = row.case
    size = f"{case.height}x{case.width}"
    return f"{case.model} {size}, batch {case.batch}, {case.dtype}, {case.steps} steps, branch {case.branch}"


def provenance(rows: Sequence[Result]) -> str:
    """Device, versions, commits and commands of these rows."""
    lines = []
    for environment in {json.dumps(row.environment, sort_keys=True): row.environment for row in rows}.values():
        facts = {k: v for k, v in environment.items() if k not in ("command", "device_name")}
        text = ", ".join(f"{name} {value}" for name, value in facts.items())
        lines.append(f"{environment['device_name']}: {text}; `{environment['command']}`")
    return "\n\n".join(lines)


def tables(rows: Sequence[Result], plots: dict[Group, list[str]], profiles: Sequence[dict[str, Any]] = ()) -> str:
    """All that is written between the markers; `plots` are relative to the page."""
    parts = [LEGEND, "## Targets", targets_table(list(grouped(rows).values()))]
    for group, members in grouped(rows).items():
        members = sorted(members, key=_order)
        parts += [f"## {heading(members[0])} on {group[0]}", markdown_table(members)]
        parts += [f"![{heading(members[0])}]({name})" for name in plots.get(group, [])]
        missing = [f"- {r.case.arm} 1:{r.case.interval}: {r.status}, {r.reason}" for r in members if r.reason]
        notes = [f"- {r.case.arm} 1:{r.case.interval}: {text}" for r in members for text in r.measured.notes]
        parts += ["\n".join([*missing, *notes])] * bool(missing or notes) + [provenance(members)]
    if profiles:
        parts += ["## Where the time of one step goes", profiles_section(profiles)]
    return "\n\n".join(parts)


def _order(row: Result) -> tuple[bool, float, str, int]:
    """Slowest first, as in a bar chart; rows without numbers last."""
    speed = row.derived.over_eager
    return (speed is None, speed or 0.0, row.case.arm, row.case.interval)


def replace_section(text: str, section: str) -> str:
    """`text` with `section` between the two markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no section between {BEGIN} and {END}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def main(
    results: Annotated[Path, typer.Option(help="The directory of the JSON files.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Rewritten between its markers; plots lie in the folder of its name.")] = (
        ROOT / "docs/speed.md"
    ),
) -> None:
    """Write the tables and plots of every results file into the page on speed."""
    paths = [path for path in sorted(results.glob("*.json*")) if path.suffix != ".tmp" and is_results(path)]
    rows = load(paths)
    if not rows:
        raise typer.BadParameter(f"no rows in {results.name}: run python -m benchmarks.speed first")
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("the plots need matplotlib: pip install 'deepcache-fx[bench]'")
    pictures = page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    plots = {
        group: [f"{pictures.name}/{name}" for name in draw(heading(members[0]), members, pictures)]
        for group, members in grouped(rows).items()
    }
    page.write_text(replace_section(page.read_text(), tables(rows, plots, read_profiles(results))))
    typer.echo(f"{len(rows)} rows of {len(plots)} groups: {page.name}")


if __name__ == "__main__":
    typer.run(main)
