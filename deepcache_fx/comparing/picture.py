"""One picture of a comparison: the baseline's images above, the optimised ones below, labelled."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from deepcache_fx.comparing.comparison import Comparison, describe_psnr, describe_ssim, psnr
from deepcache_fx.files.writing import replacing

_WIDTH = 1600
"""Small images are enlarged until all columns together are about this wide, in pixels."""
_CELL = (160, 384)
"""The least and the most that an image is enlarged to."""
_TITLE_LINES = 3
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 24), (110, 110, 120)


@dataclass(frozen=True)
class Row:
    """Images side by side, with a label before them: its first line stands out."""

    label: tuple[str, ...]
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] = ()
    """One below each image; none where empty."""


def to_images(batch: torch.Tensor) -> tuple[Image.Image, ...]:
    """(count, 1 or 3, height, width) in [0, 1] as Pillow images, "L" or "RGB"; NaN is black."""
    pixels = (batch.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return tuple(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels)


def labels(comparison: Comparison) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands before the baseline's row, and before the optimised one."""
    speedup, likeness = comparison.speedup, comparison.psnr
    faster = f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"
    if comparison.doubts:
        faster = "speed not measured"
    optimized = [
        "deepcache_fx",
        f"{statistics.median(comparison.optimized_seconds):.2f} s",
        faster,
        "identical images" if math.isinf(likeness) else f"PSNR {describe_psnr(likeness)}",
    ]
    if math.isfinite(comparison.ssim):
        optimized.append(f"SSIM {describe_ssim(comparison.ssim)}")
    return ("baseline", f"{statistics.median(comparison.baseline_seconds):.2f} s"), tuple(optimized)


def draw_comparison(comparison: Comparison) -> Image.Image:
    """The picture that `deepcache-fx compare` writes: a column a prompt, the PSNR below each optimised image."""
    before, after = comparison.baseline_images, comparison.optimized_images
    above, below = labels(comparison)
    each = tuple(describe_psnr(psnr(a[None], b[None])) for a, b in zip(after, before, strict=True))
    rows = (Row(above, to_images(before)), Row(below, to_images(after), each if len(each) > 1 else ()))
    return draw(rows, comparison.prompts)


def draw(rows: Sequence[Row], titles: Sequence[str]) -> Image.Image:
    """Rows of images below column titles, labels on the left; an RGB image.

    Images smaller than a readable label are enlarged by a whole factor without smoothing: their pixels stay pixels.
    All are taken to have the size of the first.
    """
    size = rows[0].images[0].size
    target = min(max(_WIDTH // len(titles), _CELL[0]), _CELL[1])
    factor = max(1, target // max(size))
    width, height = size[0] * factor, size[1] * factor
    points = min(max(width // 13, 14), 32)
    plain, bold = ImageFont.load_default(points), ImageFont.load_default(round(points * 1.25))
    line, gap = round(points * 1.4), max(points // 2, 6)
    wrapped = [_wrap(title, plain, width) for title in titles]
    top = gap + line * max(map(len, wrapped)) + gap
    captions = [line + gap if row.captions else 0 for row in rows]
    label_height = max(line * (len(row.label) + 1) for row in rows)
    row_height = max(height, label_height)
    left = 4 * gap + round(max(bold.getlength(text) for row in rows for text in row.label))
    canvas = Image.new(
        "RGB", (left + len(titles) * (width + gap), top + sum(captions) + len(rows) * (row_height + gap)), _PAPER
    )
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped):
        for number, text in enumerate(lines):
            x = left + column * (width + gap) + (width - plain.getlength(text)) / 2
            pen.text((x, gap + number * line), text, fill=_INK, font=plain)
    y = top
    for row, extra in zip(rows, captions, strict=True):
        for number, text in enumerate(row.label):
            position = (2 * gap, y + (number and number * line + gap))
            pen.text(position, text, fill=_FAINT if number else _INK, font=plain if number else bold)
        for column, image in enumerate(row.images):
            x = left + column * (width + gap)
            canvas.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
            if row.captions:
                text = row.captions[column]
                start = x + (width - plain.getlength(text)) / 2
                pen.text((start, y + height + gap // 2), text, fill=_FAINT, font=plain)
        y += row_height + gap + extra
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A title in at most three lines of the column's width; an ellipsis tells that words are left out."""
    letters = max(8, int(1.5 * width * len(text) / max(1.0, font.getlength(text))))
    while True:
        lines = textwrap.wrap(text, letters, max_lines=_TITLE_LINES, placeholder=" ...") or [""]
        if letters <= 8 or all(font.getlength(line) <= width for line in lines):
            return lines
        letters -= 1


def check_suffix(path: Path) -> str:
    """The Pillow format that a file name's ending stands for.

    Raises:
        ValueError: Pillow writes no such file.
    """
    Image.init()
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise ValueError(f"no picture format is called {path.suffix!r}: use .png, .jpg or .webp")
    return name


def save(image: Image.Image, path: Path) -> None:
    """Write an image in the format of the file's ending, whole or not at all.

    Raises:
        ValueError: the ending is no picture's.
    """
    name = check_suffix(path)
    with replacing(path) as file:
        image.save(file, format=name)
