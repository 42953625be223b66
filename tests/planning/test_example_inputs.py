"""Inputs made up from a configuration: the UNet runs on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    I2VGenXLUNet,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.planning.example_inputs import example_inputs
from tests.models import TEXT, sd_unet, sdxl_unet


def plain_unet(**changes: object) -> UNet2DModel:
    config: dict[str, object] = dict(
        sample_size=(8, 16),
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return UNet2DModel(**{**config, **changes}).eval()


def svd_unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        cross_attention_dim=TEXT,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
    ).eval()


def volume_unet() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(16, 32),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def motion_unet() -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(16, 32),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
    ).eval()


KANDINSKY = dict(addition_embed_type="image", encoder_hid_dim=24, encoder_hid_dim_type="image_proj")

UNETS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "DDPM": (plain_unet, {"sample": (2, 3, 8, 16), "timestep": ()}),
    "DDPM, classes": (lambda: plain_unet(num_class_embeds=10), {"class_labels": (2,)}),
    "DDPM, class as a time": (lambda: plain_unet(class_embed_type="timestep"), {"class_labels": (2,)}),
    "DDPM, class as it is": (lambda: plain_unet(class_embed_type="identity"), {"class_labels": (2, 64)}),
    "SD": (sd_unet, {"sample": (2, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 77, TEXT)}),
    "SD, classes": (lambda: sd_unet(num_class_embeds=10), {"class_labels": (2,)}),
    "SD, projected class": (
        lambda: sd_unet(class_embed_type="projection", projection_class_embeddings_input_dim=12),
        {"class_labels": (2, 12)},
    ),
    "SD, simply projected class": (
        lambda: sd_unet(class_embed_type="simple_projection", projection_class_embeddings_input_dim=12),
        {"class_labels": (2, 12)},
    ),
    "SD, class as it is": (lambda: sd_unet(class_embed_type="identity"), {"class_labels": (2, 64)}),
    "SD, a width for each block": (
        lambda: sd_unet(cross_attention_dim=(TEXT, TEXT, TEXT)),
        {"encoder_hidden_states": (2, 77, TEXT)},
    ),
    "distilled": (lambda: sd_unet(time_cond_proj_dim=20), {"timestep_cond": (2, 20)}),
    "projected text": (lambda: sd_unet(encoder_hid_dim=24), {"encoder_hidden_states": (2, 77, 24)}),
    "pooled text": (
        lambda: sd_unet(addition_embed_type="text", addition_embed_type_num_heads=2),
        {"encoder_hidden_states": (2, 77, TEXT)},
    ),
    "SDXL": (sdxl_unet, {"added_cond_kwargs": {"text_embeds": (2, TEXT), "time_ids": (2, 6)}}),
    "SDXL refiner": (
        lambda: sdxl_unet(projection_class_embeddings_input_dim=5 * 8 + TEXT),
        {"added_cond_kwargs": {"text_embeds": (2, TEXT), "time_ids": (2, 5)}},
    ),
    "Kandinsky 2.1": (
        lambda: sd_unet(addition_embed_type="text_image", encoder_hid_dim=24, encoder_hid_dim_type="text_image_proj"),
        {
            "encoder_hidden_states": (2, 77, 24),
            "added_cond_kwargs": {"text_embeds": (2, TEXT), "image_embeds": (2, TEXT)},
        },
    ),
    "Kandinsky 2.2": (
        lambda: sd_unet(**KANDINSKY),
        {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": (2, 24)}},
    ),
    "SVD": (
        svd_unet,
        {"sample": (2, 3, 8, 8, 8), "encoder_hidden_states": (2, 1, TEXT), "added_time_ids": (2, 3)},
    ),
    "text to video": (volume_unet, {"sample": (2, 4, 16, 8, 8), "encoder_hidden_states": (2, 77, TEXT)}),
    "AnimateDiff": (motion_unet, {"sample": (2, 4, 16, 8, 8), "encoder_hidden_states": (32, 77, TEXT)}),
}


def shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return {name: shapes(item) for name, item in value.items()} if isinstance(value, dict) else value


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_runs_on_the_inputs(name: str) -> None:
    make, expected = UNETS[name]
    unet = make()
    inputs = example_inputs(unet)
    found = shapes(inputs)
    assert {key: found.get(key, "absent") for key in expected} == expected
    with torch.no_grad():
        output = unet(**inputs).sample
    # Of the input's size, with the model's own number of channels.
    sample = list(inputs["sample"].shape)
    sample[sample.index(unet.config.in_channels, 1)] = unet.config.out_channels
    assert list(output.shape) == sample
    assert output.isfinite().all()


def test_a_plain_unet_is_given_nothing_it_does_not_ask_for() -> None:
    assert set(example_inputs(sd_unet())) == {"sample", "timestep", "encoder_hidden_states"}


def test_sizes_replace_those_of_the_configuration() -> None:
    inputs = example_inputs(sd_unet(), batch=3, height=16, width=24, tokens=5)
    assert shapes(inputs) == {"sample": (3, 4, 16, 24), "timestep": (), "encoder_hidden_states": (3, 5, TEXT)}
    assert example_inputs(svd_unet(), frames=2, width=4)["sample"].shape == (2, 2, 8, 8, 4)
    assert example_inputs(plain_unet(), height=32)["sample"].shape == (2, 3, 32, 16)


def test_inputs_have_the_device_and_dtype_of_the_unet() -> None:
    found = tensors(example_inputs(sdxl_unet().to(torch.float64)))
    assert {tensor.dtype for tensor in found} == {torch.float64, torch.int64}
    with torch.device("meta"):
        unet = sdxl_unet()
    assert {tensor.device.type for tensor in tensors(example_inputs(unet))} == {"meta"}
    assert shapes(example_inputs(unet)) == shapes(example_inputs(sdxl_unet()))


def test_inputs_are_the_same_noise_every_time_and_leave_the_global_generator_alone() -> None:
    unet = sdxl_unet()
    state = torch.get_rng_state()
    first, second = tensors(example_inputs(unet)), tensors(example_inputs(unet))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))
    assert 0.8 < first[0].std() < 1.2


def test_an_optimised_unet_gets_the_inputs_of_the_original() -> None:
    unet = sd_unet()
    before = shapes(example_inputs(unet))
    deepcache_fx.optimize(unet)
    assert shapes(example_inputs(unet)) == before


def i2vgen_unet() -> I2VGenXLUNet:
    return I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        norm_num_groups=2,
    )


def hinted_unet() -> UNet2DConditionModel:
    return sd_unet(**{**KANDINSKY, "addition_embed_type": "image_hint"})


def ambiguous_unet() -> UNet2DConditionModel:
    return sdxl_unet(projection_class_embeddings_input_dim=5 * 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Conv2d(3, 3, 1), "Conv2d has no configuration of diffusers"),
        (i2vgen_unet, "argument fps can be made up for I2VGenXLUNet"),
        (hinted_unet, "image_hint can be made up for UNet2DConditionModel"),
        (ambiguous_unet, "text_embeds and time_ids"),
        (lambda: UNet1DModel(block_out_channels=(32, 32, 64)), "a sequence can be made up for UNet1DModel"),
    ],
)
def test_where_nothing_can_be_made_up_the_error_names_what_to_pass(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DeepCacheError, match=rf"{message}.*pass example_inputs="):
        example_inputs(make())


def test_a_configuration_without_a_size_asks_for_one() -> None:
    unet = plain_unet(sample_size=None)
    with pytest.raises(DeepCacheError, match="UNet2DModel has no sample_size: pass height= and width="):
        example_inputs(unet, height=8)
    assert example_inputs(unet, height=8, width=8)["sample"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"height": -1}, {"width": 1.5}, {"tokens": True}])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(sizes: dict[str, Any]) -> None:
    with pytest.raises(DeepCacheError, match=f"{next(iter(sizes))} must be an integer of at least 1"):
        example_inputs(sd_unet(), **sizes)
