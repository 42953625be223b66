"""UNets the published code cannot run, against an eager run with the operand replaced: to the bit without passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor

import deepcache_fx
from tests import models
from tests.compvis import CompVisUNet
from tests.families import family, thorough
from tests.oracles import REPEATING, TO_THE_BIT, CatOracle, agree

Case = tuple[torch.nn.Module, Callable[[torch.Tensor], dict[str, Any]], tuple[int, ...]]


def ddpm(channels: tuple[int, ...], attention_level: int, layers: int) -> Case:
    """google/ddpm-*: `UNet2DModel`, attention at one resolution, asymmetric down-sampling."""
    down = tuple("AttnDownBlock2D" if i == attention_level else "DownBlock2D" for i in range(len(channels)))
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=None,
        norm_num_groups=4,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return unet, lambda x: {}, (2, 3, 16, 16)


def cifar10() -> Case:
    return ddpm((8, 16, 16), 1, 2)


def church_and_bedroom() -> Case:
    return ddpm((8, 8, 16, 16), 2, 1)


def ldm4_imagenet() -> Case:
    """LDM-4-G: a class label becomes the one token of the context."""
    unet = models.sd_unet(in_channels=3, out_channels=3, layers_per_block=1)
    return unet, lambda x: {"encoder_hidden_states": torch.randn(len(x), 1, models.TEXT)}, (2, 3, 8, 8)


def class_embedding() -> Case:
    unet = models.sd_unet(layers_per_block=1, class_embed_type=None, num_class_embeds=10)
    return (
        unet,
        lambda x: {
            "encoder_hidden_states": torch.randn(len(x), 4, models.TEXT),
            "class_labels": torch.arange(len(x)),
        },
        (2, 4, 8, 8),
    )


def gligen() -> Case:
    """Boxes join the tokens of self-attention, on axis 1."""
    unet = models.sd_unet(layers_per_block=1, attention_type="gated")
    for name, parameter in unet.named_parameters():
        if "alpha" in name:  # zero before it is trained
            torch.nn.init.ones_(parameter)

    def conditions(x: torch.Tensor) -> dict[str, Any]:
        boxes = {"boxes": torch.rand(len(x), 3, 4), "masks": torch.ones(len(x), 3)}
        boxes["positive_embeddings"] = torch.randn(len(x), 3, models.TEXT)
        context = torch.randn(len(x), 4, models.TEXT)
        return {"encoder_hidden_states": context, "cross_attention_kwargs": {"gligen": boxes}}

    return unet, conditions, (2, 4, 8, 8)


def text_beside_the_image_in_attention() -> Case:
    """Kandinsky 2 and unCLIP: keys and values of the text join those of the image, on axis 1."""
    unet = models.sd_unet(
        layers_per_block=1,
        encoder_hid_dim=models.TEXT,
        encoder_hid_dim_type="text_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    unet.set_attn_processor(AttnAddedKVProcessor())
    return unet, lambda x: {"encoder_hidden_states": torch.randn(len(x), 4, models.TEXT)}, (2, 4, 8, 8)


def svd() -> Case:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=2,
    )
    return (
        unet,
        lambda x: {
            "encoder_hidden_states": torch.randn(len(x), 1, 16),
            "added_time_ids": torch.randn(len(x), 3),
        },
        (1, 2, 8, 8, 8),
    )


def text_to_video() -> Case:
    unet = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return unet, lambda x: {"encoder_hidden_states": torch.randn(len(x), 4, 16)}, (1, 4, 2, 8, 8)


def compvis() -> Case:
    return CompVisUNet(mult=(1, 2, 2), blocks=2), lambda x: {"context": torch.randn(len(x), 3, 6)}, (2, 4, 8, 8)


CASES = (
    cifar10,
    church_and_bedroom,
    ldm4_imagenet,
    class_embedding,
    gligen,
    text_beside_the_image_in_attention,
    svd,
    text_to_video,
    compvis,
)
BRANCHES = {compvis: (0, 2, 4, 8), gligen: (5,), text_beside_the_image_in_attention: (5,)}


@torch.no_grad()
def run(call: Callable[..., Any], case: Case, timesteps: torch.Tensor) -> torch.Tensor:
    """A denoising loop; `call(step, x, t, **conditions)` answers with the model's prediction."""
    _, conditions, shape = case
    torch.manual_seed(3)
    x = torch.randn(shape)
    fixed = conditions(x)
    for step, t in enumerate(timesteps):
        output = call(step, x, t.expand(len(x)), **fixed)
        prediction = output if isinstance(output, torch.Tensor) else output[0]
        x = x.clone()
        channels = prediction.shape[-3] if x.ndim == 5 and prediction.shape[1] == x.shape[1] else prediction.shape[1]
        if x.ndim == 5 and x.shape[1] == prediction.shape[1] and x.shape[2] != prediction.shape[2]:
            x[:, :, :channels] -= 0.1 * prediction
        else:
            x -= 0.1 * prediction
    return x


@pytest.mark.parametrize("make", family(CASES, cifar10, compvis), ids=lambda make: make.__name__)
def test_equals_the_operand_replaced_by_the_one_of_the_last_full_step(make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    case = make()
    unet = case[0].eval()
    timesteps = torch.tensor([900, 800, 700, 600, 500])
    plain = run(lambda step, *args, **kwargs: unet(*args, **kwargs), case, timesteps)
    for branch in BRANCHES.get(make, (1,)):
        oracle = CatOracle(unet.forward, branch)
        expected = run(lambda step, *a, oracle=oracle, **k: oracle(step % 3 == 0, *a, **k), case, timesteps)
        assert not torch.equal(expected, plain), "caching must show for the comparison to mean anything"
        for options in (TO_THE_BIT, REPEATING):
            with deepcache_fx.optimized(unet, interval=3, branch=branch, **options):
                actual = run(lambda step, *args, **kwargs: unet(*args, **kwargs), case, timesteps)
                report = deepcache_fx.report(unet)
            assert agree(actual, expected, options)
            assert report.last_run == "FssFs"
            assert report.captures == 1


@pytest.mark.parametrize("make", family(CASES, cifar10), ids=lambda make: make.__name__)
def test_openvino_gives_what_the_graphs_give(make: Callable[[], Case]) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    torch.manual_seed(0)
    case = make()
    unet = case[0].eval()
    timesteps = torch.tensor([900, 800, 700])
    branch = BRANCHES.get(make, (1,))[0]
    found = {}
    for backend in ("eager", "openvino"):
        with deepcache_fx.optimized(unet, interval=3, branch=branch, forecast=1, backend=backend):
            found[backend] = run(lambda step, *args, **kwargs: unet(*args, **kwargs), case, timesteps)
            assert deepcache_fx.report(unet).backend == backend
    assert agree(found["openvino"], found["eager"], REPEATING)


@thorough
def test_compvis_blocks_are_grouped_by_resolution() -> None:
    unet = CompVisUNet(mult=(1, 2), blocks=1)
    inputs = {"x": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([1, 1]), "context": torch.randn(2, 3, 6)}
    for branch, number in (((0, 0), 0), ((0, 1), 1), ((1, 0), 2), ((1, 1), 3)):
        with deepcache_fx.optimized(unet, branch=branch, example_inputs=inputs):
            assert deepcache_fx.report(unet).signatures[0].branch == number
