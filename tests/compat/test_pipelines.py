"""The pipelines give the latents of the published ones, which were recorded with the diffusers of their time."""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import deepcache_fx
from deepcache_fx import compat
from deepcache_fx.runtime.attach import runtime_of
from tests import models, small
from tests.compat.settings import RECORDED, SETTINGS, latents, name, pipeline
from tests.families import family, thorough

CLASSES = {
    "sd": (compat.StableDiffusionPipeline, diffusers.UNet2DConditionModel),
    "sdxl": (compat.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel),
    "sdxl-img2img": (compat.StableDiffusionXLImg2ImgPipeline, diffusers.UNet2DConditionModel),
    "svd": (compat.StableVideoDiffusionPipeline, diffusers.UNetSpatioTemporalConditionModel),
}
EAGER = {"forecast": 0, "backend": "eager"}
ON = dict(cache_layer_id=0, cache_block_id=0)
CALL = dict(prompt="a cat", num_inference_steps=6, guidance_scale=5.0, output_type="latent", **small.SIZE)


def made(kind: str) -> Any:
    pipe = pipeline(kind, *CLASSES[kind])
    pipe.cache_options = EAGER
    return pipe


def plain_pipeline() -> Any:
    """Of diffusers, with attention where the published code needs it."""
    return models.sd_pipeline(models.sd_unet(**small.ATTENTION_ON_TOP))


def of_diffusers(pipe: Any) -> Any:
    """The same parts in the pipeline of ours."""
    pipe = compat.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.cache_options = EAGER
    return pipe


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    return pipe(**{**CALL, **arguments, "generator": torch.Generator().manual_seed(0)}).images


@functools.lru_cache
def shared(kind: str) -> Any:
    """One pipeline for all settings: other values in the next call follow one another."""
    return made(kind)


ALL = [(f"{kind} {name(one)}", kind, one) for kind, settings in SETTINGS.items() if kind != "svd" for one in settings]
"""But for SVD: its latents differ between the diffusers of the records and of today without any cache, too."""
PLMS = [which for which, kind, one in ALL if kind == "sd" and (one["scheduler"], one["steps"]) == ("pndm", 20)]


@pytest.mark.parametrize(("which", "kind", "setting"), family(ALL, *PLMS[1:3]))
def test_every_setting_gives_the_published_latents(which: str, kind: str, setting: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # settings that cache nothing
        actual = latents(kind, shared(kind), setting)
    expected = load_file(RECORDED)[which]
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_the_recorded_settings_are_those_that_are_tested() -> None:
    assert set(load_file(RECORDED)) == {
        f"{kind} {name(one)}" for kind, settings in SETTINGS.items() for one in settings
    }


def test_other_values_in_the_next_call_capture_nothing_anew_and_calls_without_them_are_uncached() -> None:
    plain = plain_pipeline()
    uncached = run(plain)
    pipe = of_diffusers(plain)
    cached = run(pipe, cache_interval=3, **ON)
    assert not torch.equal(cached, uncached)
    assert torch.equal(run(pipe), uncached)
    assert runtime_of(pipe.unet) is None
    captured = []
    for interval, more in ((2, {}), (3, {}), (3, dict(uniform=False, pow=1.2, center=2)), (3, {})):
        callback = lambda pipe, *_: captured.append(deepcache_fx.report(pipe).captures) or {}  # noqa: E731
        last = run(pipe, cache_interval=interval, **ON, **more, callback_on_step_end=callback)
    assert set(captured) == {1}
    assert torch.equal(last, cached)


def test_what_caches_nothing_as_published_says_so() -> None:
    pipe = of_diffusers(plain_pipeline())
    uncached = run(pipe)
    for given, message in (({}, "give cache_layer_id=0"), (dict(cache_layer_id=1, cache_block_id=1), "too deep")):
        with pytest.warns(UserWarning, match=message):
            assert torch.equal(run(pipe, cache_interval=3, **given), uncached)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(cache_layer_id=0), "go together"),
        (dict(cache_layer_id=9, cache_block_id=0), "no down block 9: this UNet2DConditionModel has 2"),
        (dict(cache_layer_id=0, cache_block_id=7), "modules 0 to 1, .*got 7"),
        (dict(**ON, output_all_sequence=True), "callback_on_step_end"),
    ],
)
def test_bad_settings_are_refused_and_the_pipeline_goes_on(arguments: dict[str, Any], message: str) -> None:
    pipe = of_diffusers(plain_pipeline())
    with pytest.raises(ValueError, match=message):
        run(pipe, cache_interval=3, **arguments)
    assert runtime_of(pipe.unet) is None
    assert run(pipe).isfinite().all()


@thorough
def test_a_call_that_raises_leaves_the_cache_off_and_the_next_is_as_a_fresh_one() -> None:
    pipe = of_diffusers(plain_pipeline())
    cached = run(pipe, cache_interval=3, **ON)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, cache_interval=3, **ON, callback_on_step_end=stop)
    assert runtime_of(pipe.unet) is None
    assert torch.equal(run(pipe, cache_interval=3, **ON), cached)


def test_a_saved_pipeline_is_one_of_diffusers(tmp_path: Path) -> None:
    of_diffusers(plain_pipeline()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    loaded = compat.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is compat.StableDiffusionPipeline


def test_the_signature_tells_the_settings() -> None:
    found = inspect.signature(compat.StableDiffusionXLPipeline.__call__).parameters
    assert {"prompt", "cache_interval", "cache_layer_id", "cache_block_id", "uniform", "pow", "center"} <= set(found)
