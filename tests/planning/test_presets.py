"""The presets are the published models: their sizes, and the multiply-accumulates that the papers print."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from deepcache_fx import DeepCacheError
from deepcache_fx.planning.plan import Plan, plan
from deepcache_fx.planning.presets import PRESETS, Preset, build_unet, preset
from deepcache_fx.schedules.patterns import Uniform
from tests.families import family, thorough

TINY = dict(
    _class_name="UNet2DModel",
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)


@cache
def planned(name: str) -> Plan:
    unet = preset(name).build()
    return plan(unet, example_inputs=preset(name).inputs(unet))


# Parameters of the published weights: exact where they are widely quoted, else as the paper or the page rounds them.
PARAMETERS = {
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "sdxl-refiner": 2.3e9,
    "svd": 1_524_623_082,
    "ldm4-imagenet": 400e6,
    "ddpm-church": 113.7e6,
    "ddpm-bedroom": 113.7e6,
    "ddpm-cifar10": 35.7e6,
}


@pytest.mark.parametrize("name", family(PRESETS, "sd15", "ddpm-cifar10"))
def test_the_number_of_parameters_is_that_of_the_published_weights(name: str) -> None:
    count = sum(parameter.numel() for parameter in preset(name).build().parameters())
    published = PARAMETERS[name]
    if isinstance(published, int):
        assert count == published
    else:
        assert count == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", family(PRESETS, "sd15", "ddpm-cifar10"))
def test_a_preset_on_the_meta_device_has_no_weights_and_evaluates(name: str) -> None:
    unet = preset(name).build()
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert not unet.training
    assert type(unet).__name__ == preset(name).config["_class_name"]


SHAPES = {
    "sd15": {"sample": (2, 4, 64, 64), "encoder_hidden_states": (2, 77, 768)},
    "sd21": {"sample": (2, 4, 96, 96), "encoder_hidden_states": (2, 77, 1024)},
    "sdxl": {
        "sample": (2, 4, 128, 128),
        "encoder_hidden_states": (2, 77, 2048),
        "text_embeds": (2, 1280),
        "time_ids": (2, 6),
    },
    "sdxl-refiner": {
        "sample": (2, 4, 128, 128),
        "encoder_hidden_states": (2, 77, 1280),
        "text_embeds": (2, 1280),
        "time_ids": (2, 5),
    },
    "svd": {"sample": (2, 14, 8, 72, 128), "encoder_hidden_states": (2, 1, 1024), "added_time_ids": (2, 3)},
    "ldm4-imagenet": {"sample": (1, 3, 64, 64), "encoder_hidden_states": (1, 1, 512)},
    "ddpm-church": {"sample": (1, 3, 256, 256)},
    "ddpm-bedroom": {"sample": (1, 3, 256, 256)},
    "ddpm-cifar10": {"sample": (1, 3, 32, 32)},
}


@pytest.mark.parametrize("name", family(PRESETS, "sd15", "ddpm-cifar10"))
def test_the_inputs_are_those_of_one_call_of_the_pipeline(name: str) -> None:
    item = preset(name)
    inputs = item.inputs(item.build(dtype=torch.float16))
    inputs.update(inputs.pop("added_cond_kwargs", {}))
    assert inputs.pop("timestep").shape == ()
    assert {key: tuple(value.shape) for key, value in inputs.items()} == SHAPES[name]
    assert {value.dtype for value in inputs.values()} == {torch.float16}


def test_the_call_can_have_other_sizes() -> None:
    item = preset("sd15")
    assert item.inputs(item.build(), batch=6, height=96, width=32)["sample"].shape == (6, 4, 96, 32)


# Billions of MACs for an image with classifier-free guidance: of the whole UNet, and of shallow steps by branch.
GUIDED = {
    "sd15": (803.3, {0: 63.3, 1: 180.1}, 0.133),
    "sd21": (2149.1, {0: 202.6}, 0.093),
    "sdxl": (6761.2, {0: 98.1, 1: 255.8, 3: 871.8}, 0.342),
}
"""The last: which part of the shallow steps of branch 0 depends on the cached feature alone."""


@thorough
@pytest.mark.parametrize("name", family(GUIDED, "sd15"))
def test_stable_diffusion_costs_what_is_known_to_a_tenth_of_a_gigamac(name: str) -> None:
    full, shallow, hoisted = GUIDED[name]
    found = planned(name)
    assert found.full.total / 1e9 == pytest.approx(full, abs=0.06)
    for branch, expected in shallow.items():
        assert found.branches[branch].shallow.total / 1e9 == pytest.approx(expected, abs=0.06)
    first = found.branches[0]
    assert 1 - first.hoisted.total / first.shallow.total == pytest.approx(hoisted, abs=0.0006)
    assert first.hoisted_cache_bytes == 2 * first.cache_bytes


# DeepCache, arXiv 2312.00858: MACs of a step, and their mean over all steps with 1:N caching at a branch. The paper's
# counter sees layers, not the products inside attention.
PUBLISHED = {
    "ddpm-cifar10": (6.1, 2, 100, {2: 4.15, 3: 3.54, 5: 3.01, 10: 2.63}),
    "ldm4-imagenet": (99.82, 0, 250, {2: 52.12, 3: 36.48, 5: 23.50, 10: 13.97}),
    "ddpm-church": (248.7, 2, 100, {3: 172.3, 5: 156.0}),
}


@pytest.mark.parametrize("name", family(PUBLISHED, "ddpm-cifar10"))
def test_the_papers_models_cost_what_the_paper_prints_within_two_per_cent(name: str) -> None:
    full, branch, num_steps, means = PUBLISHED[name]
    found = planned(name)
    assert found.full.dense / 1e9 == pytest.approx(full, rel=0.02)
    for interval, mean in means.items():
        steps = len(Uniform(interval).full_steps(num_steps))
        total = steps * found.full.dense + (num_steps - steps) * found.branches[branch].shallow.dense
        assert total / num_steps / 1e9 == pytest.approx(mean, rel=0.02), interval


def test_church_and_bedroom_are_one_network() -> None:
    assert preset("ddpm-bedroom").config == preset("ddpm-church").config


@thorough
@pytest.mark.parametrize(("name", "layers"), [("sdxl-refiner", [3, 3, 3, 3]), ("svd", [3, 3, 3, 3])])
def test_the_larger_presets_can_be_planned(name: str, layers: list[int]) -> None:
    branches = planned(name).branches
    assert [sum(branch.block == block for branch in branches) for block in range(4)] == layers
    assert len(branches) == sum(layers)
    assert 0 < branches[0].share < 0.1


def test_a_built_model_with_weights_runs_on_its_inputs() -> None:
    item = Preset("tiny", "nowhere", TINY, 1, 8, 8)
    unet = item.build(device="cpu", dtype=torch.float64)
    with torch.no_grad():
        output = unet(**item.inputs(unet)).sample
    assert output.dtype == torch.float64
    assert output.shape == (1, 3, 8, 8)
    assert output.abs().sum() > 0


def test_an_unknown_name_is_answered_with_the_names() -> None:
    with pytest.raises(DeepCacheError, match="there is no preset 'sd3'; there are: sd15, sd21, sdxl, sdxl-refiner"):
        preset("sd3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet9DModel"}, "_class_name is 'UNet9DModel': diffusers has no model"),
        ({"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler': diffusers has no model"),
        ({"_class_name": None}, "_class_name is None: diffusers has no model"),
        ({"up_block_types": ("UpBlock2D",)}, "UNet2DModel refuses its configuration"),
    ],
)
def test_a_configuration_that_builds_nothing_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DeepCacheError, match=message):
        build_unet({**TINY, **changes})
