"""Composite operators taken apart one by one: the same values over the same weights, and what is to stay whole does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from deepcache_fx.execution import core_operators
from deepcache_fx.execution.core_operators import decompositions, in_core_operators
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.signature import CallReader
from tests.compvis import CompVisUNet
from tests.families import thorough

aten = torch.ops.aten


def captured() -> tuple[fx.GraphModule, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    unet = CompVisUNet().requires_grad_(False)
    call = CallReader(CompVisUNet.forward).read(
        unet, (torch.randn(2, 4, 8, 8), torch.tensor([900, 900]), torch.randn(2, 3, 6)), {}
    )
    return capture(unet, call, CallReader(CompVisUNet.forward)).graph, call.tensors


WHOLE = frozenset({aten.linear.default, aten.scaled_dot_product_attention.default})


def apart(module: fx.GraphModule) -> fx.GraphModule:
    return in_core_operators(module, decompositions(WHOLE), WHOLE)


def targets(module: fx.GraphModule) -> set[Any]:
    return {node.target for node in module.graph.nodes if node.op == "call_function"}


def is_left(target: Any) -> bool:
    return core_operators._is_composite(target, decompositions(WHOLE)) and target not in WHOLE


def test_no_composite_is_left_but_what_is_to_stay_whole_and_the_values_are_the_same() -> None:
    module, inputs = captured()
    composites = {aten.conv2d.default, aten.group_norm.default, aten.chunk.default}
    assert composites <= set(filter(is_left, targets(module)))
    result = apart(module)
    result.graph.lint()
    assert {aten.convolution.default, *WHOLE} <= targets(result)
    assert not any(map(is_left, targets(result)))
    assert {*map(id, result.parameters())} == {*map(id, module.parameters())}
    torch.testing.assert_close(result(*inputs), module(*inputs))


@thorough
def test_equal_calls_are_traced_once(monkeypatch: Any) -> None:
    module, _ = captured()
    traced: list[str] = []
    parts = core_operators._parts
    monkeypatch.setattr(core_operators, "_parts", lambda node, *rest: traced.append(node.name) or parts(node, *rest))
    apart(module)
    assert 0 < len(traced) < sum(is_left(node.target) for node in module.graph.nodes)


def test_what_needs_constants_of_its_own_stays_as_it_is() -> None:
    module, inputs = captured()
    table = {aten.silu.default: lambda x: x * torch.sigmoid(x) * torch.tensor(1.0)}
    graph = in_core_operators(module, table, ())
    assert aten.silu.default in targets(graph)
    torch.testing.assert_close(graph(*inputs), module(*inputs))
