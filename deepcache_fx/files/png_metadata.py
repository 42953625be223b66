"""The settings of a picture, in its PNG file: as text that other programs show, and as JSON.

The text is under `parameters`, in the form that Stable Diffusion's web pages write and read: the prompt, the negative
prompt, and one line of `Name: value` pairs. The JSON, under `deepcache_fx`, holds every setting as it was.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deepcache_fx.errors import DeepCacheError

TEXT_KEY = "parameters"
JSON_KEY = "deepcache_fx"

_NAMES = {
    "steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
}
"""What those programs call a setting; others keep their own name."""
_APART = ("prompt", "negative_prompt", "width", "height")


def encode_png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A PNG file of the image, with its settings.

    Args:
        image: Of any mode that PNG knows.
        settings: Plain values. Those with a meaning here: prompt, negative_prompt, steps, scheduler, guidance_scale,
            seed, width, height, model.

    Raises:
        ValueError: a number is infinite or NaN, which JSON does not know.
    """
    info = PngInfo()
    info.add_itxt(TEXT_KEY, parameters_text(settings))
    info.add_itxt(JSON_KEY, json.dumps(dict(settings), ensure_ascii=False, allow_nan=False))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings as Stable Diffusion's web pages write them. What is None or empty is left out."""
    lines = [_one_line(settings.get("prompt") or "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {_one_line(settings['negative_prompt'])}")
    shown = dict(settings)
    if settings.get("width") and settings.get("height"):
        shown["size"] = f"{settings['width']}x{settings['height']}"
    first = [(name, shown.pop(key)) for key, name in _NAMES.items() if key in shown]
    others = [(key.replace("_", " ").capitalize(), value) for key, value in shown.items() if key not in _APART]
    pairs = [f"{name}: {_quoted(value)}" for name, value in (*first, *others) if value is not None and value != ""]
    return "\n".join([*lines, ", ".join(pairs)])


def read_settings(file: Path | IO[bytes]) -> dict[str, Any]:
    """The settings that `encode_png` wrote.

    Raises:
        DeepCacheError: it is no PNG file, or has none of ours.
    """
    try:
        with Image.open(file) as image:
            image.load()
            text = image.info.get(JSON_KEY)
    except OSError as error:
        raise DeepCacheError(f"no picture can be read: {error}") from error
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DeepCacheError(f"the picture carries no settings under {JSON_KEY!r}")
    return values


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(value: object) -> str:
    """What holds a separator is quoted as JSON, as those programs do."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
