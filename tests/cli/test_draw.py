"""The `draw` command: what is written, and errors of one line."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from deepcache_fx.cli import app as cli
from tests import small
from tests.families import thorough


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    small.pipeline().save_pretrained(path)
    return path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, ["draw", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def words(path: Path) -> list[str]:
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).replace("\xa0", " ").strip() for text in texts]


@thorough
def test_a_preset_is_drawn_without_weights_at_the_branch_and_sizes_given(tmp_path: Path) -> None:
    path = tmp_path / "unet.svg"
    sizes = ("--height", "64", "--width", "16", "--batch", "3", "--dtype", "float32")
    assert run("--model", "ddpm-cifar10", "--out", str(path), "--branch", "1,0", *sizes) == (0, "", "")
    text = words(path)
    assert text[0] == "UNet2DModel, cut at branch 3"
    assert text[1] == "one call in float32: sample 3x3x64x16, timestep scalar"
    assert "down_blocks.3 8x2" in text
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipelines_directory_is_drawn_into_unet_svg_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--model", str(model)) == (0, "", "")
    text = words(tmp_path / "unet.svg")
    assert text[0] == "UNet2DConditionModel, cut at branch 0"
    assert text[1] == "one call in float16: sample 2x4x8x8, timestep scalar, encoder_hidden_states 2x77x16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "sd16"), "sd16 is no preset (sd15, "),
        (("--model", "sd15", "--out", "unet.png"), "give a file name that ends in .svg, not 'unet.png'"),
        (("--model", "sd15", "--out", "no/unet.svg"), "no/unet.svg cannot be written: there is no directory no"),
        (("--model", "sd15", "--height", "100"), "height must be a multiple of 8"),
        (("--model", "sd15", "--branch", "x"), "'x' is neither a number of at least 0 nor block,layer"),
        (
            ("--model", "MODEL", "--branch", "12"),
            "branch 12 is out of range: UNet2DConditionModel has skip",
        ),
    ],
)
def test_every_mistake_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, error = run(*(str(model) if argument == "MODEL" else argument for argument in arguments))
    assert (code, output) == (2, "")
    assert error.startswith("deepcache-fx: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []
