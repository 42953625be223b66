"""Sibling linear layers as one product: where, by which means, and why not elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from passes import run_passes
from passes.fuse_linears import FuseLinears, bind, sibling_parameters
from passes.merge_equal import MergeEqual
from passes.shared.match import is_op
from passes.weight_layout import WeightLayout
from tests.families import examples
from tests.graphs import GraphBuilder, captured_unet, check, check_metadata, error, targets

aten = torch.ops.aten

FEW, MANY = 4, 200  # rows: too few to join weights of 3 times 6 outputs at every call, and enough


def linear(b: GraphBuilder, x: fx.Node, outputs: int = 6, bias: bool = False) -> fx.Node:
    return b.op(aten.linear.default, x, b.parameter(outputs, 8), *([b.parameter(outputs)] if bias else []))


def laid_out(within: torch.nn.Module, *groups: Sequence[torch.Tensor]) -> WeightLayout:
    layout = WeightLayout()
    layout.lay_out(groups, within=within)
    return layout


def sines(b: GraphBuilder, *nodes: fx.Node) -> list[fx.Node]:
    return [b.op(aten.sin.default, node) for node in nodes]


def parameters(b: GraphBuilder, dimensions: int) -> list[torch.nn.Parameter]:
    return [parameter for parameter in b.root.parameters() if parameter.ndim == dimensions]


def products(gm: fx.GraphModule) -> int:
    return targets(gm).count(aten.linear.default)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_lie_together_are_read_as_one(bias: bool) -> None:
    b = GraphBuilder()
    x = b.input(2, FEW, 8)
    gm = b.build(*sines(b, *(linear(b, x, outputs, bias) for outputs in (6, 3, 5, 2))))
    layout = laid_out(b.root, parameters(b, 2), *([parameters(b, 1)] if bias else []))
    item = FuseLinears(layout)
    # Instead of four weights one input; four products become one and four slices.
    check(item, gm, b.inputs, (-4 + 1) + (-4 + 5) + bias * (-4 + 1), tolerance=1e-5)
    assert products(gm) == 1
    assert aten.cat.default not in targets(gm)


def test_a_bound_program_reads_the_weights_as_they_are_at_each_call() -> None:
    b = GraphBuilder()
    x = b.input(2, FEW, 8)
    gm = b.build(*sines(b, *(linear(b, x, bias=True) for _ in range(3))))
    weights = parameters(b, 2)
    plain = fx.GraphModule(b.root, copy.deepcopy(gm.graph))
    item = FuseLinears(laid_out(b.root, weights, parameters(b, 1)))
    _, [record] = run_passes(gm, [item])
    assert record.done == ("linear_default, linear_default_1, linear_default_2: read as one",)
    assert [one.weights for one in item.joined] == [tuple(weights), tuple(parameters(b, 1))]
    program = bind(gm, item.joined)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: weights[1].mul_(3),
        lambda: setattr(weights[2], "data", 2 * weights[2].data),
        lambda: [setattr(one, "data", one.data.clone()) for one in reversed(weights)],
        lambda: setattr(weights[0], "data", torch.randn(8, 6).t()),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            assert error(program(*b.inputs), plain(*b.inputs)) <= 1e-5
    assert bind(gm, ()) is gm


def test_biases_that_lie_apart_are_joined() -> None:
    b = GraphBuilder()
    x = b.input(FEW, 8)
    gm = b.build(*sines(b, linear(b, x, bias=True), linear(b, x, bias=True)))
    layout = laid_out(b.root, parameters(b, 2))
    check(FuseLinears(layout), gm, b.inputs, (-2 + 1) + (-2 + 3) + (-2 + 3), tolerance=1e-5)
    assert products(gm) == 1
    assert targets(gm).count(aten.cat.default) == 1


def test_weights_that_lie_apart_are_joined_where_there_are_many_rows() -> None:
    b = GraphBuilder()
    x = b.input(2, MANY, 8)
    gm = b.build(*sines(b, *(linear(b, x) for _ in range(3))))
    item = FuseLinears()
    check(item, gm, b.inputs, 2, tolerance=1e-5)
    assert item.declined == ()
    assert products(gm) == 1
    assert [id(p) for p in gm.parameters()] == [id(p) for p in b.root.parameters()]


def test_weights_that_lie_apart_stay_so_where_there_are_few_rows() -> None:
    b = GraphBuilder()
    x = b.input(2, FEW, 8)
    gm = b.build(*sines(b, *(linear(b, x) for _ in range(3))))
    item = FuseLinears()
    check(item, gm, b.inputs, 0)
    [declined] = item.declined
    assert len(declined.nodes) == 3
    assert "not laid out together, and there are too few rows" in declined.reason


@pytest.mark.parametrize(("rows", "fused"), [(18, False), (19, True)])
def test_joining_pays_from_the_row_on_that_the_first_lines_say(rows: int, fused: bool) -> None:
    b = GraphBuilder()
    x = b.input(rows, 8)
    gm = b.build(*sines(b, *(linear(b, x, 6) for _ in range(3))))
    assert FuseLinears()(gm).modified == fused


def test_weights_that_happen_to_lie_together_are_not_relied_on() -> None:
    """As they may when read from a file: nobody would notice when they are moved apart."""
    b = GraphBuilder()
    x = b.input(FEW, 8)
    gm = b.build(*sines(b, linear(b, x), linear(b, x)))
    laid_out(b.root, parameters(b, 2))
    item = FuseLinears()
    check(item, gm, b.inputs, 0)
    assert "not laid out together" in item.declined[0].reason


def test_of_siblings_those_that_lie_together_are_fused() -> None:
    b = GraphBuilder()
    x = b.input(FEW, 8)
    gm = b.build(*sines(b, *(linear(b, x) for _ in range(6))))
    first, second, third, fourth, fifth, sixth = parameters(b, 2)
    item = FuseLinears(laid_out(b.root, [second, first], [sixth, fifth, third]))
    check(item, gm, b.inputs, (-2 + 1) + (-2 + 3) + (-3 + 1) + (-3 + 4), tolerance=1e-5)
    assert products(gm) == 3
    assert item.declined == ()
    assert fourth.untyped_storage().nbytes() == fourth.nbytes


def test_fuses_the_siblings_of_every_input() -> None:
    b = GraphBuilder()
    x, y = b.input(MANY, 8), b.input(MANY, 8)
    gm = b.build(*sines(b, *(linear(b, z) for z in (x, y, x, y))))
    check(FuseLinears(), gm, b.inputs, 2 * 2, tolerance=1e-5)
    assert products(gm) == 2


def test_fuses_one_layer_after_another() -> None:
    b = GraphBuilder()
    x = b.input(MANY, 8)
    left, right = sines(b, linear(b, x, 8), linear(b, x, 8))
    gm = b.build(*sines(b, linear(b, left), linear(b, left), linear(b, right)))
    check(FuseLinears(), gm, b.inputs, 2 * 2, tolerance=1e-5)
    assert products(gm) == 3


def test_a_view_of_a_part_becomes_a_reshape() -> None:
    b = GraphBuilder()
    x = b.input(2, MANY, 8)
    query, key = linear(b, x), linear(b, x)
    heads = b.op(aten.transpose.int, b.op(aten.view.default, query, [2, MANY, 2, 3]), 1, 2)
    flat = b.op(aten.view.default, key, [2, MANY * 6])
    gm = b.build(*sines(b, heads, flat))
    check(FuseLinears(), gm, b.inputs, 2, tolerance=1e-5)
    assert targets(gm).count(aten.reshape.default) == 2


@pytest.mark.parametrize(
    "case", ["one layer", "other inputs", "one biased", "computed weight", "other types", "the same layer twice"]
)
def test_leaves_alone_what_are_no_siblings(case: str) -> None:
    b = GraphBuilder()
    x, y = b.input(MANY, 8), b.input(MANY, 8)
    first = linear(b, x)
    if case == "one layer":
        outputs = [first]
    elif case == "other inputs":
        outputs = [first, linear(b, y)]
    elif case == "one biased":
        outputs = [first, linear(b, x, bias=True)]
    elif case == "computed weight":
        outputs = [first, b.op(aten.linear.default, x, b.op(aten.mul.Tensor, b.parameter(6, 8), 2))]
    elif case == "other types":
        b.dtype = torch.float64
        outputs = [first, b.op(aten.linear.default, b.op(aten.to.dtype, x, torch.float64), b.parameter(6, 8))]
    else:
        outputs = [first, b.op(aten.linear.default, x, first.args[1])]
    gm = b.build(*sines(b, *outputs))
    item = FuseLinears()
    check(item, gm, b.inputs, 0)
    assert item.declined == ()


def test_two_outputs_do_not_come_to_share_memory() -> None:
    b = GraphBuilder()
    x = b.input(MANY, 8)
    returned = b.op(aten.reshape.default, linear(b, x), [6, MANY])
    gm = b.build(returned, *sines(b, linear(b, x), linear(b, x)))
    expected = gm(*b.inputs)
    item = FuseLinears()
    run_passes(gm, [item])
    assert [declined.nodes for declined in item.declined] == [("linear_default",)]
    assert products(gm) == 2
    assert error(gm(*b.inputs), expected) <= 1e-5


def test_a_layer_whose_strides_matter_stays() -> None:
    b = GraphBuilder()
    x = b.input(MANY, 8)
    gm = b.build(*sines(b, b.op(aten.as_strided.default, linear(b, x), [MANY], [6]), linear(b, x)))
    item = FuseLinears()
    check(item, gm, b.inputs, 0)
    assert "strides" in str(item.declined[0])


@examples(10)
@given(
    outputs=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    rows=st.integers(1, 60),
    bias=st.booleans(),
    order=st.randoms(use_true_random=False),
    together=st.booleans(),
)
def test_fused_layers_compute_the_same(
    outputs: list[int], rows: int, bias: bool, order: object, together: bool
) -> None:
    b = GraphBuilder(torch.float64)
    x = b.input(rows, 8)
    gm = b.build(*sines(b, *(linear(b, x, count, bias) for count in outputs)))
    weights = parameters(b, 2)
    order.shuffle(weights)  # type: ignore[attr-defined]
    item = FuseLinears(laid_out(b.root, weights if together else []))
    expected = gm(*b.inputs)
    _, [record] = run_passes(gm, [item])
    assert record.modified == (products(gm) == 1) == (together or (len(outputs) - 1) * rows > 2 * sum(outputs))
    assert bool(item.joined) == together
    assert error(bind(gm, item.joined)(*b.inputs), expected) <= 1e-10
    check_metadata(gm, [*b.inputs, *(one.tensor() for one in item.joined)])


def test_all_siblings_of_a_unet_can_be_laid_out_and_fused() -> None:
    gm, inputs = captured_unet()
    expected = gm(*inputs)
    run_passes(gm, [MergeEqual()])
    before = products(gm)
    groups = sibling_parameters(gm)
    # Self-attention four times, the text's keys and values of all four, and the time projections with their biases.
    assert sorted(map(len, groups)) == [3, 3, 3, 3, 8, 8, 8]
    layout = laid_out(gm, *groups)
    item = FuseLinears(layout)
    try:
        run_passes(gm, [item])
        assert item.declined == ()
        assert before - products(gm) == 4 * 2 + 7 + 7
        with torch.no_grad():
            assert error(bind(gm, item.joined)(*inputs), expected) <= 1e-5
        check_metadata(gm, [*inputs, *(one.tensor() for one in item.joined)])
        own = {id(p) for p in captured_unet()[0].parameters()}
        assert {id(p) for p in gm.parameters()} <= own
    finally:
        layout.undo()


def test_siblings_that_cannot_be_fused_do_not_lie_in_the_way() -> None:
    b = GraphBuilder()
    x = b.input(FEW, 8)
    first, bound, last = (linear(b, x) for _ in range(3))
    gm = b.build(bound, *sines(b, first, last))
    assert [list(map(id, group)) for group in sibling_parameters(gm)] == [[id(gm.p0), id(gm.p2)]]


def test_joining_pays_for_the_self_attention_of_a_large_image() -> None:
    """Two samples of 64x64 latents, as in SD1.5: 8192 tokens of 320 channels. A quarter of the tokens still pays."""
    for tokens, channels, fused in ((4096, 320, True), (1024, 640, True), (256, 1280, False), (77, 320, False)):
        b = GraphBuilder()
        with torch.device("meta"):
            x = b.input(2, tokens, channels)
            layers = [b.op(aten.linear.default, x, b.parameter(channels, channels)) for _ in range(3)]
            assert FuseLinears()(b.build(*sines(b, *layers))).modified == fused


def test_the_self_attention_of_a_unet_projects_once() -> None:
    gm, inputs = captured_unet()
    before = products(gm)
    expected = gm(*inputs)
    norms = gm.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    groups = [[user for user in node.users if is_op(user, aten.linear.default)] for node in norms]
    self_attention = [group for group in groups if len(group) == 3]
    assert len(self_attention) == 4
    layout = laid_out(
        gm,
        *([gm.get_parameter(str(node.args[1].target)) for node in group] for group in self_attention),  # type: ignore[union-attr]
    )
    item = FuseLinears(layout)
    try:
        run_passes(gm, [item])
        assert products(gm) == before - 2 * 4
        with torch.no_grad():
            assert error(bind(gm, item.joined)(*inputs), expected) <= 1e-5
        assert any("too few rows" in declined.reason for declined in item.declined)  # the text's K and V
    finally:
        layout.undo()
