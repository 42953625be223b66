"""The picture of a UNet: levels as boxes in the shape of a U, skip connections as arcs, the cut straight across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from deepcache_fx.drawing.anatomy import Anatomy, Cell, Level
from deepcache_fx.drawing.svg import Rect
from deepcache_fx.graph.module_path import first_part

WIDTH = 960
MARGIN, COLUMN, INDENT = 24, 330, 26
PAD, TITLE, ROW, GAP, BETWEEN, BAND = 8, 22, 25, 4, 18, 46
BARE = PAD + TITLE


@dataclass(frozen=True)
class Side:
    """The box of a level on one side: its title, and its cells with their labels, by branch."""

    title: str
    cells: dict[int, Cell]
    labels: dict[int, str]

    @property
    def macs(self) -> int:
        return sum(cell.macs.total for cell in self.cells.values())


@dataclass(frozen=True)
class Row:
    """Where a level, its two boxes and the cells of its rungs are."""

    level: Level
    left: Rect
    right: Rect
    ys: dict[int, float]
    """The top of each rung's cells, by branch."""


@dataclass(frozen=True)
class Layout:
    """Where everything is."""

    rows: tuple[Row, ...]
    cut_y: float
    middle: Rect
    bottom: float


def place(facts: Anatomy, top: float) -> Layout:
    """Lay out the U from this height downwards."""
    narrowest = (WIDTH - 2 * MARGIN - 2 * COLUMN - 110) / 2
    indent = min(INDENT, narrowest / max(1, len(facts.levels) - 1))
    y, cut_y, rows = top, top, []
    for number, level in enumerate(facts.levels):
        start, ys = y, {}
        y += BARE
        for rung in level.rungs:
            ys[rung.index] = y
            y += ROW + GAP
            if rung.index == facts.branch and rung is not level.rungs[-1]:
                cut_y = y - GAP / 2 + BAND / 2
                y += BAND
        y += PAD - GAP
        x = MARGIN + number * indent
        left = Rect(x, start, COLUMN, y - start)
        rows.append(Row(level, left, Rect(WIDTH - x - COLUMN, start, COLUMN, y - start), ys))
        y += BETWEEN
        if level.rungs[-1].index == facts.branch:
            cut_y = y - BETWEEN + (BETWEEN + BAND) / 2
            y += BAND
    middle = Rect((WIDTH - COLUMN) / 2, y + 6, COLUMN, BARE + ROW + PAD)
    return Layout(tuple(rows), cut_y, middle, middle.bottom)


@dataclass(frozen=True)
class Unit:
    """What MACs are counted in: the greatest of thousands that leaves the whole model above one."""

    name: str
    size: float

    @classmethod
    def of(cls, macs: int) -> Unit:
        for name, size in (("GMAC", 1e9), ("MMAC", 1e6), ("kMAC", 1e3)):
            if macs >= size:
                return cls(name, size)
        return cls("MAC", 1)

    def __call__(self, macs: int) -> str:
        value = macs / self.size
        return f"{value:.0f}" if value == 0 or value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:#.2g}"


def mebibytes(count: int) -> str:
    """Example: `2.50 MiB`; small ones in KiB."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count / 2**10:.2f} KiB"


def resolution(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def side(cells: dict[int, Cell]) -> Side:
    """Title and labels of a box: the module that its deepest cell is made of is named once, in the title."""
    deepest = [first_part(module) for module in cells[max(cells)].modules]
    owners = [part for part, rest in deepest if rest[:1].isalpha()]
    block = max(owners, key=owners.count, default="")
    if owners.count(block) * 2 <= len(deepest):
        block = ""
    return Side(block, cells, {index: _label(cell, block) for index, cell in cells.items()})


def _label(cell: Cell, block: str) -> str:
    """The modules of a cell, as seen from the block that the title names; else its operators."""
    firsts = [first_part(module)[0] for module in cell.modules]
    names = []
    for module, first in zip(cell.modules, firsts, strict=True):
        _, rest = first_part(module)
        if block and first == block:
            names.append(rest or first)
        else:  # a number alone says nothing, and several parts of one module are that module
            names.append(module if rest[:1].isalpha() and firsts.count(first) == 1 else first)
    return ", ".join(_runs(dict.fromkeys(names))) or _count(cell.operators) or "nothing of its own"


def _runs(names: Iterable[str]) -> list[str]:
    """Neighbours that differ in their last number alone, as one: `middle_block.0-2`."""
    runs = []
    for stem, group in groupby(names, key=lambda name: name.rstrip("0123456789")):
        numbers = [name.removeprefix(stem) for name in group]
        runs.append(f"{stem}{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{stem}{numbers[0]}")
    return runs


def _count(operators: Sequence[str]) -> str:
    return ", ".join(f"{operators.count(name)} {name}" for name in dict.fromkeys(operators))
