"""Common subexpressions: merged where equal, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from passes import run_passes
from passes.merge_equal import MergeEqual
from tests.graphs import GraphBuilder, captured_unet, check, targets

aten = torch.ops.aten


def test_merges_two_calls_on_the_same_value() -> None:
    b = GraphBuilder()
    x = b.input(2, 3)
    gm = b.build(b.op(aten.sub.Tensor, b.op(aten.sin.default, x), b.op(aten.exp.default, b.op(aten.sin.default, x))))
    check(MergeEqual(), gm, b.inputs, -1)


def test_merges_what_becomes_equal_by_merging() -> None:
    b = GraphBuilder()
    x = b.input(2, 3)
    ends = [b.op(aten.cos.default, b.op(aten.sin.default, x)) for _ in range(3)]
    gm = b.build(b.op(aten.stack.default, ends))
    check(MergeEqual(), gm, b.inputs, -4)


def test_merges_reads_of_one_parameter_and_calls_with_lists_and_names() -> None:
    b = GraphBuilder()
    x = b.input(2, 3)
    weight = b.parameter(3, 3)
    again = b.graph.get_attr(weight.target)
    halves = [b.op(aten.cat.default, [b.op(aten.linear.default, x, w), x], dim=1) for w in (weight, again)]
    gm = b.build(b.op(aten.sub.Tensor, *halves))
    check(MergeEqual(), gm, b.inputs, -3)


def test_leaves_a_graph_without_equal_values_alone() -> None:
    b = GraphBuilder()
    x, y = b.input(2, 3), b.input(2, 3)
    gm = b.build(b.op(aten.sub.Tensor, b.op(aten.sin.default, x), b.op(aten.sin.default, y)))
    check(MergeEqual(), gm, b.inputs, 0)


@pytest.mark.parametrize(("first", "second"), [(1, 1.0), (1, True), (0.0, -0.0), (2, 3), (float("nan"), 1.0)], ids=str)
def test_keeps_calls_that_differ_in_a_number(first: float, second: float) -> None:
    b = GraphBuilder()
    x = b.input(2, 3)
    products = [b.op(aten.mul.Tensor, x, factor) for factor in (first, second)]
    gm = b.build(b.op(aten.stack.default, products))
    assert not MergeEqual()(gm).modified


def test_keeps_calls_that_differ_in_operator_order_or_name() -> None:
    b = GraphBuilder()
    x, y = b.input(2, 2), b.input(2, 2)
    ends = [
        b.op(aten.sub.Tensor, x, y),
        b.op(aten.sub.Tensor, y, x),
        b.op(aten.sub.Tensor, x, y, alpha=2),
        b.op(aten.add.Tensor, x, y, alpha=2),
        b.op(aten.to.dtype, x, torch.float64),
        b.op(aten.to.dtype, x, torch.float16),
    ]
    gm = b.build(*(b.op(aten.neg.default, end) for end in ends))
    check(MergeEqual(), gm, b.inputs, 0)


def test_keeps_random_values_apart_and_merges_dropout_that_is_off() -> None:
    def build(training: bool) -> fx.GraphModule:
        b = GraphBuilder()
        x = b.input(2, 3)
        ends = [b.op(aten.dropout.default, x, 0.5, training) for _ in range(2)]
        return b.build(b.op(aten.stack.default, ends))

    assert not MergeEqual()(build(True)).modified
    assert MergeEqual()(build(False)).modified


def test_keeps_two_outputs_in_memory_of_their_own() -> None:
    b = GraphBuilder()
    x = b.input(2, 3)
    second = b.op(aten.sin.default, x)
    gm = b.build(b.op(aten.sin.default, x), b.op(aten.view.default, second, [6]))
    check(MergeEqual(), gm, b.inputs, 0)
    one, other = gm(*b.inputs)
    assert one.data_ptr() != other.data_ptr()


def test_keeps_writes() -> None:
    b = GraphBuilder()
    x = b.input(2, 3)
    for _ in range(2):
        b.op(aten.add_.Tensor, x, 1.0)
    gm = b.build(b.op(aten.neg.default, x))
    assert not MergeEqual()(gm).modified


def test_a_unet_activates_its_time_embedding_once() -> None:
    gm, inputs = captured_unet()
    with torch.no_grad():
        expected = gm(*inputs)[0]
        before = targets(gm).count(aten.silu.default)
        run_passes(gm, [MergeEqual()])
        assert before - targets(gm).count(aten.silu.default) == 8 - 1  # residual blocks
        assert torch.equal(gm(*inputs)[0], expected)
