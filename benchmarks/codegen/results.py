"""What was modelled of one step, as it is written to a file and drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.codegen.devices import DEVICES, Device
from benchmarks.codegen.launches import KINDS, Launch
from benchmarks.codegen.machine import Compiled

HEADING = "Modelled, nothing ran"


@dataclass(frozen=True)
class Step:
    """One step of one model, for one device."""

    model: str
    step: str
    arch: str
    passes: tuple[str, ...]
    size: str
    """Of the sample."""
    dtype: str
    launches: tuple[Launch, ...]
    macs: int
    """Of the graph."""
    compiled: tuple[Compiled, ...] = ()
    """Every configuration of its Triton kernels; empty where that was not asked for."""

    @property
    def device(self) -> Device:
        return DEVICES[self.arch]

    @property
    def hidden_copies(self) -> int:
        return sum(launch.hidden_bytes > 0 for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def flop(self) -> int:
        return sum(launch.flop for launch in self.launches)

    def count(self, kind: str) -> int:
        return sum(launch.kind == kind for launch in self.launches)

    def roof(self) -> float:
        """Seconds, as of `Launch.roof`."""
        return sum(launch.roof(self.device) for launch in self.launches)

    def floor(self) -> float:
        """Seconds, as of `Launch.floor`."""
        return sum(launch.floor(self.device) for launch in self.launches)

    def floor_of(self, kind: str) -> float:
        return sum(launch.floor(self.device) for launch in self.launches if launch.kind == kind)

    def spilling(self) -> list[Compiled]:
        return [compiled for compiled in self.compiled if compiled.spilled_bytes]

    def as_dict(self) -> dict[str, Any]:
        summary = {
            "launches": len(self.launches), **{kind: self.count(kind) for kind in KINDS},
            "hidden_copies": self.hidden_copies, "megabytes": round(self.bytes / 1e6, 2),
            "gflop": round(self.flop / 1e9, 2), "roof_us": round(self.roof() * 1e6, 1),
            "floor_us": round(self.floor() * 1e6, 1),
            "floor_us_by_kind": {kind: round(self.floor_of(kind) * 1e6, 1) for kind in KINDS},
        }  # fmt: skip
        return {"summary": summary, **asdict(self)}


def write(steps: Sequence[Step], facts: dict[str, Any], path: Path) -> None:
    """One file a call: what was asked for, in `facts`, and the steps."""
    content = {"heading": HEADING, **facts, "steps": [step.as_dict() for step in steps]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> list[Step]:
    """The steps of a file that `write` has made."""
    fields = ("model", "step", "arch", "size", "dtype", "macs")
    return [
        Step(
            **{name: item[name] for name in fields},
            passes=tuple(item["passes"]),
            launches=tuple(Launch(**launch) for launch in item["launches"]),
            compiled=tuple(Compiled(**compiled) for compiled in item["compiled"]),
        )
        for item in json.loads(path.read_text())["steps"]
    ]


def _columns(steps: Sequence[Step]) -> list[tuple[str, list[str]]]:
    """Headings and cells of the table of steps."""
    return [
        ("model", [s.model for s in steps]),
        ("step", [s.step for s in steps]),
        ("arch", [s.arch for s in steps]),
        ("passes", [", ".join(s.passes) or "default" for s in steps]),
        ("launches", [str(len(s.launches)) for s in steps]),
        *((kind, [str(s.count(kind)) for s in steps]) for kind in KINDS),
        ("hidden copies", [str(s.hidden_copies) for s in steps]),
        ("MB", [f"{s.bytes / 1e6:.0f}" for s in steps]),
        ("GFLOP", [f"{s.flop / 1e9:.1f}" for s in steps]),
        ("roof us", [f"{s.roof() * 1e6:.0f}" for s in steps]),
        ("floor us", [f"{s.floor() * 1e6:.0f}" for s in steps]),
        ("most registers", [str(max((c.registers for c in s.compiled), default="-")) for s in steps]),
        ("spilling", [f"{len(s.spilling())} of {len(s.compiled)}" if s.compiled else "-" for s in steps]),
    ]


def table(steps: Sequence[Step]) -> Table:
    """For the terminal."""
    columns = _columns(steps)
    result = Table(*(heading for heading, _ in columns), title=HEADING)
    for cells in zip(*(cells for _, cells in columns), strict=True):
        result.add_row(*cells)
    return result


def markdown(steps: Sequence[Step]) -> str:
    """For the documentation."""
    columns = _columns(steps)
    rows = zip(*(cells for _, cells in columns), strict=True)
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def draw(steps: Sequence[Step], path: Path) -> None:
    """A bar for each step: where its modelled time goes, by kind of launch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(steps)), layout="constrained")
    labels = [f"{s.model} {s.step}\n{', '.join(s.passes) or 'default passes'}" for s in steps]
    left = [0.0] * len(steps)
    for kind in KINDS:
        shares = [100 * s.floor_of(kind) / s.floor() for s in steps]
        if any(shares):
            axes.barh(labels, shares, left=left, label=kind)
            left = [before + share for before, share in zip(left, shares, strict=True)]
    for place, step in enumerate(steps):
        axes.text(101, place, f"{step.floor() * 1e6:.0f} us", va="center")
    axes.set_xlim(0, 115)
    axes.invert_yaxis()
    axes.set_xlabel("% of the floor")
    axes.set_title(f"{HEADING}: floor by kind of launch, {', '.join(dict.fromkeys(s.device.name for s in steps))}")
    axes.legend(ncols=len(KINDS), loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
