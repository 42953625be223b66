"""What an operator does to its inputs, as far as passes need to know."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.shared.match import is_op
from passes.shared.sizes import hint

aten = torch.ops.aten


def argument(node: fx.Node, name: str) -> Any:
    """The argument of that name, given by position, by name or left at its default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, formal in enumerate(node.target._schema.arguments):
        if formal.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, formal.default_value if formal.has_default_value() else None)
    raise ValueError(f"{node.target} has no argument {name!r}")


def positional(node: fx.Node) -> list[Any]:
    """All arguments that may be given by position, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [argument(node, formal.name) for formal in node.target._schema.arguments if not formal.kwarg_only]


def is_random(node: fx.Node) -> bool:
    """True where two calls on equal inputs may differ. Dropout that is off, in attention too, is not random."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if is_op(node, aten.dropout.default):
        return argument(node, "train") is not False and argument(node, "p") != 0
    takes_dropout = any(formal.name == "dropout_p" for formal in node.target._schema.arguments)  # type: ignore[union-attr]
    return not takes_dropout or argument(node, "dropout_p") != 0


def is_pointwise(node: fx.Node) -> bool:
    """True where each element of the output depends on the elements at its own place (broadcast) of the inputs alone.

    Counts casts, copies and dropout that is off.
    """
    if node.op != "call_function" or is_random(node):
        return False
    if is_op(node, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.dropout.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and torch.Tag.pointwise in getattr(node.target, "tags", ())


def count(value: torch.Tensor) -> int:
    """How many elements a fake tensor has; sizes that are not fixed count as in the example they were captured with."""
    result = 1
    for size in value.shape:
        result *= hint(size)
    return result
