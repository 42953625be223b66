"""Write the picture of a UNet as SVG, in the places that `ladder` gives."""

from __future__ import annotations

from deepcache_fx.drawing.anatomy import Anatomy, Cell, RateMacs, Rung
from deepcache_fx.drawing.ladder import (
    BARE,
    MARGIN,
    PAD,
    ROW,
    WIDTH,
    Layout,
    Row,
    Unit,
    mebibytes,
    place,
    resolution,
    side,
)
from deepcache_fx.drawing.svg import EDGE, FAINT, INK, PAPER, Pen, Rect, document, fit, text_width, to_bytes, wrap
from deepcache_fx.graph.module_path import first_part
from deepcache_fx.planning.plan import bound

FILL = {"prompt": "#cdb4f6", "refresh": "#fcd9a0", "step": "#a5d3f7"}
"""Of a cell, by the rate at which it is computed."""
STRONG = {"prompt": "#7c4dcc", "refresh": "#bc6c00", "step": "#0a63b8"}
_CUT = "#cf222e"
_MEANING = {
    "step": "every step",
    "refresh": "every N-th step, kept in between",
    "prompt": "once per prompt",
}


def paint(facts: Anatomy, title: str, inputs: str) -> bytes:
    """The picture as an SVG file of `WIDTH` pixels; `inputs` says what was captured.

    Groups carry what they show for programs, too: `class="cell"` has `data-step`, `data-refresh` and `data-prompt` in
    multiply-accumulates, `class="skip"` its branch and bytes, `class="cut"` the branch that was chosen.
    """
    lines = wrap(inputs, WIDTH - 2 * MARGIN, 12)
    top = 92 + 17 * len(lines) + 58
    layout = place(facts, top)
    total = facts.macs.total
    unit = Unit.of(total)
    pen = document(WIDTH, layout.bottom + 106, f"{title}; {inputs}")
    pen.text((MARGIN, 40), fit(title, WIDTH - 2 * MARGIN, 20), size=20, font_weight="bold")
    for number, line in enumerate(lines):
        pen.text((MARGIN, 63 + 17 * number), line, fill=FAINT)
    _legend(pen, 72 + 17 * len(lines), unit)
    painter = _Painter(pen, facts, unit)
    painter.ends(layout, top)
    for row in layout.rows:
        painter.level(row)
    for above, below in zip(layout.rows, layout.rows[1:], strict=False):
        x = below.left.middle[0]
        pen.line(f"M{x} {above.left.bottom}V{below.left.y - 4}", stroke=FAINT, head=(x, below.left.y, "down"))
        x = below.right.middle[0]
        pen.line(f"M{x} {below.right.y}V{above.right.bottom + 4}", stroke=FAINT, head=(x, above.right.bottom, "up"))
    painter.middle(layout)
    painter.cut(layout)
    _totals(pen, facts, unit, layout.bottom + 40)
    return to_bytes(pen)


