"""Find self-attention over the pixels of a feature map, and run it on fewer tokens than pixels.

    x -> linear, view, transpose, ... -> q, k, v -> attention -> transpose, view, linear -> y

Every operator between x and y treats tokens alike and apart, so that it works on any number of them. That is tried out
on fake values: each operator is run on one token less, and must return one token less and nothing else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.shared.match import is_op, only_user, tensor, value
from passes.shared.operators import argument, is_pointwise

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_PERMUTES = (aten.transpose.int, aten.permute.default)
_LAYERS = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
_MOVES = (
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.unflatten.int, aten.flatten.using_ints, aten.clone.default),
    *(aten.slice.Tensor, aten.select.int, aten.unbind.int, operator.getitem),
    *(aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default),
)


@dataclass(frozen=True)
class PixelAttention:
    """Self-attention over a feature map of `height` by `width` pixels, row by row.

    `tokens` and `result` are (batch, height * width, channels). `axes` has every node from the one to the other in the
    graph's order, `result` included, with the axis of its tokens; several tensors in one have none.
    """

    tokens: fx.Node
    result: fx.Node
    axes: Mapping[fx.Node, int | None]
    height: int
    width: int


def find_pixel_attention(attention: fx.Node) -> PixelAttention | str:
    """What this call of `scaled_dot_product_attention` is in the middle of, or why it is none over pixels."""
    if argument(attention, "attn_mask") is not None or argument(attention, "is_causal"):
        return "has a mask"
    projected = [argument(attention, name) for name in ("query", "key", "value")]
    above = [_above(node) for node in projected]
    tokens = _common_source(above)
    if tokens is None:
        return "attends to other tokens than its own"
    size = _image_size(tokens)
    if size is None:
        return "its tokens are not the pixels of a feature map"
    trial = _Trial(tokens)
    inside = {attention, *above[0], *above[1], *above[2]}
    for node in sorted(inside - {attention}):
        if trial.reaches(node):
            if not trial.run(node):
                return f"{node.name} may mix tokens"
            if not inside.issuperset(node.users):
                return f"something else reads {node.name}"
    result = trial.attend(attention, projected)
    if result is None:
        return "its result does not come as (batch, tokens, channels)"
    return PixelAttention(tokens, result, trial.axes, *size)


def run_on_fewer(found: PixelAttention, fewer: fx.Node) -> None:
    """Let the attention read `fewer`, (batch, fewer tokens, channels), in place of its tokens."""
    for node, axis in found.axes.items():
        node.replace_input_with(found.tokens, fewer)
        if is_op(node, *_RESHAPES) and axis is not None:
            node.args = (node.args[0], _resized(node, axis, value(fewer).shape[1]))
        with torch.no_grad():
            node.meta["val"] = _call(node, {})


class _Trial:
    """Runs operators on one token less than there are; `axes` says where the tokens of each are."""

    def __init__(self, tokens: fx.Node) -> None:
        self.batch, self.count, _ = value(tokens).shape
        self.axes: dict[fx.Node, int | None] = {}
        self._values: dict[fx.Node, Any] = {tokens: value(tokens)[:, 1:].clone()}
        self._tokens = tokens

    def reaches(self, node: fx.Node) -> bool:
        """True where the node depends on the tokens."""
        return any(source in self._values for source in node.all_input_nodes)

    def run(self, node: fx.Node) -> bool:
        """False where the operator mixes tokens, or may."""
        if not _is_per_token(node):
            return False
        if not is_op(node, *_RESHAPES):
            return self._record(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axes = _same_axes(value(source).shape, self._axis(source), value(node).shape)
        return len(axes) == 1 and self._record(node, sizes=_resized(node, axes[0], self.count - 1))

    def attend(self, attention: fx.Node, projected: Sequence[fx.Node]) -> fx.Node | None:
        """Run the attention and what follows, down to the layer after it; returns the last node of the right form."""
        if any(node not in self._values or self._axis(node) != value(node).ndim - 2 for node in projected):
            return None
        node: fx.Node | None = attention
        result, axes = None, self.axes
        run: Callable[[fx.Node], bool] = self._record
        while node is not None and run(node):
            val = tensor(node)
            if val is not None and val.ndim == 3 and val.shape[0] == self.batch and self._axis(node) == 1:
                result, axes = node, dict(self.axes)
            if is_op(node, aten.linear.default):
                break
            node, run = only_user(node), self.run
        self.axes = axes
        return result

    def _axis(self, node: fx.Node) -> int:
        axis = 1 if node is self._tokens else self.axes[node]
        assert axis is not None
        return axis

    def _record(self, node: fx.Node, sizes: Sequence[int] | None = None) -> bool:
        try:
            with torch.no_grad():
                result = _call(node, self._values, sizes)
        except (RuntimeError, ValueError, IndexError):  # it takes one number of tokens only
            return False
        axis = None
        if isinstance(result, torch.Tensor):
            pairs = enumerate(zip(value(node).shape, result.shape, strict=False))
            changed = [(index, pair) for index, pair in pairs if pair[0] != pair[1]]
            if result.ndim != value(node).ndim or len(changed) != 1 or changed[0][1] != (self.count, self.count - 1):
                return False
            axis = changed[0][0]
        self.axes[node], self._values[node] = axis, result
        return True


def _call(node: fx.Node, values: Mapping[fx.Node, Any], sizes: Sequence[int] | None = None) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: values[one] if one in values else value(one))
    if sizes is not None:
        args = (args[0], sizes)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _resized(node: fx.Node, axis: int, count: int) -> list[int]:
    """The sizes that a reshape is given, with another number of tokens."""
    sizes = list(node.args[1])  # type: ignore[arg-type]
    return [count if index == axis and size != -1 else size for index, size in enumerate(sizes)]


def _is_per_token(node: fx.Node) -> bool:
    """True for operators that treat tokens apart, or else refuse fewer of them or return another number."""
    known = node.op == "call_function" and node.target in (*_RESHAPES, *_PERMUTES, *_LAYERS, *_MOVES)
    return known or is_pointwise(node)


def _above(node: fx.Node) -> set[fx.Node]:
    """The node and what it is computed of, token by token."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if _is_per_token(node):
                pending += node.all_input_nodes
    return seen


