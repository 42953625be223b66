"""Push a channel concatenation down through a layer, so that each operand goes through it by itself.

    joined = cat([a, b], 1)                     k = whole groups of channels of a
    x = group_norm(joined, G, w, c)             x_a = silu(group_norm(a, k, w[:Ca], c[:Ca]))
    x = silu(x)                            ->   x_b = silu(group_norm(b, G - k, w[Ca:], c[Ca:]))
    y = conv2d(x, W, bias)                      y = conv2d(x_a, W[:, :Ca]) + conv2d(x_b, W[:, Ca:], bias)

`y` is then a sum of two terms, one of which depends on `a` alone: where `a` changes less often than `b`, that term need
not be computed as often. A convolution or linear layer splits because it is linear, a group norm where its groups lie
on either side. A group that straddles the boundary stays with `b`, and the boundary moves to the last whole group:

    x_a = group_norm(a[:, :k*s], k, ...)        x_b = group_norm(cat([a[:, k*s:], b], 1), G - k, ...)

Exact but for the order of summation: in float32 about 1e-6 relative. In float16 and bfloat16 either half is rounded
before they are added: up to one unit in the last place of the larger half more than the unsplit layer.

The halves of the weights are views: in-place updates are seen, and nothing is kept. A convolution kernel that wants
dense weights copies its half at every call, which is small beside the activations where it is worth splitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.shared.match import is_op, tensor
from passes.shared.operators import argument, is_pointwise, positional
from passes.shared.rewrite import Declined, add_call

aten = torch.ops.aten

_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
# Operators that treat every channel alike, with the number of dimensions that makes axis 1 the channels.
_CHANNELWISE: Mapping[Any, int] = {
    aten.upsample_nearest2d.vec: 4,
    aten.upsample_bilinear2d.vec: 4,
    aten.avg_pool2d.default: 4,
}

Parts = tuple[fx.Node, fx.Node]


class SplitOverCat(PassBase):
    """See the module's first lines.

    Leaves alone a concatenation that leads to no convolution or linear layer. Users on the way that cannot be split get
    the halves concatenated; the others are split all the same.

    Args:
        cats: Which concatenations of two operands: "all", names of nodes, or a predicate.
        alone: The operand whose half must depend on it alone; straddling groups and biases go to the other half.

    Attributes:
        declined: What the last call left alone, and why.
    """

    keeps_metadata = True

    def __init__(
        self, cats: str | Iterable[str] | Callable[[fx.Node], bool] = "all", *, alone: Literal[0, 1] = 0
    ) -> None:
        super().__init__()
        if alone not in (0, 1):
            raise ValueError(f"alone must be 0 or 1, the index of an operand of the cat, got {alone!r}")
        self.cats = frozenset([cats] if isinstance(cats, str) else cats) if not callable(cats) else cats
        self.alone = alone
        self.declined: tuple[Declined, ...] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        cats = list(graph.find_nodes(op="call_function", target=aten.cat.default))
        declined = [Declined((name,), "there is no concatenation of that name") for name in self._missing(cats)]
        modified = False
        for cat in cats:
            if not self._is_chosen(cat):
                continue
            reason = _why_not(cat)
            if reason is None:
                path = _Path(cat, self.alone)
                if path.layers:
                    _split(path)
                    modified = True
                    continue
                reason = "leads to no convolution or linear layer that splits"
            declined.append(Declined((cat.name,), reason))
        self.declined = tuple(declined)
        return PassResult(graph_module, modified)

    def _missing(self, cats: Iterable[fx.Node]) -> list[str]:
        return [] if callable(self.cats) else sorted(self.cats - {"all", *(cat.name for cat in cats)})

    def _is_chosen(self, cat: fx.Node) -> bool:
        if callable(self.cats):
            return self.cats(cat)
        return "all" in self.cats or cat.name in self.cats


def _why_not(cat: fx.Node) -> str | None:
    """Why a `cat` does not join two operands that can go their own ways; None where it does."""
    operands = cat.args[0]
    if not isinstance(operands, Sequence) or len(operands) != 2:
        return "does not join two operands"
    first, second, joined = (tensor(node) for node in (*operands, cat))
    if first is None or second is None or joined is None:
        return "an operand is no tensor"
    if len({(val.ndim, val.dtype, val.device) for val in (first, second, joined)}) > 1:
        return "converts an operand"
    axis = _axis(cat)
    if not all(type(val.shape[axis]) is int and val.shape[axis] > 0 for val in (first, second)):
        return "the number of channels is zero or not fixed"
    return None


def _axis(cat: fx.Node) -> int:
    axis, joined = argument(cat, "dim"), tensor(cat)
    assert joined is not None
    assert isinstance(axis, int)
    return axis % joined.ndim


class _Path:
    """What a `cat` can be pushed through.

    `layers` are the convolutions and linear layers it ends in, `boundaries` the nodes on the way to them, the `cat`
    included, each with the number of channels that lie on the first side there. Both in the graph's order.
    """

    def __init__(self, cat: fx.Node, alone: int) -> None:
        first, joined = tensor(cat.args[0][0]), tensor(cat)  # type: ignore[index]
        assert first is not None
        assert joined is not None
        self.cat = cat
        self.alone = alone
        self.axis = _axis(cat)
        self.channels = joined.shape[self.axis]
        reached = {cat: first.shape[self.axis]}
        self.layers: list[fx.Node] = []
        node = cat.next
        while node.op != "output":
            if any(source in reached for source in node.all_input_nodes):
                if self._is_layer(node, reached):
                    self.layers.append(node)
                elif (boundary := self._boundary(node, reached)) is not None:
                    reached[node] = boundary
            node = node.next
        needed = set(self.layers)
        for node in reversed(reached):
            if any(user in needed for user in node.users):
                needed.add(node)
        self.boundaries = {node: boundary for node, boundary in reached.items() if node in needed}

    def _boundary(self, node: fx.Node, reached: Mapping[fx.Node, int]) -> int | None:
        """How many channels of the node's output lie on the first side; None where it cannot be split."""
        if is_pointwise(node):
            boundaries = {reached.get(source) for source in node.all_input_nodes}
            return boundaries.pop() if len(boundaries) == 1 else None
        if self.axis != 1 or not _reads_as_input(node, reached):
            return None
        boundary = reached[node.all_input_nodes[0]]
        if is_op(node, *_CHANNELWISE):
            output = tensor(node)
            return boundary if output is not None and output.ndim == _CHANNELWISE[node.target] else None
        if is_op(node, aten.group_norm.default):
            size = self.channels // argument(node, "num_groups")
            boundary = boundary // size * size if self.alone == 0 else -(-boundary // size) * size
            return boundary if 0 < boundary < self.channels else None
        return None

    def _is_layer(self, node: fx.Node, reached: Mapping[fx.Node, int]) -> bool:
        """True for a layer over the joined channels whose weight can be sliced."""
        if not is_op(node, *_CONVOLUTIONS, aten.linear.default) or not _reads_as_input(node, reached):
            return False
        source, weight = tensor(node.args[0]), tensor(node.args[1])
        if source is None or weight is None or is_traceable_wrapper_subclass(weight):  # a quantised weight, say
            return False
        if is_op(node, aten.linear.default):
            return self.axis == source.ndim - 1
        return self.axis == 1 and source.ndim == weight.ndim and argument(node, "groups") == 1


