"""Drop what a captured graph carries but does not need: metadata assertions and divisions by one.

    x = div(y, 1.0)                        x -> y
    _assert_tensor_metadata(y, ...)        (removed: the caller guards shapes, types and devices)

Exact. Inductor drops both too, but only when it compiles; an eager graph runs them.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.match import eliminate_dead_code, is_op, tensor

aten = torch.ops.aten


def _is_division_by_one(node: fx.Node) -> bool:
    if not is_op(node, aten.div.Tensor) or node.kwargs or isinstance(node.args[1], fx.Node) or node.args[1] != 1:
        return False
    before, after = tensor(node.args[0]), tensor(node)
    return before is not None and after is not None and before.dtype == after.dtype  # integer division makes floats


class Canonicalize(PassBase):
    """See the module's first lines."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            if is_op(node, aten._assert_tensor_metadata.default):
                graph.erase_node(node)
                modified = True
            elif _is_division_by_one(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                modified = True
        modified = eliminate_dead_code(graph) or modified
        return PassResult(graph_module, modified)