def _common_source(above: Sequence[set[fx.Node]]) -> fx.Node | None:
    """The last value of the form (batch, tokens, channels) of which all are computed, before any layer they share."""

    def is_tokens(node: object) -> bool:
        val = tensor(node)
        return (
            val is not None
            and val.ndim == 3
            and val.is_floating_point()
            and all(type(size) is int for size in val.shape)
        )

    node = max(filter(is_tokens, set.intersection(*above)), default=None)
    while node is not None and is_op(node, aten.linear.default):
        source = node.args[0]
        node = source if isinstance(source, fx.Node) and is_tokens(source) else None
    return node


def _image_size(tokens: fx.Node) -> tuple[int, int] | None:
    """Height and width of the feature map whose pixels the tokens are."""
    pending = [(tokens, 1)]
    seen = set()
    while pending:
        node, axis = pending.pop()
        if (node, axis) in seen:
            continue
        seen.add((node, axis))
        if is_op(node, *_RESHAPES):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            shape = value(source).shape
            axes = _same_axes(value(node).shape, axis, shape)
            if len(shape) == 4 and len(axes) == 2:
                return shape[axes[0]], shape[axes[1]]
            pending += [(source, index) for index in axes[:1] if len(axes) == 1]
        elif is_op(node, *_PERMUTES):
            pending.append((argument(node, "self"), _order(node)[axis]))
        elif is_pointwise(node) or is_op(node, *_LAYERS, aten.clone.default, aten.group_norm.default):
            count = value(node).shape[axis]
            for source in node.all_input_nodes:
                val = tensor(source)
                if val is not None and val.ndim == value(node).ndim and val.shape[axis] == count:
                    pending.append((source, axis))
    return None


def _order(node: fx.Node) -> list[int]:
    """For each axis of a transposition or permutation, which one it was before."""
    order = list(range(value(node).ndim))
    if is_op(node, aten.permute.default):
        return [order[axis] for axis in argument(node, "dims")]
    first, second = argument(node, "dim0"), argument(node, "dim1")
    order[first], order[second] = order[second], order[first]
    return order


def _same_axes(shape: Sequence[int], axis: int, other: Sequence[int]) -> list[int]:
    """The axes of `other`, a reshape of `shape`, that together are its axis; none where they do not part so."""
    before = math.prod(shape[:axis])
    start = max((index for index in range(len(other)) if math.prod(other[:index]) == before), default=len(other))
    end = next((end for end in range(start, len(other) + 1) if math.prod(other[start:end]) == shape[axis]), start)
    return list(range(start, end))