class _Painter:
    """Draws the parts of one picture."""

    def __init__(self, pen: Pen, facts: Anatomy, unit: Unit) -> None:
        self.pen, self.facts, self.unit = pen, facts, unit
        self.total = max(1, facts.macs.total)

    def level(self, row: Row) -> None:
        rungs = row.level.rungs
        name = resolution(row.level.resolution)
        down, up = {rung.index: rung.down for rung in rungs}, {rung.index: rung.up for rung in rungs}
        for box, way, cells in ((row.left, "down", down), (row.right, "up", up)):
            contents = side(cells)
            pen = self.pen.group(f"level {way}", data_resolution=name, data_macs=contents.macs)
            self._box(pen, box, contents.title, name, contents.macs)
            for index, cell in cells.items():
                place = Rect(box.x + PAD, row.ys[index], box.width - 2 * PAD, ROW)
                self._cell(pen, place, cell, contents.labels[index])
        for rung in rungs:
            self._skip(rung, row, row.ys[rung.index] + ROW / 2)

    def _box(self, pen: Pen, box: Rect, title: str, size: str, macs: int) -> None:
        pen.rect(box, radius=6, fill="#f6f8fa", stroke=EDGE)
        sums = f"{self.unit(macs)} {self.unit.name}, {macs / self.total:.1%}"
        y = box.y + 20
        pen.text((box.right - PAD, y), sums, fill=FAINT, text_anchor="end")
        words = fit(title, box.width - 6 * PAD - text_width(sums + size, 12), 12) + " " if title else ""
        text = pen.add("text", words, x=box.x + PAD, y=y, font_size=12, fill=INK, font_weight="bold")
        tail = Pen(text).add("tspan", size, dx=5 if words else 0)
        if words:
            tail.set("font-weight", "normal")

    def _cell(self, parent: Pen, place: Rect, cell: Cell, label: str) -> None:
        macs = cell.macs
        pen = parent.group("cell", data_prompt=macs.prompt, data_refresh=macs.refresh, data_step=macs.step)
        pen.tooltip("; ".join([label, *(f"{self._macs(part)} {_MEANING[rate]}" for rate, part in macs.parts.items())]))
        x, widths = place.x, _widths(macs, place.width)
        for rate, width in widths.items():
            pen.rect(Rect(x, place.y, width, place.height), fill=FILL[rate], class_=rate)
            x += width
        pen.rect(place, fill="none" if widths else PAPER, stroke=EDGE)
        number, size = self.unit(macs.total), 11
        y = place.y + place.height / 2 + 4
        pen.text((place.right - 7, y), number, size=size, text_anchor="end")
        pen.text((place.x + 11, y), fit(label, place.width - 24 - text_width(number, size), size), size=size)

    def _macs(self, macs: int) -> str:
        return f"{self.unit(macs)} {self.unit.name}"

    def _skip(self, rung: Rung, row: Row, y: float) -> None:
        start, end = row.left.right - PAD, row.right.x + PAD
        color = STRONG["step" if rung.index <= self.facts.branch else "refresh"]
        pen = self.pen.group("skip", data_branch=rung.index, data_bytes=rung.skip_bytes)
        shape = resolution(rung.skip_shape)
        pen.tooltip(f"skip connection {rung.index}: {shape}; cut here, {mebibytes(rung.deep_bytes)} would be kept")
        bow, reach = 11, (end - start) / 4
        path = f"M{start} {y}C{start + reach} {y - bow} {end - reach} {y - bow} {end - 5} {y}"
        pen.line(path, stroke=color, stroke_width=1.5, head=(end, y, "right"))
        label = f"{rung.index}: {mebibytes(rung.skip_bytes)}"
        x, width = (start + end) / 2, text_width(label, 10.5) + 4
        pen.rect(Rect(x - width / 2, y - 16, width, 14), fill=PAPER)
        pen.text((x, y - 5), label, size=10.5, fill=FAINT, text_anchor="middle")

    def ends(self, layout: Layout, top: float) -> None:
        """Where the sample comes in and the prediction goes out, and what the whole model shares."""
        first = layout.rows[0]
        x = first.left.middle[0]
        self.pen.text((x, top - 24), "sample", fill=FAINT, text_anchor="middle")
        self.pen.line(f"M{x} {top - 18}V{top - 4}", stroke=FAINT, head=(x, top, "down"))
        x = first.right.middle[0]
        self.pen.text((x, top - 24), "output", fill=FAINT, text_anchor="middle")
        self.pen.line(f"M{x} {top}V{top - 14}", stroke=FAINT, head=(x, top - 18, "up"))
        if self.facts.shared.macs.total:
            contents = side({0: self.facts.shared})
            modules = dict.fromkeys(first_part(module)[0].rstrip(".0123456789") for module in self.facts.shared.modules)
            box = Rect((WIDTH - 250) / 2, top - 44, 250, ROW)
            self._cell(self.pen.group("shared"), box, self.facts.shared, ", ".join(modules) or contents.labels[0])

    def middle(self, layout: Layout) -> None:
        box, last = layout.middle, layout.rows[-1]
        contents = side({0: self.facts.middle})
        name = resolution(self.facts.middle_resolution)
        pen = self.pen.group("level middle", data_resolution=name, data_macs=contents.macs)
        self._box(pen, box, contents.title, name, contents.macs)
        place = Rect(box.x + PAD, box.y + BARE, box.width - 2 * PAD, ROW)
        self._cell(pen, place, self.facts.middle, contents.labels[0])
        y = box.middle[1]
        x = min(last.left.middle[0], box.x - 30)
        self.pen.line(f"M{x} {last.left.bottom}V{y}H{box.x - 4}", stroke=FAINT, head=(box.x, y, "right"))
        x = max(last.right.middle[0], box.right + 30)
        path = f"M{box.right} {y}H{x}V{last.right.bottom + 4}"
        self.pen.line(path, stroke=FAINT, head=(x, last.right.bottom, "up"))

    def cut(self, layout: Layout) -> None:
        facts, y = self.facts, layout.cut_y
        pen = self.pen.group("cut", data_branch=facts.branch, data_cache=facts.cost.cache_bytes)
        pen.line(f"M8 {y}H{WIDTH - 8}", stroke=_CUT, stroke_width=2, stroke_dasharray="7 5")
        row = next(row for row in layout.rows if facts.branch in row.ys)
        x = row.left.x + PAD + 3
        pen.text((x, y - 7), "above: every step", size=11, fill=STRONG["step"], font_weight="bold")
        below = "below: every N-th step"
        pen.text((x, y + 16), below, size=11, fill=STRONG["refresh"], font_weight="bold")
        pen.pill((WIDTH / 2, y), f"cut at branch {facts.branch}", fill=_CUT)
        pen.pill((row.right.middle[0], y), f"cache: {mebibytes(facts.cost.cache_bytes)}", fill=STRONG["refresh"])


