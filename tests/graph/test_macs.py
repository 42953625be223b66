"""MAC counts: operator by operator by hand, and whole UNets against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from deepcache_fx.graph.macs import Macs, node_macs, total_macs
from deepcache_fx.planning.example_inputs import example_inputs
from deepcache_fx.planning.plan import plan
from tests.families import family
from tests.models import sdxl_unet

aten = torch.ops.aten


def call(target: Callable[..., Any], *arguments: Any, weights: bool = False) -> tuple[fx.Node, int]:
    """A node that calls `target`, with shapes for tensors; and the floating-point operations that PyTorch counts."""
    graph = fx.Graph()
    nodes, tensors = [], []
    for argument in arguments:
        if isinstance(argument, torch.Size):
            is_weight = weights and len(nodes) == len(arguments) - 1
            nodes.append((graph.get_attr if is_weight else graph.placeholder)(f"input_{len(nodes)}"))
            nodes[-1].meta["val"] = torch.empty(argument, device="meta")
            tensors.append(nodes[-1].meta["val"])
        else:
            nodes.append(argument)
            tensors.append(argument)
    node = graph.call_function(target, tuple(nodes))
    with FlopCounterMode(display=False) as counter:
        node.meta["val"] = target(*tensors)
    return node, counter.get_total_flops()


def of(*sizes: int) -> torch.Size:
    return torch.Size(sizes)


CONTRACTIONS = {
    "linear": (aten.linear.default, (of(2, 7, 8), of(5, 8)), Macs(dense=2 * 7 * 8 * 5)),
    "conv1d": (aten.conv1d.default, (of(2, 4, 9), of(6, 4, 3)), Macs(dense=2 * 6 * 7 * 4 * 3)),
    "conv2d, strided": (
        aten.conv2d.default,
        (of(2, 4, 9, 9), of(6, 4, 3, 3), None, [2, 2]),
        Macs(dense=2 * 6 * 4 * 4 * 4 * 9),
    ),
    "conv2d, grouped": (
        aten.conv2d.default,
        (of(2, 4, 8, 8), of(6, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], 2),
        Macs(dense=2 * 6 * 64 * 2),
    ),
    "conv2d, padded by name": (
        aten.conv2d.padding,
        (of(2, 4, 8, 8), of(6, 4, 3, 3), None, [1, 1], "same"),
        Macs(dense=2 * 6 * 64 * 4 * 9),
    ),
    "conv3d": (aten.conv3d.default, (of(1, 2, 4, 4, 4), of(3, 2, 3, 1, 1)), Macs(dense=3 * 2 * 16 * 2 * 3)),
    "convolution": (
        aten.convolution.default,
        (of(2, 4, 9, 9), of(6, 4, 3, 3), None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
        Macs(dense=2 * 6 * 16 * 4 * 9),
    ),
    "convolution, transposed": (
        aten.convolution.default,
        (of(2, 4, 5, 5), of(4, 6, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        Macs(dense=2 * 4 * 25 * 6 * 9),
    ),
    "conv_transpose1d": (aten.conv_transpose1d.default, (of(2, 4, 5), of(4, 6, 3)), Macs(dense=2 * 4 * 5 * 6 * 3)),
    "conv_transpose2d, grouped": (
        aten.conv_transpose2d.input,
        (of(2, 4, 5, 5), of(4, 3, 2, 2), None, [2, 2], [0, 0], [0, 0], 2),
        Macs(dense=2 * 4 * 25 * 3 * 4),
    ),
    "conv_transpose3d": (
        aten.conv_transpose3d.input,
        (of(1, 2, 3, 3, 3), of(2, 5, 2, 2, 2)),
        Macs(dense=2 * 27 * 5 * 8),
    ),
    "mm": (aten.mm.default, (of(3, 4), of(4, 5)), Macs(attention=3 * 4 * 5)),
    "bmm": (aten.bmm.default, (of(2, 3, 4), of(2, 4, 5)), Macs(attention=2 * 3 * 4 * 5)),
    "matmul, broadcast": (aten.matmul.default, (of(2, 1, 3, 4), of(6, 4, 5)), Macs(attention=2 * 6 * 3 * 4 * 5)),
    "addmm": (aten.addmm.default, (of(5), of(3, 4), of(4, 5)), Macs(attention=3 * 4 * 5)),
    "baddbmm": (aten.baddbmm.default, (of(2, 3, 5), of(2, 3, 4), of(2, 4, 5)), Macs(attention=2 * 3 * 4 * 5)),
    "tensordot": (aten.tensordot.default, (of(3, 4), of(4, 5), [1], [0]), Macs(attention=3 * 4 * 5)),
    "inner": (aten.inner.default, (of(3, 4), of(5, 4)), Macs(attention=3 * 4 * 5)),
    "attention": (
        aten.scaled_dot_product_attention.default,
        (of(2, 3, 7, 8), of(2, 3, 5, 8), of(2, 3, 5, 8)),
        Macs(attention=2 * 3 * 7 * 5 * (8 + 8)),
    ),
    "attention, wider values": (
        aten.scaled_dot_product_attention.default,
        (of(2, 3, 7, 8), of(2, 3, 5, 8), of(2, 3, 5, 6)),
        Macs(attention=2 * 3 * 7 * 5 * (8 + 6)),
    ),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_contraction_counts_as_by_hand_and_as_pytorch_counts_it(name: str) -> None:
    target, arguments, expected = CONTRACTIONS[name]
    node, operations = call(target, *arguments)
    assert node_macs(node) == expected
    assert operations == 2 * expected.total


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.add.Tensor, (of(2, 3), of(2, 3))),
        (aten.silu.default, (of(2, 3),)),
        (aten.group_norm.default, (of(2, 4, 3, 3), 2)),
        (aten.upsample_nearest2d.vec, (of(1, 2, 4, 4), None, [2.0, 2.0])),
    ],
)
def test_what_is_no_contraction_counts_nothing(target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    node, _ = call(target, *arguments)
    assert node_macs(node) == Macs()
    assert [node_macs(argument) for argument in node.all_input_nodes] == [Macs()] * len(node.all_input_nodes)


def test_counts_add_up_kind_by_kind() -> None:
    linear, _ = call(*flatten("linear"))
    attention, _ = call(*flatten("attention"))
    total = total_macs([linear, attention, linear])
    assert total == Macs(dense=2 * 560, attention=3360)
    assert total.total == 4480


def flatten(name: str) -> tuple[Any, ...]:
    target, arguments, _ = CONTRACTIONS[name]
    return target, *arguments


def plain_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def conditional_unet() -> UNet2DConditionModel:
    """With everything that SDXL counts: transformers of several layers, linear projections, embedded sizes."""
    return sdxl_unet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
    )


@pytest.mark.parametrize("make", family([plain_unet, conditional_unet], plain_unet))
def test_a_whole_unet_counts_as_pytorch_counts_it(make: Callable[[], torch.nn.Module]) -> None:
    with torch.device("meta"):  # where attention is counted: PyTorch's counter does not know the CPU's fused kernel
        unet = make()
    inputs = example_inputs(unet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    counted = plan(unet, example_inputs=inputs).full
    assert counted.attention > 0
    assert counter.get_total_flops() == 2 * counted.total


@pytest.mark.parametrize("name", ["mm", "bmm", "matmul, broadcast", "addmm", "baddbmm"])
def test_a_product_with_a_parameter_belongs_to_a_layer(name: str) -> None:
    node, _ = call(*flatten(name), weights=True)
    assert node_macs(node) == Macs(dense=CONTRACTIONS[name][2].attention)
    transposed = node.graph.call_function(aten.t.default, (node.args[-1],))
    transposed.meta["val"] = node.args[-1].meta["val"]
    node.args = (*node.args[:-1], transposed)
    assert node_macs(node) == Macs(dense=CONTRACTIONS[name][2].attention)


def test_attention_as_an_einsum_of_two_activations_is_counted() -> None:
    graph = fx.Graph()
    query, key = graph.placeholder("query"), graph.placeholder("key")
    query.meta["val"] = torch.empty(2, 8, 7, device="meta")
    key.meta["val"] = torch.empty(2, 8, 5, device="meta")
    node = graph.call_function(aten.einsum.default, ("bct,bcs->bts", [query, key]))
    assert node_macs(node) == Macs(attention=2 * 8 * 7 * 5)


def test_attention_written_out_as_matrix_products_counts_the_same() -> None:
    unet = conditional_unet()
    unet.set_attn_processor(AttnProcessor2_0())
    fused = plan(unet).full
    unet.set_attn_processor(AttnProcessor())
    assert plan(unet).full == fused
