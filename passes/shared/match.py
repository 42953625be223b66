"""Predicates and walks that make a pass read as prose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx


def is_op(node: object, *ops: Callable[..., Any]) -> bool:
    """True for a call of exactly one of these operator overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and any(node.target is op for op in ops)


def value(node: fx.Node) -> Any:
    """The fake tensor (or other value) the node stands for.

    Raises:
        ValueError: an earlier pass left the node without `meta["val"]`.
    """
    if "val" not in node.meta:
        raise ValueError(f"node {node.name} has no meta['val']: an earlier pass did not keep it")
    return node.meta["val"]


def tensor(node: object) -> torch.Tensor | None:
    """The node's fake tensor, or None where it is no tensor-valued node."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def is_view(node: fx.Node) -> bool:
    """True where what the node returns may share memory with its first argument."""
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return bool(shares and node.all_input_nodes)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user where there is exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def ancestors(nodes: Iterable[fx.Node], *, given: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Every node these are computed from, themselves included, where the values of `given` need not be computed."""
    known = set(given)
    seen = set(known)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen - known


def is_impure(node: fx.Node) -> bool:
    """True where removing the unused node would change what the program does.

    Stricter callers need not apply: in a functional graph only the borders and writes into inputs are impure. Random
    operators (attention with dropout 0 among them) and metadata assertions are not, unlike in `Node.is_impure`.
    """
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def eliminate_dead_code(graph: fx.Graph) -> bool:
    """Remove every node nothing depends on; True where there was one."""
    return bool(graph.eliminate_dead_code(is_impure_node=is_impure))
