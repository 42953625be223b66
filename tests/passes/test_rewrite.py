"""Adding calls, and following views."""

from __future__ import annotations

import operator

import torch

from passes.shared.rewrite import Declined, add_call, is_returned, origin, propagate, views_of
from tests.graphs import GraphBuilder, check_metadata

aten = torch.ops.aten


def test_an_added_call_has_a_fake_value_and_says_where_it_comes_from() -> None:
    b = GraphBuilder()
    sine = b.op(aten.sin.default, b.input(2, 3))
    gm = b.build(sine)
    sine.meta["nn_module_stack"] = {"L": ("block", torch.nn.Module)}
    new = add_call(aten.sum.dim_IntList, (sine, [0]), {"keepdim": True}, before=gm.graph.output_node(), like=sine)
    assert new.next is gm.graph.output_node()
    assert new.meta["val"].shape == (1, 3)
    assert new.meta["val"].fake_mode is sine.meta["val"].fake_mode
    assert origin(new) == origin(sine) == {"nn_module_stack": {"L": ("block", torch.nn.Module)}}


def test_views_are_followed_through_views_and_tuples_alone() -> None:
    b = GraphBuilder()
    value = b.op(aten.sin.default, b.input(2, 4))
    chunks = b.op(aten.chunk.default, b.op(aten.view.default, value, [4, 2]), 2)
    part = b.op(operator.getitem, chunks, 0)
    other = b.op(aten.neg.default, value)
    b.build(b.op(aten.cos.default, part), other)
    assert [node.name for node in views_of(value)] == ["sin_default", "view_default", "chunk_default", "getitem"]


def test_a_value_is_returned_where_an_output_may_be_a_view_of_it() -> None:
    b = GraphBuilder()
    x = b.input(2, 4)
    returned, copied = b.op(aten.sin.default, x), b.op(aten.cos.default, x)
    b.build(b.op(aten.t.default, returned), b.op(aten.clone.default, copied))
    assert is_returned(returned)
    assert not is_returned(copied)


def test_a_shape_taken_from_a_tensor_is_no_view_of_it() -> None:
    b = GraphBuilder()
    x, y = b.op(aten.sin.default, b.input(4)), b.op(aten.cos.default, b.input(4))
    joined = b.op(aten.view_as.default, x, y)
    b.build(joined)
    assert is_returned(x)
    assert not is_returned(y)


def test_changed_strides_reach_everything_they_change_and_no_further() -> None:
    b = GraphBuilder()
    copy = b.op(aten.clone.default, b.input(1, 2, 3, 4), memory_format=torch.contiguous_format)
    sine = b.op(aten.sin.default, copy)
    half = b.op(operator.getitem, b.op(aten.chunk.default, sine, 2, 1), 1)
    total = b.op(aten.sum.default, half)
    end = b.op(aten.neg.default, total)
    gm = b.build(end)
    untouched = end.meta["val"]
    copy.kwargs = {"memory_format": torch.channels_last}
    copy.meta["val"] = copy.meta["val"].contiguous(memory_format=torch.channels_last)
    propagate(gm.graph, [copy])
    gm.recompile()
    check_metadata(gm, b.inputs)
    assert sine.meta["val"].stride() == (24, 1, 8, 2)
    assert half.meta["val"].stride() == (24, 1, 8, 2)
    assert end.meta["val"] is untouched


def test_what_was_declined_reads_as_a_line() -> None:
    assert str(Declined(("linear", "linear_1"), "too few rows")) == "linear, linear_1: too few rows"
