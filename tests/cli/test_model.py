"""A model named on the command line: where it is found, at which sizes, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from deepcache_fx import DeepCacheError
from deepcache_fx.cli.model import NamedModel, named_model, read_model
from tests.models import sd_pipeline, sd_unet


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pipeline"
    sd_pipeline(
        sd_unet(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    ).save_pretrained(path)
    return path


def build(
    model: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    dtype: str = "float16",
) -> NamedModel:
    with named_model(str(model), height=height, width=width, batch=batch, dtype=dtype) as found:
        return found


def test_a_unet_has_no_weights_and_says_where_it_is_from(pipeline: Path) -> None:
    preset, directory = build("ddpm-cifar10", batch=3, dtype="float32"), build(pipeline)
    assert (preset.source, directory.source) == ("google/ddpm-cifar10-32", str(pipeline))
    assert tuple(preset.inputs["sample"].shape) == (3, 3, 32, 32)
    for found, dtype in ((preset, "torch.float32"), (directory, "torch.float16")):
        assert {(p.device.type, str(p.dtype)) for p in found.unet.parameters()} == {("meta", dtype)}


def test_sizes_are_pixels_of_the_picture_where_there_is_an_autoencoder(pipeline: Path, tmp_path: Path) -> None:
    assert read_model(str(pipeline))[1] == 1  # the test pipeline's has one level
    for name, levels in (("vae", {"block_out_channels": [8, 8, 8, 8]}), ("vqvae", {"block_out_channels": [8, 8, 8]})):
        for part in ("unet", name):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "unet/config.json").write_text((pipeline / "unet/config.json").read_text())
        (tmp_path / name / name / "config.json").write_text(json.dumps(levels))
    assert read_model(str(tmp_path / "vae"))[1] == 8
    assert read_model(str(tmp_path / "vqvae"))[1] == 4
    sizes = ((tmp_path / "vae", 64, 128), ("sd15", 768, None), ("ldm4-imagenet", 128, 256))
    samples = [build(model, height=height, width=width).inputs["sample"] for model, height, width in sizes]
    assert [tuple(sample.shape) for sample in samples] == [(2, 4, 8, 16), (2, 4, 96, 64), (1, 3, 32, 64)]
    with pytest.raises(DeepCacheError, match="height must be a multiple of 8, the size of a latent pixel; got 100"):
        build("sd15", height=100)


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
        build("someone/something")


@pytest.mark.parametrize("model", ["sd16", "./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_name_that_can_be_nothing_is_answered_with_the_presets(model: str) -> None:
    with pytest.raises(DeepCacheError, match=r"is no preset \(sd15, .*\), no directory and no name on the Hub"):
        build(model)


def test_a_directory_without_a_unet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeepCacheError, match=r"no UNet is found in .*: there is no .*config\.json"):
        build(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DeepCacheError, match=r"no UNet is found in .* is not a valid JSON file"):
        build(tmp_path)


def test_a_directory_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "CLIPTextModel"}')
    with pytest.raises(DeepCacheError, match="diffusers has no model of that name"):
        build(tmp_path)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DeepCacheError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        build("sd15", dtype="int8")
