"""Boxes, lines and text as SVG: what a picture of a network needs of it, with sizes in pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
INK, FAINT, PAPER, EDGE = "#1f2328", "#59636e", "#ffffff", "#afb8c1"
_LETTER = 0.6
"""Of the font size: a mean width of letters that no usual font exceeds much."""

Point = tuple[float, float]
Head = tuple[float, float, str]
"""The tip of an arrow, and where it points: "up", "down" or "right"."""


@dataclass(frozen=True)
class Rect:
    """A place in the picture; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


class Pen:
    """Adds elements to a group of an SVG document. `group` gives a pen for a group in it."""

    def __init__(self, element: ElementTree.Element) -> None:
        self.element = element

    def add(self, tag: str, text: str | None = None, /, **attributes: object) -> ElementTree.Element:
        """An element; `_` in the names of attributes stands for `-`, one at the end for nothing."""
        named = {name.rstrip("_").replace("_", "-"): _plain(value) for name, value in attributes.items()}
        child = ElementTree.SubElement(self.element, tag, named)
        child.text = text
        return child

    def group(self, class_: str, /, **attributes: object) -> Pen:
        return Pen(self.add("g", class_=class_, **attributes))

    def tooltip(self, text: str) -> None:
        """What a browser shows where the pointer rests on this group, and a screen reader reads."""
        self.add("title", text)

    def rect(self, place: Rect, *, radius: float = 0, **attributes: object) -> None:
        self.add("rect", x=place.x, y=place.y, width=place.width, height=place.height, rx=radius, **attributes)

    def text(self, at: Point, text: str, *, size: float = 12, fill: str = INK, **attributes: object) -> None:
        """One line, its baseline at this height."""
        self.add("text", text, x=at[0], y=at[1], font_size=size, fill=fill, **attributes)

    def pill(self, at: Point, text: str, *, fill: str, size: float = 11) -> None:
        """White text on a rounded field around this point."""
        width, height = text_width(text, size) * 1.12 + size, size * 1.8
        self.rect(Rect(at[0] - width / 2, at[1] - height / 2, width, height), radius=height / 2, fill=fill)
        self.text((at[0], at[1] + size * 0.36), text, size=size, fill=PAPER, text_anchor="middle", font_weight="bold")

    def line(self, path: str, *, stroke: str, head: Head | None = None, **attributes: object) -> None:
        """A path of SVG, with the head of an arrow."""
        self.add("path", d=path, fill="none", stroke=stroke, **attributes)
        if head is not None:
            x, y, direction = head
            back = {"up": ((-4, 7), (4, 7)), "down": ((-4, -7), (4, -7)), "right": ((-7, -4), (-7, 4))}[direction]
            points = [(x, y), *((x + dx, y + dy) for dx, dy in back)]
            self.add("polygon", points=" ".join(f"{_plain(px)},{_plain(py)}" for px, py in points), fill=stroke)


def document(width: float, height: float, description: str) -> Pen:
    """A pen for an empty picture on white paper with an edge, so that it stands on light and dark pages alike."""
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": _plain(width),
            "height": _plain(height),
            "viewBox": f"0 0 {_plain(width)} {_plain(height)}",
            "font-family": FONT,
            "role": "img",
        },
    )
    pen = Pen(root)
    pen.tooltip(description)
    pen.rect(Rect(0.5, 0.5, width - 1, height - 1), radius=8, fill=PAPER, stroke="#d1d9e0", class_="paper")
    return pen


def to_bytes(pen: Pen) -> bytes:
    """The document as ASCII, with characters beyond it as references."""
    ElementTree.indent(pen.element)
    text: bytes = ElementTree.tostring(pen.element, encoding="us-ascii", xml_declaration=True)
    return text + b"\n"


def text_width(text: str, size: float) -> float:
    """About how wide a line of text is."""
    return len(text) * size * _LETTER


def fit(text: str, width: float, size: float) -> str:
    """The text, shortened to what goes into the width."""
    letters = max(4, int(width / (size * _LETTER)))
    return text if len(text) <= letters else text[: letters - 3].rstrip(" ,.") + "..."


def wrap(text: str, width: float, size: float) -> Sequence[str]:
    """The text in lines of that width; they break at plain spaces only, not at "\\xa0"."""
    return textwrap.wrap(text, int(width / (size * _LETTER)), break_long_words=True) or [""]


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
