"""LoRA through diffusers' own loaders and peft: after every change the output is that of the model run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import deepcache_fx
from tests import models
from tests.families import family, thorough
from tests.oracles import REPEATING, TO_THE_BIT, specified
from tests.whole.test_stacking import check_cached, check_works, difference, make_unet, oracle

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of different ranks and scales in files, as a hub holds them."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate({"a": 2, "b": 3}.items()):
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        config = peft.LoraConfig(r=rank, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        unet = make_unet()
        unet.add_adapter(config)
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=peft.get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=config.to_dict(),
            weight_name=f"{name}.safetensors",
        )
    return folder


@pytest.fixture
def pipe() -> Any:
    return models.sd_pipeline(make_unet())


def load(pipe: Any, folder: Path, name: str, **how: Any) -> None:
    pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", **{"adapter_name": name, **how})
    pipe.unet.requires_grad_(False)


def both(pipe: Any, folder: Path) -> None:
    load(pipe, folder, "a")
    load(pipe, folder, "b")
    pipe.set_adapters(["a", "b"], [0.5, 2.0])


@pytest.mark.parametrize("fused", family([False, True], True))
def test_two_weighted_adapters_before_optimize(pipe: Any, adapters: Path, fused: bool) -> None:
    plain = oracle(pipe.unet)
    both(pipe, adapters)
    if fused:
        pipe.fuse_lora(adapter_names=["a", "b"])
        pipe.unload_lora_weights()
    assert difference(oracle(pipe.unet), plain) > 1e-3
    check_works(pipe.unet)


def train_on(pipe: Any) -> None:
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)


CHANGES: list[tuple[str, Callable[[Any, Path], object], int]] = [
    ("one is loaded", lambda pipe, folder: load(pipe, folder, "a"), 1),
    ("its values change in place", lambda pipe, folder: train_on(pipe), 0),
    ("a second one, both weighted", lambda pipe, folder: (load(pipe, folder, "b"), set_weights(pipe)), 1),
    ("other weights", lambda pipe, folder: pipe.set_adapters(["a", "b"], [0.7, -1.0]), 1),
    ("the weights before", lambda pipe, folder: set_weights(pipe), 0),
    ("fused", lambda pipe, folder: pipe.fuse_lora(adapter_names=["a", "b"]), 1),
    ("unfused", lambda pipe, folder: pipe.unfuse_lora(), 1),
    ("unloaded", lambda pipe, folder: pipe.unload_lora_weights(), 1),
]


def set_weights(pipe: Any) -> None:
    pipe.set_adapters(["a", "b"], [0.5, 2.0])


@thorough
def test_after_every_change_the_output_is_right_and_recaptures_are_counted(pipe: Any, adapters: Path) -> None:
    """What was there before is found again, and values that change in place need no capture."""
    with deepcache_fx.optimized(pipe.unet, interval=3, **REPEATING):
        check_cached(pipe.unet, last := oracle(pipe.unet))
        for name, change, recaptures in CHANGES:
            before = deepcache_fx.report(pipe.unet).captures
            change(pipe, adapters)
            expected = oracle(pipe.unet)
            assert name in ("fused", "unfused") or difference(expected, last) > 1e-3, name
            check_cached(pipe.unet, last := expected)
            assert deepcache_fx.report(pipe.unet).captures - before == recaptures, name


@pytest.mark.parametrize("prepared", family([True, False], True))
@thorough
def test_an_adapter_swapped_while_hot_is_seen_and_prepared_for_it_only_a_new_scale_is_captured(
    pipe: Any, adapters: Path, prepared: bool
) -> None:
    """Prepared, by `enable_lora_hotswap`, ranks are padded and scales are tensors: all of it changes in place."""
    if prepared:
        pipe.enable_lora_hotswap(target_rank=4)
    load(pipe, adapters, "a")
    with deepcache_fx.optimized(pipe.unet, interval=3, **REPEATING):
        for name, captures in ("a", 1), ("b", 2), ("a", 2 if prepared else 3):
            load(pipe, adapters, name, adapter_name="a", hotswap=True)
            check_cached(pipe.unet, oracle(pipe.unet))
            assert deepcache_fx.report(pipe.unet).captures == captures


def generate(pipe: Any, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    common = {"height": 8, "width": 8, "num_inference_steps": 6, "output_type": "latent", "generator": generator}
    return pipe("a cat", **{**common, **call}).images


def test_a_scale_given_with_the_call_is_part_of_the_call(pipe: Any, adapters: Path) -> None:
    """peft multiplies its scales by it and divides again: they are not the same to the last digit."""
    load(pipe, adapters, "a")
    scales = [0.3, 0.7, 0.3]
    expected = []
    for scale in scales:
        with specified(pipe, {0, 3}, 0):
            expected.append(generate(pipe, cross_attention_kwargs={"scale": scale}))
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    for scale, wanted in zip(scales, expected, strict=True):
        assert difference(generate(pipe, cross_attention_kwargs={"scale": scale}), wanted) < 1e-5
        assert deepcache_fx.report(pipe).last_run == "FssFss"
    assert difference(expected[0], expected[1]) > 1e-3
    assert deepcache_fx.report(pipe).captures == 2


def test_a_scale_that_a_callback_changes_within_a_run_shows_at_the_next_step(pipe: Any, adapters: Path) -> None:
    load(pipe, adapters, "a")

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            pipe.set_adapters("a", 0.2)
        return values

    def run() -> torch.Tensor:
        pipe.set_adapters("a", 1.5)
        return generate(pipe, callback_on_step_end=callback)

    with specified(pipe, {0, 3, 4}, 0):
        expected = run()
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    for _ in range(2):
        assert torch.equal(run(), expected)
        assert deepcache_fx.report(pipe).last_run == "FssFFs"
    assert deepcache_fx.report(pipe).captures == 2
