"""Where in the model a node comes from, as text a person can read."""

from __future__ import annotations

import re

from torch import fx

_PART = re.compile(r"[^.]+(\.\d+(?=\.|$))?")


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that made the node, as in `model.named_modules()`; "" for the model itself.

    Captured graphs hold the model as a part of theirs: that first word is left out.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([path for path, _ in stack.values()]), "")
    path = re.sub(r"@\d+", "", str(path))
    return "" if path == "model" else path.removeprefix("model.")


def first_part(path: str) -> tuple[str, str]:
    """A path's first name with its number, and the rest.

    Example:
        >>> first_part("down_blocks.0.resnets.1.conv1")
        ('down_blocks.0', 'resnets.1.conv1')
    """
    match = _PART.match(path)
    if match is None:
        return "", ""
    return match.group(), path[match.end() + 1 :]


def two_parts(path: str) -> str:
    """A path's first two names with their numbers.

    Example:
        >>> two_parts("down_blocks.0.resnets.1.conv1")
        'down_blocks.0.resnets.1'
    """
    first, rest = first_part(path)
    second, _ = first_part(rest)
    return f"{first}.{second}" if second else first