def _reads_as_input(node: fx.Node, reached: Mapping[fx.Node, int]) -> bool:
    """True where the first of the node's inputs is in `reached`, and no other (a weight) is."""
    return [source in reached for source in node.all_input_nodes].count(True) == 1 and node.args[0] in reached


def _split(path: _Path) -> None:
    parts: dict[fx.Node, Parts] = {path.cat: tuple(path.cat.args[0])}  # type: ignore[arg-type]
    for node in list(path.boundaries)[1:]:
        parts[node] = _split_node(path, node, parts)
    for layer in path.layers:
        _split_layer(path, layer, parts)
    for node in reversed(path.boundaries):
        others = [user for user in node.users if user not in path.boundaries]
        if others and node is not path.cat:
            joined = add_call(aten.cat.default, (list(parts[node]), path.axis), before=node, like=node)
            for user in others:
                user.replace_input_with(node, joined)
        if not node.users:
            node.graph.erase_node(node)


def _split_node(path: _Path, node: fx.Node, parts: Mapping[fx.Node, Parts]) -> Parts:
    if not is_op(node, aten.group_norm.default):
        first, second = (_on_one_side(node, {source: pair[side] for source, pair in parts.items()}) for side in (0, 1))
        return first, second
    source, groups, weight, bias, *rest = positional(node)
    boundary = path.boundaries[node]
    halves = []
    for part, (start, end) in zip(
        _moved(path, node, parts[source], path.boundaries[source]), _sides(path, boundary), strict=True
    ):
        args = [part, (end - start) * groups // path.channels]
        args += [None if one is None else _slice(one, 0, start, end, node) for one in (weight, bias)]
        halves.append(add_call(aten.group_norm.default, (*args, *rest), before=node, like=node))
    return halves[0], halves[1]


def _on_one_side(node: fx.Node, part: Mapping[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.map_arg((node.args, node.kwargs), part.__getitem__)
    return add_call(node.target, args, kwargs, before=node, like=node)  # type: ignore[arg-type]


def _moved(path: _Path, node: fx.Node, parts: Parts, boundary: int) -> Parts:
    """The same channels as `parts`, which meet at `boundary`, parted at the node's boundary."""
    first, second = parts
    new = path.boundaries[node]
    if new < boundary:
        moving = _slice(first, path.axis, new, boundary, node)
        second = add_call(aten.cat.default, ([moving, second], path.axis), before=node, like=path.cat)
        first = _slice(first, path.axis, 0, new, node)
    elif new > boundary:
        moving = _slice(second, path.axis, 0, new - boundary, node)
        first = add_call(aten.cat.default, ([first, moving], path.axis), before=node, like=path.cat)
        second = _slice(second, path.axis, new - boundary, path.channels - boundary, node)
    return first, second


def _split_layer(path: _Path, layer: fx.Node, parts: Mapping[fx.Node, Parts]) -> None:
    source, weight, bias, *rest = positional(layer)
    halves = []
    for side, (start, end) in enumerate(_sides(path, path.boundaries[source])):
        half = _slice(weight, 1, start, end, layer)
        args = (parts[source][side], half, None if side == path.alone else bias, *rest)
        halves.append(add_call(layer.target, args, before=layer, like=layer))  # type: ignore[arg-type]
    total = add_call(aten.add.Tensor, halves, before=layer, like=layer)
    layer.replace_all_uses_with(total)
    layer.graph.erase_node(layer)


def _sides(path: _Path, boundary: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, boundary), (boundary, path.channels)


def _slice(source: fx.Node, axis: int, start: int, end: int, node: fx.Node) -> fx.Node:
    return add_call(aten.slice.Tensor, (source, axis, start, end), before=node, like=node)
