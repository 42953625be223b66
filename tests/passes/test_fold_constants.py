"""Constants: computed once where they may be, and held where they cannot be mistaken for the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from passes import run_passes
from passes.fold_constants import FoldConstants
from tests.graphs import GraphBuilder, captured_unet, check, error, targets

aten = torch.ops.aten
CPU = torch.device("cpu")


def arange(b: GraphBuilder, count: int = 4) -> fx.Node:
    return b.op(aten.arange.start, 0, count, dtype=torch.float32, device=CPU)


def buffers(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in gm.named_buffers() if name.startswith("folded")}


def test_folds_what_depends_on_no_input() -> None:
    b = GraphBuilder()
    x = b.input(2, 4)
    frequencies = b.op(aten.exp.default, b.op(aten.mul.Tensor, arange(b), -0.5))
    gm = b.build(b.op(aten.mul.Tensor, x, b.op(aten.unsqueeze.default, frequencies, 0)))
    check(FoldConstants(), gm, b.inputs, -3)
    assert targets(gm) == [aten.mul.Tensor]
    assert list(buffers(gm)) == ["folded_0"]
    assert gm.state_dict() == {}


def test_a_constant_with_several_users_is_held_once() -> None:
    b = GraphBuilder()
    constant = b.op(aten.exp.default, arange(b))
    sums = [b.op(aten.add.Tensor, b.input(4), constant) for _ in range(3)]
    check(FoldConstants(), b.build(*sums), b.inputs, -1)


def test_two_constants_are_folded_apart() -> None:
    b = GraphBuilder()
    sums = [b.op(aten.add.Tensor, b.input(4), b.op(aten.exp.default, arange(b))) for _ in range(2)]
    gm = b.build(*sums)
    check(FoldConstants(), gm, b.inputs, -2)
    assert len(buffers(gm)) == 2


def test_leaves_a_graph_without_constants_alone() -> None:
    b = GraphBuilder()
    gm = b.build(b.op(aten.mul.Tensor, b.input(4), b.op(aten.exp.default, b.parameter(4))))
    check(FoldConstants(), gm, b.inputs, 0)


def test_does_not_fold_what_is_computed_from_a_parameter() -> None:
    b = GraphBuilder()
    gm = b.build(b.op(aten.mul.Tensor, b.input(4), b.op(aten.mul.Tensor, b.parameter(4), arange(b))))
    result, [record] = run_passes(gm, [FoldConstants()])
    assert record.modified  # the range alone
    assert targets(result) == [aten.mul.Tensor, aten.mul.Tensor]


def test_does_not_fold_random_values() -> None:
    b = GraphBuilder()
    gm = b.build(b.op(aten.add.Tensor, b.input(4), b.op(aten.rand.default, [4], device=CPU)))
    assert not FoldConstants()(gm).modified


@pytest.mark.parametrize("through_a_view", [False, True])
def test_every_call_returns_a_constant_of_its_own(through_a_view: bool) -> None:
    b = GraphBuilder()
    b.input(1)
    constant = arange(b)
    gm = b.build(b.op(aten.view.default, constant, [2, 2]) if through_a_view else constant)
    check(FoldConstants(), gm, b.inputs, 0)
    gm(*b.inputs)[0].zero_()
    assert gm(*b.inputs)[0].any()


def test_holds_the_small_constants_that_a_large_one_is_made_of() -> None:
    b = GraphBuilder()
    outer = b.op(aten.mul.Tensor, b.op(aten.unsqueeze.default, b.op(aten.exp.default, arange(b)), 1), arange(b, 5))
    gm = b.build(b.op(aten.mul.Tensor, b.input(4, 5), outer))
    check(FoldConstants(max_bytes=4 * 5 * 4 - 1), gm, b.inputs, -2)
    assert [value.shape for value in buffers(gm).values()] in ([(5,), (4, 1)], [(4, 1), (5,)])


def test_a_large_constant_that_a_small_one_is_made_of_is_not_held() -> None:
    b = GraphBuilder()
    total = b.op(aten.sum.default, b.op(aten.repeat.default, arange(b), [100]))
    gm = b.build(b.op(aten.mul.Tensor, b.input(4), total))
    check(FoldConstants(max_bytes=100), gm, b.inputs, -2)
    assert [value.numel() for value in buffers(gm).values()] == [1]


def test_names_do_not_clash() -> None:
    b = GraphBuilder()
    b.root.register_buffer("folded_0", torch.ones(4))
    taken = b.graph.get_attr("folded_0")
    gm = b.build(b.op(aten.mul.Tensor, b.op(aten.mul.Tensor, b.input(4), taken), b.op(aten.exp.default, arange(b))))
    check(FoldConstants(), gm, b.inputs, -1)
    assert torch.equal(gm.folded_0, torch.ones(4))
    assert list(buffers(gm)) == ["folded_0", "folded_1"]


def test_a_constant_whose_type_is_another_one_by_now_is_not_folded() -> None:
    b = GraphBuilder()
    gm = b.build(b.op(aten.mul.Tensor, b.input(4), b.op(aten.ones.default, [4])))
    torch.set_default_dtype(torch.float64)
    try:
        assert not FoldConstants()(gm).modified
    finally:
        torch.set_default_dtype(torch.float32)
    assert FoldConstants()(gm).modified


def test_a_constant_stays_on_its_device() -> None:
    b = GraphBuilder()
    b.input(4)
    constant = b.op(aten.exp.default, b.op(aten.arange.start, 0, 4, device=torch.device("meta")))
    gm = b.build(b.op(aten.neg.default, constant))
    run_passes(gm, [FoldConstants()])
    [value] = buffers(gm).values()
    assert value.device.type == "meta"


def test_copies_of_the_graph_share_the_folded_values() -> None:
    b = GraphBuilder()
    gm = b.build(b.op(aten.mul.Tensor, b.input(4), b.op(aten.exp.default, arange(b))))
    run_passes(gm, [FoldConstants()])
    twin = fx.GraphModule(gm, gm.graph)
    assert twin.folded_0 is gm.folded_0
    assert error(twin(*b.inputs), gm(*b.inputs)) == 0


def test_the_timestep_frequencies_of_a_unet_are_folded() -> None:
    gm, inputs = captured_unet()
    assert aten.arange.start in targets(gm)
    with torch.no_grad():
        expected = gm(*inputs)[0]
        _, [record] = run_passes(gm, [FoldConstants()])
        assert record.nodes_before - record.nodes_after == 4
        assert torch.equal(gm(*inputs)[0], expected)
    assert aten.arange.start not in targets(gm)
    assert [value.shape for value in buffers(gm).values()] == [(1, 4)]
