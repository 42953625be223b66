"""What counts as a skip connection: what reads a concatenation shows that it joins channels. By hand and on models."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import getitem
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import deepcache_fx
from deepcache_fx import BranchError
from deepcache_fx.graph.channels import axis_readers
from deepcache_fx.graph.skips import find_skip_connections, require_skip_connections
from tests import token_models
from tests.families import family
from tests.graphs import GraphBuilder, captured
from tests.token_models import Case

aten = torch.ops.aten
Read = Callable[[GraphBuilder, fx.Node], fx.Node]


def conv(b: GraphBuilder, x: fx.Node, inputs: int, outputs: int, axes: int = 2) -> fx.Node:
    operator = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[axes]
    return b.op(operator, x, b.parameter(outputs, inputs, *[1] * axes))


def linear(b: GraphBuilder, x: fx.Node, width: int, outputs: int = 5) -> fx.Node:
    return b.op(aten.linear.default, x, b.parameter(outputs, width))


def permute(b: GraphBuilder, x: fx.Node, *axes: int) -> fx.Node:
    return b.op(aten.permute.default, x, list(axes))


def view(b: GraphBuilder, x: fx.Node, *shape: int) -> fx.Node:
    return b.op(aten.view.default, x, list(shape))


def joined_maps(read: Read) -> fx.Graph:
    """A deep and a shallow feature map, joined on axis 1 to (2, 9, 4, 6), and read."""
    b = GraphBuilder()
    skip = conv(b, b.input(2, 3, 4, 6), 3, 4)
    return b.build(read(b, b.op(aten.cat.default, [conv(b, skip, 4, 5), skip], 1))).graph


def joined_tokens(read: Read, tokens: int = 6, width: int = 8) -> fx.Graph:
    """A deep and a shallow sequence, joined on axis 1 to (2, 2 * tokens, width), and read."""
    b = GraphBuilder()
    skip = linear(b, b.input(2, tokens, 3), 3, width)
    deep = linear(b, skip, width, width)
    return b.build(read(b, b.op(aten.cat.default, [deep, skip], 1))).graph


def group_norm(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return b.op(aten.group_norm.default, x, 3)


def batch_norm(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return b.op(aten.batch_norm.default, x, None, None, b.parameter(9), b.parameter(9), False, 0.0, 1e-5, False)


def instance_norm(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return b.op(aten.instance_norm.default, x, None, None, None, None, True, 0.0, 1e-5, False)


def silu(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return b.op(aten.silu.default, x)


def normalized_by_hand(b: GraphBuilder, x: fx.Node) -> fx.Node:
    grouped = view(b, x, 2, 3, 3, 24)
    centred = b.op(aten.sub.Tensor, grouped, b.op(aten.mean.dim, grouped, [2, 3], True))
    scaled = b.op(aten.mul.Tensor, view(b, centred, 2, 9, 4, 6), b.parameter(9, 1, 1))
    return conv(b, scaled, 9, 5)


def a_third_of_the_channels(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return conv(b, b.op(aten.slice.Tensor, x, 1, 0, 3), 3, 5)


def one_of_three_parts(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return conv(b, b.op(getitem, b.op(aten.chunk.default, x, 3, 1), 1), 3, 5)


READ_AS_CHANNELS: dict[str, Read] = {
    "convolution": lambda b, x: conv(b, x, 9, 5),
    "transposed convolution": lambda b, x: b.op(aten.conv_transpose2d.input, x, b.parameter(9, 5, 1, 1)),
    "group norm": group_norm,
    "batch norm": batch_norm,
    "instance norm": instance_norm,
    "convolution after an activation": lambda b, x: conv(b, silu(b, x), 9, 5),
    "convolution after a cast": lambda b, x: conv(
        b, b.op(aten.to.dtype, b.op(aten.to.dtype, x, torch.float64), torch.float32), 9, 5
    ),
    "convolution after a copy in another order": lambda b, x: conv(
        b, b.op(aten.clone.default, x, memory_format=torch.channels_last), 9, 5
    ),
    "convolution after adding a bias": lambda b, x: conv(b, b.op(aten.add.Tensor, b.parameter(9, 1, 1), x), 9, 5),
    "convolution after enlarging": lambda b, x: conv(b, b.op(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0]), 9, 5),
    "convolution after padding": lambda b, x: conv(b, b.op(aten.pad.default, x, [1, 1, 1, 1]), 9, 5),
    "convolution of a part": a_third_of_the_channels,
    "convolution of a chunk": one_of_three_parts,
    "convolution of rows": lambda b, x: conv(b, b.op(aten.slice.Tensor, x, 2, 1, 3), 9, 5),
    "convolution after joining more channels": lambda b, x: conv(
        b, b.op(aten.cat.default, [b.input(2, 2, 4, 6), x], 1), 11, 5
    ),
    "group norm by hand": normalized_by_hand,
    "linear layer, channels last": lambda b, x: linear(b, permute(b, x, 0, 2, 3, 1), 9),
    "linear layer over a sequence of pixels": lambda b, x: linear(
        b, b.op(aten.transpose.int, view(b, x, 2, 9, 24), 1, 2), 9
    ),
    "linear layer, axis moved": lambda b, x: linear(b, b.op(aten.movedim.int, x, 1, -1), 9),
    "linear layer after a layer norm": lambda b, x: linear(
        b, b.op(aten.layer_norm.default, permute(b, x, 0, 2, 3, 1), [9]), 9
    ),
    "linear layer after all pixels of the batch are one axis": lambda b, x: linear(
        b, b.op(aten.reshape.default, permute(b, x, 0, 2, 3, 1), [48, 9]), 9
    ),
    "product with a weight": lambda b, x: b.op(aten.matmul.default, permute(b, x, 0, 2, 3, 1), b.parameter(9, 5)),
    "product of a weight": lambda b, x: b.op(aten.matmul.default, b.parameter(5, 9), view(b, x, 2, 9, 24)),
    "convolution, and a mean": lambda b, x: b.op(
        aten.add.Tensor, conv(b, x, 9, 5), b.op(aten.mean.dim, x, [1, 2, 3], True)
    ),
}


@pytest.mark.parametrize("read", READ_AS_CHANNELS)
def test_what_is_read_as_channels_is_a_skip_connection(read: str) -> None:
    assert len(find_skip_connections(joined_maps(READ_AS_CHANNELS[read]))) == 1


def attention(b: GraphBuilder, x: fx.Node) -> fx.Node:
    rows = view(b, x, 2, 9, 24)
    return b.op(aten.scaled_dot_product_attention.default, rows, rows, rows)


READ_OTHERWISE: dict[str, Read] = {
    "nothing": lambda b, x: x,
    "an activation": silu,
    "softmax": lambda b, x: b.op(aten.softmax.int, x, 1),
    "sum": lambda b, x: b.op(aten.sum.dim_IntList, x, [1]),
    "linear layer over the last axis": lambda b, x: linear(b, x, 6),
    "layer norm over the last axis": lambda b, x: b.op(aten.layer_norm.default, x, [6]),
    "product with a weight over the last axis": lambda b, x: b.op(aten.matmul.default, x, b.parameter(6, 5)),
    "product of activations": lambda b, x: b.op(aten.matmul.default, permute(b, x, 0, 2, 3, 1), b.input(2, 4, 9, 5)),
    "attention along it": attention,
    "convolution across it": lambda b, x: conv(b, permute(b, x, 0, 2, 1, 3), 4, 5),
    "group norm of another axis": lambda b, x: b.op(aten.group_norm.default, permute(b, x, 0, 3, 1, 2), 3),
    "convolution of every one alone": lambda b, x: conv(b, view(b, x, 18, 1, 4, 6), 1, 5),
    "linear layer over it and another axis mixed": lambda b, x: linear(
        b, b.op(aten.reshape.default, permute(b, x, 0, 2, 3, 1), [2, 4, 54]), 54
    ),
    "convolution over it and another axis mixed": lambda b, x: conv(b, view(b, x, 2, 36, 6), 36, 5, axes=1),
    "convolution with it for a kernel": lambda b, x: b.op(aten.conv2d.default, b.input(1, 9, 8, 8), x),
    "both ways in turn": lambda b, x: b.op(
        aten.add.Tensor, linear(b, permute(b, x, 0, 2, 3, 1), 9, 1), b.op(aten.sum.default, linear(b, x, 6))
    ),
}


@pytest.mark.parametrize("read", READ_OTHERWISE)
def test_what_is_not_shown_to_be_channels_is_none(read: str) -> None:
    graph = joined_maps(READ_OTHERWISE[read])
    assert find_skip_connections(graph) == ()
    with pytest.raises(BranchError, match=r"Net has no skip connection.*cat\w* on axis 1 of \(2, 9, 4, 6\), read by"):
        require_skip_connections(graph, "Net")


def test_an_axis_added_to_another_is_not_followed() -> None:
    """x + x^T: after it, neither axis is the one that was joined."""

    def read(b: GraphBuilder, x: fx.Node) -> fx.Node:
        square = b.op(aten.slice.Tensor, view(b, x, 2, 9, 24), 2, 0, 9)
        return conv(b, b.op(aten.add.Tensor, square, b.op(aten.transpose.int, square, 1, 2)), 9, 5, axes=1)

    assert find_skip_connections(joined_maps(read)) == ()


def self_attention(b: GraphBuilder, x: fx.Node, tokens: int, width: int) -> fx.Node:
    normed = b.op(aten.layer_norm.default, x, [width])
    heads = [
        b.op(aten.transpose.int, view(b, linear(b, normed, width, width), 2, tokens, 2, width // 2), 1, 2)
        for _ in range(3)
    ]
    return b.op(aten.scaled_dot_product_attention.default, *heads)


@pytest.mark.parametrize(("tokens", "width"), [(6, 8), (6, 12), (4, 8)])
def test_tokens_joined_are_no_skip_connection_although_they_be_as_many_as_channels(tokens: int, width: int) -> None:
    readers: list[Read] = [
        lambda b, x: linear(b, x, width),
        lambda b, x: self_attention(b, x, 2 * tokens, width),
        lambda b, x: conv(b, b.op(aten.transpose.int, x, 1, 2), width, 5, axes=1),
    ]
    for read in readers:
        assert find_skip_connections(joined_tokens(read, tokens, width)) == ()


def test_tokens_that_are_mixed_too_are_no_skip_connection() -> None:
    """An MLP-Mixer has a linear layer over tokens; another one, over the width, tells that they are tokens."""

    def read(b: GraphBuilder, x: fx.Node) -> fx.Node:
        mixed = linear(b, b.op(aten.transpose.int, b.op(aten.layer_norm.default, x, [8]), 1, 2), 12, 12)
        return linear(b, b.op(aten.add.Tensor, x, b.op(aten.transpose.int, mixed, 1, 2)), 8)

    assert find_skip_connections(joined_tokens(read)) == ()


@pytest.mark.parametrize("axes", [1, 3])
def test_signals_and_volumes_have_channels_on_axis_1_too(axes: int) -> None:
    b = GraphBuilder()
    skip = conv(b, b.input(2, 3, *[4] * axes), 3, 4, axes)
    joined = b.op(aten.cat.default, [conv(b, skip, 4, 5, axes), skip], 1)
    assert len(find_skip_connections(b.build(conv(b, joined, 9, 3, axes)).graph)) == 1


@pytest.mark.parametrize("frames_first", [True, False])
def test_frames_joined_on_axis_1_are_no_channels(frames_first: bool) -> None:
    """(batch, frames, channels, height, width), read as images of batch times frames, or as a volume."""
    b = GraphBuilder()
    skip = linear(b, b.input(2, 2, 3, 4, 4), 4, 4)
    joined = b.op(aten.cat.default, [linear(b, skip, 4, 4), skip], 1)
    if frames_first:
        read = conv(b, view(b, joined, 8, 3, 4, 4), 3, 5)
    else:
        read = conv(b, permute(b, joined, 0, 2, 1, 3, 4), 3, 5, axes=3)
    assert find_skip_connections(b.build(read).graph) == ()


def test_video_channels_read_frame_by_frame_are_channels() -> None:
    b = GraphBuilder()
    skip = conv(b, b.input(2, 3, 4, 6, 6), 3, 4, axes=3)
    joined = b.op(aten.cat.default, [conv(b, skip, 4, 5, axes=3), skip], 1)
    images = b.op(aten.reshape.default, permute(b, joined, 0, 2, 1, 3, 4), [8, 9, 6, 6])
    assert len(find_skip_connections(b.build(conv(b, images, 9, 3)).graph)) == 1


def test_width_joined_on_the_last_axis_is_named_in_the_error() -> None:
    """Long skips of a U-ViT: channels, but on an axis that nothing here caches."""
    b = GraphBuilder()
    skip = linear(b, b.input(2, 6, 3), 3, 8)
    joined = b.op(aten.cat.default, [linear(b, skip, 8, 8), skip], -1)
    graph = b.build(linear(b, joined, 16)).graph
    with pytest.raises(BranchError, match=r"on axis 2 of \(2, 6, 16\), read by linear as its channels.*no cut yet"):
        require_skip_connections(graph, "UViT")


def test_text_joined_to_the_keys_of_stable_cascade_is_no_skip_connection() -> None:
    """The one there is, a linear layer reads, channels last."""
    unet = diffusers.models.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
    ).eval()
    text = {name: torch.randn(1, tokens, 16) for name, tokens in (("clip_text_pooled", 1), ("clip_text", 5))}
    with torch.no_grad():
        gm, _ = captured(unet, torch.randn(1, 4, 8, 8), torch.tensor([0.5]), **text, clip_img=torch.randn(1, 1, 16))
    [found] = find_skip_connections(gm.graph)
    assert found.deep.meta["val"].shape == (1, 16, 8, 8)


# Any rearrangement, against the values themselves.


@st.composite
def rearranged(draw: st.DrawFn) -> tuple[GraphBuilder, fx.Node, fx.Node, torch.Tensor]:
    """An input, what a chain of rearrangements makes of it, and of the number that each element has on axis 1."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4))
    shape[1] = draw(st.sampled_from([2, 4, 6]))
    b = GraphBuilder()
    start = node = b.input(*shape)
    numbers = torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2)).expand(shape)

    def apply(target: Any, *args: Any) -> None:
        nonlocal node, numbers
        node, numbers = b.op(target, node, *args), target(numbers, *args)

    for kind in draw(st.lists(st.sampled_from(["permute", "merge", "split", "slice", "sin", "unsqueeze"]), max_size=6)):
        sizes = list(numbers.shape)
        axis = draw(st.integers(0, len(sizes) - 1))
        if kind == "permute":
            apply(aten.permute.default, draw(st.permutations(range(len(sizes)))))
        elif kind == "merge" and axis + 1 < len(sizes):
            apply(aten.reshape.default, [*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]])
        elif kind == "split" and sizes[axis] % 2 == 0:
            apply(aten.reshape.default, [*sizes[:axis], 2, sizes[axis] // 2, *sizes[axis + 1 :]])
        elif kind == "slice" and sizes[axis] > 2:
            apply(aten.slice.Tensor, axis, 1, sizes[axis])
        elif kind == "unsqueeze":
            apply(aten.unsqueeze.default, axis)
        elif kind == "sin":
            node = b.op(aten.sin.default, node)
    return b, start, node, numbers


@settings(max_examples=150, deadline=None)
@given(rearranged())
def test_an_axis_followed_through_any_rearrangement_is_where_its_values_are(
    case: tuple[GraphBuilder, fx.Node, fx.Node, torch.Tensor],
) -> None:
    b, start, node, numbers = case
    width = numbers.shape[-1]
    reader = linear(b, node, width)
    b.build(reader)
    roles = {found.role for found in axis_readers(start, 1) if found.node is reader}
    others = [axis for axis in range(numbers.ndim - 1) if numbers.unique_consecutive(dim=axis).shape[axis] > 1]
    along_last = numbers.unique_consecutive(dim=-1).shape[-1] > 1
    if roles == {"channels"}:
        assert along_last
        assert not others
    elif roles == {"positions"}:
        assert not along_last
    else:
        assert roles <= {None}
    untouched = width == start.meta["val"].shape[1] and math.prod(numbers.shape) == start.meta["val"].numel()
    if untouched and not others and torch.equal(numbers[(0,) * (numbers.ndim - 1)], torch.arange(width)):
        copies = any(n.target is aten.reshape.default for n in b.graph.nodes)
        assert copies or roles == {"channels"}


# Transformers.


@pytest.mark.parametrize(
    "make",
    family(token_models.CASES, token_models.flux),
    ids=lambda make: make.__name__,
)
def test_a_transformer_is_refused_and_is_afterwards_as_it_was(make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    kind = type(model)
    with torch.no_grad():
        plain = model(**inputs, **_AS_TUPLE.get(make, {"return_dict": False}))
        deepcache_fx.optimize(model, backend="eager")
        with pytest.raises(BranchError, match=f"{kind.__name__} has no skip connection"):
            model(**inputs)
        assert type(model) is kind
        again = model(**inputs, **_AS_TUPLE.get(make, {"return_dict": False}))
    assert torch.equal(*(value if isinstance(value, torch.Tensor) else value[0] for value in (plain, again)))


_AS_TUPLE: dict[Any, dict[str, Any]] = {token_models.uvit: {}}
