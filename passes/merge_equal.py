"""Compute equal values once (common subexpression elimination).

    a = silu(temb)                    a = silu(temb)
    x = linear(a, W)                  x = linear(a, W)
    b = silu(temb)              ->
    y = linear(b, V)                  y = linear(a, V)

Exact, in a functional graph: the same operator on the same arguments gives the same bits. Left alone are random
operators, writes, and values that an output may share memory with: two outputs must not come to share theirs.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.shared.match import is_impure
from passes.shared.operators import is_random
from passes.shared.rewrite import is_returned

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class MergeEqual(PassBase):
    """See the module's first lines."""

    keeps_metadata = True  # only removes nodes

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        first: dict[Hashable, fx.Node] = {}
        modified = False
        for node in list(graph.nodes):
            if node.op not in ("get_attr", "call_function") or is_impure(node) or is_random(node):
                continue
            key = _key((node.args, node.kwargs))
            if key is None:
                continue
            equal = first.setdefault((node.op, node.target, key), node)
            if equal is not node and not is_returned(node):
                node.replace_all_uses_with(equal)
                graph.erase_node(node)
                modified = True
        return PassResult(graph_module, modified)


def _key(argument: Any) -> Hashable | None:
    """Equal for equal arguments, and for no others: 1, 1.0 and True differ. None where that cannot be told."""
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, (tuple, list)):
        parts = tuple(map(_key, argument))
        return None if None in parts else ("sequence", *parts)
    if isinstance(argument, dict):
        return _key([part for name in sorted(argument) for part in (name, argument[name])])
    if isinstance(argument, slice):
        return _key((argument.start, argument.stop, argument.step))
    return (type(argument), repr(argument)) if isinstance(argument, _PLAIN) else None