def _widths(macs: RateMacs, width: float) -> dict[str, float]:
    """Of the coloured parts of a cell: by MACs, none too narrow to be seen."""
    found = macs.parts
    least = 6.0
    narrow = [rate for rate, value in found.items() if value / macs.total * width < least]
    rest = sum(value for rate, value in found.items() if rate not in narrow)
    left = width - least * len(narrow)
    return {rate: least if rate in narrow else value / rest * left for rate, value in found.items()}


def _legend(pen: Pen, y: float, unit: Unit) -> None:
    x: float = MARGIN
    legend = pen.group("legend")
    for rate, meaning in _MEANING.items():
        legend.rect(Rect(x, y, 22, 14), fill=FILL[rate], stroke=EDGE, class_=rate)
        legend.text((x + 29, y + 11), meaning)
        x += 29 + text_width(meaning, 12) + 8
    legend.text(
        (WIDTH - MARGIN, y + 11),
        f"in cells: {unit.name}; on arcs: branch, size of its skip",
        fill=FAINT,
        text_anchor="end",
    )


def _totals(pen: Pen, facts: Anatomy, unit: Unit, y: float) -> None:
    full, shallow, plain = facts.macs.total, facts.cost.macs.total, facts.plain.macs.total
    tiles = (
        (f"{unit(full)} {unit.name}", "uncached call"),
        (f"{unit(shallow)} {unit.name}", f"shallow step, {shallow / full:.1%}"),
        (mebibytes(facts.cost.cache_bytes), "cache"),
        (f"{unit(facts.macs.prompt)} {unit.name}", "once per prompt"),
        (f"{bound(full, shallow, 3):.2f}x", "bound at N = 3"),
    )
    group = pen.group("totals")
    step = (WIDTH - 2 * MARGIN) / len(tiles)
    for number, (value, meaning) in enumerate(tiles):
        x = MARGIN + step * number
        group.text((x, y), value, size=17, font_weight="bold")
        group.text((x, y + 18), meaning, fill=FAINT)
    published = (
        f"The deep feature itself cached, as published: shallow step {unit(plain)} {unit.name}, {plain / full:.1%}; "
        f"cache {mebibytes(facts.plain.cache_bytes)}; bound {bound(full, plain, 3):.2f}x."
    )
    group.text((MARGIN, y + 44), published, size=11.5)
