"""The `plan` command: where models are found, what is printed, and errors of one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from rich.console import Console

from deepcache_fx import DeepCacheError, cli_plan
from deepcache_fx.cli_plan import plan_command, read_model
from deepcache_fx.plan import Plan, giga
from tests.models import sd_pipeline, sd_unet

SMALL = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pipeline"
    sd_pipeline(sd_unet(**SMALL)).save_pretrained(path)
    return path


def run(model: str | Path, **options: Any) -> tuple[Plan, str]:
    output = io.StringIO()
    return plan_command(str(model), console=Console(file=output, width=80), **options), output.getvalue()


def test_a_preset_is_printed_as_a_table_that_fits_a_terminal() -> None:
    found, text = run("ddpm-cifar10", intervals=(3, 7))
    assert found.inputs == "sample 1x3x32x32, timestep scalar"
    assert found.dtype == "float16"
    assert "google/ddpm-cifar10-32" in text
    words = [line.split() for line in text.splitlines()]
    branch = found.branches[2]
    assert branch.hoisted.total < branch.shallow.total
    hoisted = [giga(branch.hoisted.total), f"{branch.hoisted_cache_bytes / 2**20:.2f}"]
    bounds = [f"{branch.speedup(3):.2f}", f"{branch.speedup(7):.2f}"]
    row = ["2", "0/2", "6.222", "2.239", "36.0%", "0.50", *hoisted, *bounds]
    assert row in words
    assert [line[0] for line in words if len(line) == len(row) and "/" in line[1]] == [str(n) for n in range(12)]
    assert "without attention products: full 6.054 GMAC; shallow, by branch: 0.4940, 1.283," in text


def test_a_pipelines_directory_is_planned_without_reading_weights(pipeline: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for name in ("model_index.json", "unet/config.json", "vae/config.json"):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_text((pipeline / name).read_text())
    report = tmp_path / "plan.json"
    found, text = run(bare, dtype="float32", json=report)
    assert found.model == "UNet2DConditionModel"
    assert found.inputs.startswith("sample 2x4x8x8, timestep scalar, encoder_hidden_states 2x77x16")
    assert [branch.cache_bytes for branch in found.branches] == [
        4 * 2 * n for n in (16 * 64, 32 * 64, 32 * 16, 32 * 16)
    ]
    assert "N=10" in text
    assert json.loads(report.read_text()) == {"name": str(bare), **found.to_dict()}


def test_a_unets_directory_takes_sizes_of_its_input(tmp_path: Path) -> None:
    sd_unet(**SMALL).save_config(tmp_path)
    found, _ = run(tmp_path, height=16, width=8, batch=1)
    assert found.inputs.startswith("sample 1x4x16x8,")


def test_sizes_are_pixels_of_the_picture_where_there_is_an_autoencoder(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_model(str(pipeline))[1] == 1  # the test pipeline's has one level
    for name, levels in (("vae", {"block_out_channels": [8, 8, 8, 8]}), ("vqvae", {"block_out_channels": [8, 8, 8]})):
        for part in ("unet", name):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "unet/config.json").write_text((pipeline / "unet/config.json").read_text())
        (tmp_path / name / name / "config.json").write_text(json.dumps(levels))
    assert read_model(str(tmp_path / "vae"))[1] == 8
    assert read_model(str(tmp_path / "vqvae"))[1] == 4
    asked = []
    monkeypatch.setattr(cli_plan, "plan", lambda unet, **options: asked.append(options["example_inputs"]["sample"]))
    monkeypatch.setattr(cli_plan, "_print", lambda *_: None)
    for model, height, width in ((tmp_path / "vae", 64, 128), ("sd15", 768, None), ("ldm4-imagenet", 128, 256)):
        plan_command(str(model), height=height, width=width)
    assert [tuple(sample.shape) for sample in asked] == [(2, 4, 8, 16), (2, 4, 96, 64), (1, 3, 32, 64)]
    with pytest.raises(DeepCacheError, match="height must be a multiple of 8, the size of a latent pixel; got 100"):
        plan_command("sd15", height=100)


def test_a_name_on_the_hub_is_asked_for_its_unet_then_for_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    config = {"_class_name": "UNet2DModel", "down_block_types": []}

    def load_config(name: str, subfolder: str | None = None) -> dict[str, Any]:
        asked.append((name, subfolder))
        if subfolder is not None:
            raise OSError("no such file")
        return config

    monkeypatch.setattr(UNet2DConditionModel, "load_config", load_config)
    assert read_model("google/ddpm-cifar10-32") == (config, 1)
    assert asked[:2] == [("google/ddpm-cifar10-32", "unet"), ("google/ddpm-cifar10-32", None)]


def test_what_the_hub_answers_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_config(*_: Any, **__: Any) -> None:
        raise OSError("cannot connect:\n  no route")

    monkeypatch.setattr(UNet2DConditionModel, "load_config", load_config)
    with pytest.raises(DeepCacheError, match=r"^no UNet is found in someone/something: cannot connect: no route$"):
        plan_command("someone/something")


@pytest.mark.parametrize("model", ["sd16", "./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_name_that_can_be_nothing_is_answered_with_the_presets(model: str) -> None:
    with pytest.raises(DeepCacheError, match=r"is no preset \(sd15, .*\), no directory and no name on the Hub"):
        plan_command(model)


def test_a_directory_without_a_unet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeepCacheError, match=r"no UNet is found in .*: there is no .*config\.json"):
        plan_command(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DeepCacheError, match=r"no UNet is found in .* is not a valid JSON file"):
        plan_command(str(tmp_path))


def test_a_directory_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "CLIPTextModel"}')
    with pytest.raises(DeepCacheError, match="diffusers has no model of that name"):
        plan_command(str(tmp_path))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_captured(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "plan.json"):
        with pytest.raises(DeepCacheError, match="cannot be written"):
            plan_command("sd15", json=path)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DeepCacheError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        plan_command("sd15", dtype="int8")
