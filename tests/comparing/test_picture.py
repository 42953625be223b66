"""The picture of a comparison: pixels stay pixels, labels are there, a file is whole or absent."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageFont

from deepcache_fx.comparing import picture
from deepcache_fx.comparing.picture import Row, draw, draw_comparison, labels, save, to_images
from tests import small


def noise(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def holds(canvas: Image.Image, image: Image.Image, factor: int) -> tuple[int, int]:
    """Where the enlarged image stands in the canvas."""
    large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    top_row = large.crop((0, 0, large.width, 1)).tobytes()
    y, x = divmod(canvas.tobytes().index(top_row) // 3, canvas.width)
    part = canvas.crop((x, y, x + large.width, y + large.height))
    assert ImageChops.difference(part, large).getbbox() is None
    return x, y


def test_one_channel_gives_grey_images_and_three_give_colours() -> None:
    grey, colour = to_images(noise(2, 1, 8)), to_images(noise(1, 3, 8))
    assert [image.mode for image in (*grey, *colour)] == ["L", "L", "RGB"]
    assert grey[0].size == (8, 8)


def test_pixels_are_rounded_and_nan_is_black() -> None:
    (image,) = to_images(torch.tensor([0.0, 0.5, 1.0, math.nan]).reshape(1, 1, 2, 2))
    assert list(image.tobytes()) == [0, 128, 255, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_enlarged_by_a_whole_factor_with_the_baseline_above(channels: int) -> None:
    before, after = noise(2, channels, 32), noise(2, channels, 32, seed=1)
    canvas = draw_comparison(small.comparison(before, after))
    places = [holds(canvas, image, 12) for image in (*to_images(before), *to_images(after))]
    (left, top), (right, level), (below, bottom), _ = places
    assert right > left + 32 * 12 - 1
    assert (level, below) == (top, left)
    assert bottom > top + 32 * 12 - 1


def test_large_images_keep_their_pixels() -> None:
    images = to_images(noise(1, 3, 512))
    assert holds(draw([Row(("a",), images)], ["title"]), images[0], 1)


def test_ten_prompts_fit_side_by_side() -> None:
    images = noise(10, 1, 32)
    canvas = draw_comparison(small.comparison(images, images))
    assert 1600 < canvas.width < 2000


def test_label_title_and_caption_stand_around_the_image_each_on_its_side() -> None:
    images = to_images(noise(1, 1, 32))
    blank = Row((" ",), images, (" ",))
    size = 32 * 12
    for row, title, side in (
        (Row(("label",), images, (" ",)), " ", "left"),
        (blank, "title", "top"),
        (Row((" ",), images, ("34.5 dB",)), " ", "bottom"),
        (blank, " ", None),
    ):
        canvas = draw([row], [title])
        x, y = holds(canvas, images[0], 12)
        boxes = {
            "left": (0, y, x, canvas.height),
            "top": (x, 0, canvas.width, y),
            "bottom": (x, y + size, canvas.width, canvas.height),
        }
        inked = [name for name, box in boxes.items() if canvas.crop(box).convert("L").getextrema()[0] < 150]
        assert inked == ([side] if side else [])


def test_a_long_title_is_wrapped_into_its_column_and_shortened() -> None:
    font = ImageFont.load_default(20)
    lines = picture._wrap("a photograph of an astronaut riding a horse " * 9, font, 300)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert max(font.getlength(line) for line in lines) <= 300


def test_labels_tell_times_speed_and_likeness() -> None:
    before = noise(1, 1, 16)
    above, below = labels(small.comparison(before, before * 0.9))
    assert above == ("baseline", "5.00 s")
    assert below[:3] == ("deepcache_fx", "2.00 s", "2.50x faster")
    assert below[3].startswith("PSNR 2")
    assert below[4].startswith("SSIM 0.")


def test_labels_tell_a_slowdown_and_equal_images_by_name() -> None:
    image = noise(1, 1, 8)
    _, below = labels(small.comparison(image, image, optimized_seconds=(8.0, 10.0, 12.0)))
    assert below == ("deepcache_fx", "10.00 s", "2.00x slower", "identical images")


def test_a_label_tells_no_speed_that_was_not_measured() -> None:
    image = noise(1, 1, 8)
    _, below = labels(small.comparison(image, image, baseline_seconds=(40.0, 9.0, 8.0)))
    assert below == ("deepcache_fx", "2.00 s", "speed not measured", "identical images")


def test_save_writes_what_the_ending_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 3), (200, 10, 10))
    for name, expected in (("a.png", "PNG"), ("a.JPG", "JPEG")):
        save(image, tmp_path / name)
        with Image.open(tmp_path / name) as read:
            assert (read.format, read.size) == (expected, (4, 3))
    assert len(list(tmp_path.iterdir())) == 2


def test_save_refuses_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.txt': use .png"):
        save(Image.new("RGB", (4, 3)), tmp_path / "a.txt")


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def interrupted(_: Image.Image, file: object, **__: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(Image.new("RGB", (4, 3)), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
