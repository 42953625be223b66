"""What passes that rewrite a graph share: adding calls that carry metadata, and saying what was left as it was."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from passes.shared.match import is_view, value
from passes.shared.sizes import layout


@dataclass(frozen=True)
class Declined:
    """A place a pass looked at and left as it was."""

    nodes: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{', '.join(self.nodes)}: {self.reason}"


def add_call(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    before: fx.Node,
    like: fx.Node,
) -> fx.Node:
    """Insert a call before a node. It computes part of what `like` computes, and says that it comes from there."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta = origin(like)
    with torch.no_grad():
        node.meta["val"] = target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    return node


def propagate(graph: fx.Graph, changed: Iterable[fx.Node]) -> None:
    """Recompute fake values downstream of nodes whose strides have changed, as far as strides change."""
    dirty = set(changed)
    for node in graph.nodes:
        if node.op == "call_function" and not dirty.isdisjoint(node.all_input_nodes):
            with torch.no_grad():
                new = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
            if _layout(new) != _layout(node.meta["val"]):
                dirty.add(node)
            node.meta["val"] = new


def strides_matter(node: fx.Node, new: Any) -> bool:
    """True where the graph would fail, or return other strides, were the node's value to have those of `new`.

    Follows the new strides through the graph until they make no difference.
    """
    changed = {node: new} if _layout(new) != _layout(value(node)) else {}
    reader = node
    while changed and reader.op != "output":
        reader = reader.next
        if not any(source in changed for source in reader.all_input_nodes):
            continue
        if reader.op == "output":
            return True
        inputs = fx.map_arg((reader.args, reader.kwargs), lambda source: changed.get(source, source.meta.get("val")))
        try:
            with torch.no_grad():
                result = reader.target(*inputs[0], **inputs[1])  # type: ignore[operator]
        except (RuntimeError, ValueError):  # a view that the new strides do not allow
            return True
        if _layout(result) != _layout(value(reader)):
            changed[reader] = result
    return False


def _layout(value: Any) -> list[tuple[Any, ...]]:
    return [layout(leaf)[1] for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def copied_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and its nodes by those that they are copies of."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, nodes))
    copy.output_node().meta = dict(graph.output_node().meta)
    return copy, nodes


def origin(node: fx.Node) -> dict[str, Any]:
    """The metadata that says where in the model a node comes from, for another that takes its place in part."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def views_of(node: fx.Node) -> list[fx.Node]:
    """The node and everything that may be a view of it, in the order found."""
    found = {node: None}
    stack = [node]
    while stack:
        base = stack.pop()
        new = [user for user in base.users if _may_share(user, base) and user not in found]
        found.update(dict.fromkeys(new))
        stack += new
    return list(found)


def _may_share(node: fx.Node, base: fx.Node) -> bool:
    return node.target is operator.getitem or (is_view(node) and node.all_input_nodes[0] is base)


def is_returned(node: fx.Node) -> bool:
    """True where an output may share memory with what the node returns."""
    return any(user.op == "output" for view in views_of(node) for user in view.users)
