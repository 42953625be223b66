"""Facts about operators: arguments by name, randomness, pointwise operators, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from passes.shared.operators import argument, count, is_pointwise, is_random, positional
from tests.graphs import GraphBuilder

aten = torch.ops.aten


def call(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
    return fx.Graph().call_function(target, args, kwargs)


def test_an_argument_is_found_by_position_by_name_and_by_default() -> None:
    x = fx.Graph().placeholder("x")
    assert argument(call(aten.group_norm.default, x, 4), "num_groups") == 4
    assert argument(call(aten.group_norm.default, x, num_groups=4), "num_groups") == 4
    assert argument(call(aten.group_norm.default, x, 4), "eps") == 1e-5
    assert argument(call(aten.group_norm.default, x, 4), "weight") is None
    with pytest.raises(ValueError, match="no argument 'channels'"):
        argument(call(aten.group_norm.default, x, 4), "channels")


def test_positional_arguments_come_with_their_defaults() -> None:
    x = fx.Graph().placeholder("x")
    assert positional(call(aten.linear.default, x, weight=x)) == [x, x, None]
    assert positional(call(aten.add.Tensor, x, x, alpha=2)) == [x, x]  # alpha goes by name only


@pytest.mark.parametrize(
    ("target", "args", "random"),
    [
        (aten.rand.default, ([2],), True),
        (aten.bernoulli.default, (None,), True),
        (aten.dropout.default, (None, 0.5, True), True),
        (aten.dropout.default, (None, 0.5, False), False),
        (aten.dropout.default, (None, 0.0, True), False),
        (aten.scaled_dot_product_attention.default, (None, None, None), False),
        (aten.scaled_dot_product_attention.default, (None, None, None, None, 0.5), True),
        (aten._scaled_dot_product_flash_attention.default, (None, None, None), False),
        (aten.linear.default, (None, None), False),
    ],
)
def test_tells_what_is_random(target: torch._ops.OpOverload, args: tuple[object, ...], random: bool) -> None:
    assert is_random(call(target, *args)) == random


@pytest.mark.parametrize(
    ("target", "args", "pointwise"),
    [
        (aten.silu.default, (None,), True),
        (aten.mul.Tensor, (None, None), True),
        (aten.to.dtype, (None, torch.float16), True),
        (aten._to_copy.default, (None,), True),
        (aten.clone.default, (None,), True),
        (aten.dropout.default, (None, 0.5, False), True),
        (aten.dropout.default, (None, 0.5, True), False),
        (aten.mul_.Tensor, (None, None), False),
        (aten.softmax.int, (None, 1), False),
        (aten.cat.default, ([],), False),
        (aten.group_norm.default, (None, 4), False),
    ],
)
def test_tells_what_is_pointwise(target: torch._ops.OpOverload, args: tuple[object, ...], pointwise: bool) -> None:
    assert is_pointwise(call(target, *args)) == pointwise


def test_inputs_are_neither_random_nor_pointwise() -> None:
    b = GraphBuilder()
    x = b.input(2)
    assert not is_random(x)
    assert not is_pointwise(x)


def test_counts_elements_where_a_size_is_not_fixed() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    dim = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Net(), (torch.randn(6, 4),), dynamic_shapes={"x": {0: dim}}, strict=False)
    [x] = [node for node in program.graph.nodes if node.op == "placeholder"]
    assert not isinstance(x.meta["val"].shape[0], int)
    assert count(x.meta["val"]) == 24
