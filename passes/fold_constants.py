"""Compute once what depends on no input and no parameter: the frequencies of a timestep embedding, say.

    i = arange(0, 160, device=d)
    f = exp(mul(i, -0.0576))          ->      f = get_attr("folded_0")
    y = mul(t, unsqueeze(f, 0))               y = mul(t, unsqueeze(f, 0))

Exact: the same operators compute the same bits on the same device, only earlier. What is read from the module (weights,
buffers) is not folded, for it may change; nor is what an output may share memory with, for every call must return a
tensor of its own; nor random or uninitialised values, nor results above a size. The folded tensors are buffers of the
GraphModule, left out of its state dict.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.shared.match import is_impure, is_op, tensor
from passes.shared.operators import is_random
from passes.shared.rewrite import is_returned, origin

aten = torch.ops.aten

_UNINITIALISED = (
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default),
    *(aten.new_empty.default, aten.new_empty_strided.default, aten.empty_permuted.default),
)


class FoldConstants(PassBase):
    """See the module's first lines.

    Args:
        max_bytes: The largest result to hold.
    """

    keeps_metadata = True

    def __init__(self, *, max_bytes: int = 64 * 1024) -> None:
        super().__init__()
        self.max_bytes = max_bytes

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        constants = _constants(graph)
        modified = False
        # From the last to the first: a constant that only folded ones read has no user left when its turn comes.
        for node in reversed(constants):
            if node.users:
                result = self._evaluated(node)
                if result is None:
                    continue
                _replace(graph_module, node, result)
            graph.erase_node(node)
            modified = True
        return PassResult(graph_module, modified)

    def _evaluated(self, node: fx.Node) -> torch.Tensor | None:
        """The node's value, where it may be held."""
        expected = tensor(node)
        if expected is None or is_returned(node) or expected.numel() * expected.element_size() > self.max_bytes:
            return None
        with torch.inference_mode(False), torch.no_grad():  # a buffer like any other, wherever the capture happens
            result = _evaluate(node, {})
        same = (result.dtype, result.device, result.shape) == (expected.dtype, expected.device, expected.shape)
        return result if same else None


def _constants(graph: fx.Graph) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        pure = node.op == "call_function" and not is_impure(node) and not is_random(node)
        if pure and not is_op(node, *_UNINITIALISED) and all(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)


def _evaluate(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    if node not in known:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _evaluate(source, known))
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def _replace(graph_module: fx.GraphModule, node: fx.Node, result: torch.Tensor) -> None:
    number = 0
    while hasattr(graph_module, f"folded_{number}"):
        number += 1
    graph_module.register_buffer(f"folded_{number}", result, persistent=False)
    with node.graph.inserting_before(node):
        buffer = node.graph.get_attr(f"folded_{number}")
    buffer.meta = {**origin(node), "val": node.meta["val"]}
    node.replace_all_uses_with(buffer)
