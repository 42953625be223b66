"""A picture carries its settings: as text for other programs, as JSON for ours."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files.png_metadata import encode_png, parameters_text, read_settings
from tests.families import examples

SETTINGS: dict[str, Any] = {
    "prompt": "a sneaker,\nred",
    "negative_prompt": "blur",
    "seed": 7,
    "steps": 20,
    "scheduler": "ddim",
    "guidance_scale": 4.0,
    "width": 32,
    "height": 48,
    "model": "a, b",
    "interval": 3,
    "full_steps": "",
}


def test_the_text_is_as_other_programs_write_it() -> None:
    assert parameters_text(SETTINGS) == (
        "a sneaker, red\nNegative prompt: blur\n"
        'Steps: 20, Sampler: ddim, CFG scale: 4, Seed: 7, Size: 32x48, Model: "a, b", Interval: 3'
    )


def test_a_file_gives_back_image_and_settings() -> None:
    picture = Image.new("L", (32, 48), 99)
    data = encode_png(picture, SETTINGS)
    assert read_settings(io.BytesIO(data)) == SETTINGS
    with Image.open(io.BytesIO(data)) as found:
        found.load()
        assert found.info["parameters"] == parameters_text(SETTINGS)
        assert found.tobytes() == picture.tobytes()


@examples(20)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
def test_any_prompt_comes_back(prompt: str) -> None:
    assert read_settings(io.BytesIO(encode_png(Image.new("RGB", (2, 2)), {"prompt": prompt}))) == {"prompt": prompt}


def test_other_pictures_are_refused() -> None:
    bare = io.BytesIO()
    Image.new("L", (2, 2)).save(bare, format="PNG")
    bare.seek(0)
    for file, told in ((bare, "carries no settings"), (io.BytesIO(b"text"), "no picture can be read")):
        with pytest.raises(DeepCacheError, match=told):
            read_settings(file)
