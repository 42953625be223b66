"""Splitting layers over a concatenation: which are, which are not, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from deepcache_fx.graph.skips import find_skip_connections
from passes import run_passes
from passes.shared.match import ancestors, is_op
from passes.split_over_cat import SplitOverCat
from tests.compvis import CompVisUNet
from tests.families import examples
from tests.graphs import GraphBuilder, captured, check, check_metadata, error, targets, unet_call, unet_of_two_levels

aten = torch.ops.aten

CONVOLUTIONS = {
    1: aten.conv1d.default,
    2: aten.conv2d.default,
    3: aten.conv3d.default,
}


def cat(b: GraphBuilder, *operands: fx.Node, axis: int = 1) -> fx.Node:
    return b.op(aten.cat.default, list(operands), axis)


def conv(b: GraphBuilder, x: fx.Node, inputs: int, outputs: int = 4, size: int = 3) -> fx.Node:
    weight, bias = b.parameter(outputs, inputs, size, size), b.parameter(outputs)
    return b.op(aten.conv2d.default, x, weight, bias, [1, 1], [size // 2, size // 2])


def norm(b: GraphBuilder, x: fx.Node, groups: int, channels: int) -> fx.Node:
    return b.op(aten.group_norm.default, x, groups, b.parameter(channels), b.parameter(channels), 1e-5, False)


def residual_block(b: GraphBuilder, x: fx.Node, channels: int, groups: int) -> fx.Node:
    hidden = conv(b, b.op(aten.silu.default, norm(b, x, groups, channels)), channels)
    return b.op(aten.add.Tensor, conv(b, x, channels, size=1), hidden)


def depends_on(node: fx.Node) -> set[str]:
    return {source.name for source in ancestors([node]) if source.op == "placeholder"}


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_op(node, aten.conv2d.default, aten.linear.default)]


def test_splits_a_convolution_into_the_sum_of_two() -> None:
    b = GraphBuilder()
    gm = b.build(conv(b, cat(b, b.input(2, 3, 4, 4), b.input(2, 5, 4, 4)), 8))
    check(SplitOverCat(), gm, b.inputs, 3, tolerance=1e-6)
    assert targets(gm) == [
        *(aten.slice.Tensor, aten.conv2d.default),
        *(aten.slice.Tensor, aten.conv2d.default),
        aten.add.Tensor,
    ]
    assert [depends_on(layer) for layer in layers(gm)] == [{"x1"}, {"x2"}]
    assert [layer.args[2] is None for layer in layers(gm)] == [True, False]


def test_splits_a_residual_block_into_halves_of_one_operand_each() -> None:
    b = GraphBuilder()
    gm = b.build(residual_block(b, cat(b, b.input(2, 4, 4, 4), b.input(2, 8, 4, 4)), 12, groups=6))
    check(SplitOverCat(), gm, b.inputs, 13, tolerance=1e-5)
    assert aten.cat.default not in targets(gm)
    assert [depends_on(layer) for layer in layers(gm)] == [{"x1"}, {"x2"}, {"x1"}, {"x2"}]
    norms = [node for node in gm.graph.nodes if is_op(node, aten.group_norm.default)]
    assert [node.args[1] for node in norms] == [2, 4]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_group_that_straddles_the_boundary_stays_with_the_other_operand(alone: int) -> None:
    b = GraphBuilder()
    joined = cat(b, b.input(2, 6, 4, 4), b.input(2, 6, 4, 4))
    gm = b.build(conv(b, norm(b, joined, 3, 12), 12))
    check(SplitOverCat(alone=alone), gm, b.inputs, 11, tolerance=1e-5)  # type: ignore[arg-type]
    own = [{"x1"}, {"x2"}][alone]
    assert depends_on(layers(gm)[alone]) == own
    assert depends_on(layers(gm)[1 - alone]) == {"x1", "x2"}
    assert layers(gm)[alone].args[1].meta["val"].shape[1] == 4  # type: ignore[union-attr]
    assert layers(gm)[alone].args[2] is None


def test_a_group_norm_without_affine_parameters_splits() -> None:
    b = GraphBuilder()
    joined = cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4))
    gm = b.build(conv(b, b.op(aten.group_norm.default, joined, 4), 8))
    check(SplitOverCat(), gm, b.inputs, 4, tolerance=1e-5)


def test_pushes_through_everything_that_treats_channels_alike() -> None:
    b = GraphBuilder()
    x = cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4))
    x = b.op(aten.mul.Tensor, x, b.op(aten.sigmoid.default, x))
    x = b.op(aten.dropout.default, x, 0.5, False)
    x = b.op(aten.to.dtype, x, torch.float64)
    x = b.op(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    x = b.op(aten.avg_pool2d.default, x, [2, 2])
    x = b.op(aten._to_copy.default, x, dtype=torch.float32)
    gm = b.build(conv(b, b.op(aten.mul.Scalar, x, 2.0), 8))
    check(SplitOverCat(), gm, b.inputs, 8 + 3, tolerance=1e-6)
    assert [depends_on(layer) for layer in layers(gm)] == [{"x1"}, {"x2"}]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding", [[1], "same"])
def test_splits_convolutions_of_any_dimension(dimensions: int, padding: object) -> None:
    b = GraphBuilder()
    size = [4] * dimensions
    joined = cat(b, b.input(1, 2, *size), b.input(1, 3, *size))
    operator = CONVOLUTIONS[dimensions]
    if padding == "same":
        operator = getattr(aten, operator._overloadpacket.__name__).padding
    rest = ([1], padding, [2]) if padding == "same" else ([2], padding, [1])
    gm = b.build(b.op(operator, joined, b.parameter(4, 5, *[3] * dimensions), None, *rest))
    check(SplitOverCat(), gm, b.inputs, 3, tolerance=1e-6)


def test_splits_a_linear_layer_over_the_last_axis() -> None:
    b = GraphBuilder()
    joined = cat(b, b.input(2, 6, 3), b.input(2, 6, 5), axis=-1)
    gm = b.build(b.op(aten.linear.default, b.op(aten.silu.default, joined), b.parameter(4, 8)))
    check(SplitOverCat(), gm, b.inputs, 1 + 3, tolerance=1e-6)
    assert [depends_on(layer) for layer in layers(gm)] == [{"x1"}, {"x2"}]


def test_splits_one_concatenation_within_another() -> None:
    b = GraphBuilder()
    inner = conv(b, cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4)), 8)
    gm = b.build(conv(b, cat(b, inner, b.input(2, 4, 4, 4)), 8))
    check(SplitOverCat(), gm, b.inputs, 3 + 3, tolerance=1e-5)
    assert aten.cat.default not in targets(gm)


def test_users_that_cannot_be_split_keep_the_concatenation() -> None:
    b = GraphBuilder()
    joined = cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4))
    kept = b.op(aten.sub.Tensor, joined, b.input(2, 8, 4, 4))
    activated = b.op(aten.silu.default, joined)
    gm = b.build(conv(b, activated, 8), kept, b.op(aten.amax.default, activated, [1]))
    check(SplitOverCat(), gm, b.inputs, 2 + 4, tolerance=1e-6)
    assert [depends_on(layer) for layer in layers(gm)] == [{"x1"}, {"x2"}]
    assert targets(gm).count(aten.cat.default) == 2  # the joined operands for one, the joined halves for the other


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("grouped convolution", "leads to no"),
        ("one group", "leads to no"),
        ("other value in between", "leads to no"),
        ("random", "leads to no"),
        ("layer over another axis", "leads to no"),
        ("joined weight", "leads to no"),
        ("returned", "leads to no"),
        ("spatial axis", "leads to no"),
        ("unbatched", "leads to no"),
        ("three operands", "two operands"),
        ("two types", "converts an operand"),
        ("no channels", "channels is zero"),
    ],
)
def test_leaves_alone_what_does_not_split(case: str, reason: str) -> None:
    b = GraphBuilder()
    first, second = b.input(2, 4, 8, 4), b.input(2, 4, 8, 4)
    x = cat(b, first, second)
    if case == "grouped convolution":
        out = b.op(aten.conv2d.default, x, b.parameter(4, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], 2)
    elif case == "one group":
        out = conv(b, norm(b, x, 1, 8), 8)
    elif case == "other value in between":
        out = conv(b, b.op(aten.mul.Tensor, x, b.input(2, 8, 8, 4)), 8)
    elif case == "random":
        out = conv(b, b.op(aten.dropout.default, x, 1.0, True), 8)
    elif case == "layer over another axis":
        out = b.op(aten.linear.default, x, b.parameter(3, 4))
    elif case == "joined weight":
        out = b.op(aten.conv2d.default, b.input(2, 8, 8, 4), x)
    elif case == "returned":
        out = b.op(aten.silu.default, x)
    elif case == "spatial axis":
        x = cat(b, first, second, axis=2)
        out = conv(b, x, 4)
    elif case == "unbatched":
        x = cat(b, b.input(4, 2, 8), b.input(4, 6, 8))
        out = b.op(aten.conv2d.default, x, b.parameter(4, 4, 3, 3))
    elif case == "three operands":
        x = cat(b, first, second, first)
        out = conv(b, x, 12)
    elif case == "two types":
        x = cat(b, first, b.op(aten.to.dtype, second, torch.float64))
        out = b.op(aten.conv2d.default, x, b.op(aten.to.dtype, b.parameter(4, 8, 3, 3), torch.float64))
    else:
        x = cat(b, first, b.op(aten.slice.Tensor, second, 1, 0, 0))
        out = conv(b, x, 4)
    gm = b.build(out)
    item = SplitOverCat(lambda node: node is x)
    check(item, gm, b.inputs, 0)
    [declined] = item.declined
    assert declined.nodes == (x.name,)
    assert reason in declined.reason


def test_leaves_a_graph_without_concatenations_alone() -> None:
    b = GraphBuilder()
    gm = b.build(conv(b, b.input(2, 4, 4, 4), 4))
    item = SplitOverCat()
    check(item, gm, b.inputs, 0)
    assert item.declined == ()


@pytest.mark.parametrize("chosen", ["cat_default", ["cat_default"], lambda node: node.name == "cat_default"])
def test_splits_only_the_chosen_concatenations(chosen: str | list[str] | Callable[[fx.Node], bool]) -> None:
    b = GraphBuilder()
    x, y = b.input(2, 4, 4, 4), b.input(2, 4, 4, 4)
    first, second = conv(b, cat(b, x, y), 8), conv(b, cat(b, y, x), 8)
    gm = b.build(first, second)
    assert [node.name for node in gm.graph.nodes if is_op(node, aten.cat.default)] == ["cat_default", "cat_default_1"]
    result, [record] = run_passes(gm, [SplitOverCat(chosen)])
    assert record.modified
    assert [node.name for node in result.graph.nodes if is_op(node, aten.cat.default)] == ["cat_default_1"]


def test_says_which_names_it_did_not_find() -> None:
    b = GraphBuilder()
    gm = b.build(conv(b, cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4)), 8))
    item = SplitOverCat(["cat_7", "cat_default"])
    check(item, gm, b.inputs, 3, tolerance=1e-5)
    assert [declined.nodes for declined in item.declined] == [("cat_7",), ("cat_default",)]  # split by the first run
    assert "no concatenation of that name" in str(item.declined[0])


def test_refuses_an_operand_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"alone must be 0 or 1, .* got 2"):
        SplitOverCat(alone=2)  # type: ignore[arg-type]


def test_new_nodes_say_where_in_the_model_they_come_from() -> None:
    b = GraphBuilder()
    joined = cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4))
    layer = conv(b, joined, 8)
    gm = b.build(layer)
    layer.meta["nn_module_stack"] = {"L": ("up.conv1", torch.nn.Conv2d)}
    run_passes(gm, [SplitOverCat()])
    new = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node.meta["nn_module_stack"] for node in new] == [{"L": ("up.conv1", torch.nn.Conv2d)}] * len(new)


def test_changes_of_the_weights_in_place_are_seen() -> None:
    b = GraphBuilder()
    gm = b.build(conv(b, cat(b, b.input(2, 4, 4, 4), b.input(2, 4, 4, 4)), 8))
    parameters = {id(p) for p in b.root.parameters()}
    run_passes(gm, [SplitOverCat()])
    assert {id(p) for p in gm.parameters()} == parameters
    with torch.no_grad():
        for parameter in b.root.parameters():
            parameter.zero_()
    assert not gm(*b.inputs)[0].any()


@st.composite
def channels_and_groups(draw: st.DrawFn) -> tuple[int, int, int]:
    groups = draw(st.integers(1, 6))
    size = draw(st.integers(1, 5))
    total = max(2, groups * size)
    return draw(st.integers(1, total - 1)), total, groups if groups * size == total else 1


@examples(10)
@given(
    channels=channels_and_groups(),
    alone=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    height=st.integers(2, 5),
    width=st.integers(2, 5),
    block=st.booleans(),
)
def test_a_split_graph_computes_the_same(
    channels: tuple[int, int, int], alone: int, dtype: torch.dtype, height: int, width: int, block: bool
) -> None:
    first, total, groups = channels
    b = GraphBuilder(dtype)
    joined = cat(b, b.input(2, first, height, width), b.input(2, total - first, height, width))
    x = norm(b, joined, groups, total)
    gm = b.build(residual_block(b, joined, total, groups) if block else conv(b, x, total))
    expected = gm(*b.inputs)
    run_passes(gm, [SplitOverCat(alone=alone)])  # type: ignore[arg-type]
    assert error(gm(*b.inputs), expected) <= (1e-10 if dtype is torch.float64 else 1e-5)
    check_metadata(gm, b.inputs)
    own = f"x{alone + 1}"
    size = total // groups
    whole = (first if alone == 0 else total - first) // size
    apart = [layer for layer in layers(gm) if depends_on(layer) == {own}]
    assert len(apart) == (whole > 0) + block


def test_every_skip_connection_of_a_captured_unet_splits() -> None:
    gm, inputs = captured(unet_of_two_levels().double(), *unet_call(torch.float64))
    check_split_unet(gm, inputs, 1e-10)


def test_a_unet_with_freeu_splits() -> None:
    """FreeU writes into the deep feature: the captured graph is spelled with `view`, `_to_copy` and scatters."""
    unet = unet_of_two_levels()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    gm, inputs = captured(unet, *unet_call())
    assert aten.slice_scatter.default in targets(gm)
    check_split_unet(gm, inputs, 1e-5)


def test_a_unet_written_outside_diffusers_splits() -> None:
    generator = torch.Generator().manual_seed(1)
    arguments = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 5]), torch.randn(2, 3, 6)
    check_split_unet(*captured(CompVisUNet(), *arguments), 1e-5)


def check_split_unet(gm: fx.GraphModule, inputs: list[torch.Tensor], tolerance: float) -> None:
    cats = [skip.cat.name for skip in find_skip_connections(gm.graph)]
    assert len(cats) >= 4
    with torch.no_grad():
        expected = gm(*inputs)
        _, [record] = run_passes(gm, [SplitOverCat(cats)])
        assert record.modified
        assert not {node.name for node in gm.graph.nodes} & set(cats)
        assert error(gm(*inputs), expected) <= tolerance
    check_metadata(gm, inputs)
