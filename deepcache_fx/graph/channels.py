"""Which of a value's axes what reads it takes for channels: followed forward through a captured graph.

A concatenation says nothing of what it joins: a skip connection joins channels on axis 1 of (batch, channels, height,
width), a transformer joins tokens on axis 1 of (batch, tokens, width). What reads it tells them apart: a convolution
mixes channels and keeps places apart, a linear layer over the width keeps tokens apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from passes.shared.match import is_view, tensor
from passes.shared.operators import argument, is_pointwise
from passes.shared.sizes import hint

Role = Literal["channels", "positions"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_TRANSPOSED_CONVOLUTIONS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_CHANNEL_NORMS = ("group_norm", "batch_norm", "instance_norm")
_FEATURE_NORMS = ("layer_norm", "rms_norm")
_MATRIX_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "_int_mm": 0, "addmm": 1, "baddbmm": 1}
"""Operators, with the number of their first factor."""
_COPIES = ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "dropout", "type_as")
_KEEP_AXES = ("slice_scatter", "select_scatter", "roll", "flip", "pad", "constant_pad_nd")
_RESAMPLING = (
    "upsample_",
    "_upsample_",
    "avg_pool",
    "max_pool",
    "adaptive_avg_pool",
    "reflection_pad",
    "replication_pad",
)

Trace = torch.Tensor | Sequence[torch.Tensor]
"""Meta tensors of a node's shapes that have stride 0 in every axis but the followed one, or those that it was split
into. What an operator that only rearranges does to it, PyTorch itself tells."""


@dataclass(frozen=True)
class Reader:
    """A node that computes with the followed axis, and what it takes the axis for; None where it does not tell."""

    node: fx.Node
    role: Role | None

    @property
    def name(self) -> str:
        """The operator, for messages."""
        return _name(self.node)


def axis_readers(node: fx.Node, axis: int) -> Iterator[Reader]:
    """The first nodes that compute with this axis of `node`, in order.

    Followed are element-wise operators, copies, resampling, further concatenations, and everything that rearranges
    axes in such a way that the one followed can still be told from the others.
    """
    found = tensor(node)
    assert found is not None
    shape = _sizes(found.shape)
    traces: dict[fx.Node, Trace] = {node: _trace(shape, {axis % len(shape): 1})}
    waiting: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def wait_for(users: Iterable[fx.Node]) -> None:
        for user in users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                heapq.heappush(waiting, user)

    wait_for(node.users)
    while waiting:  # in the graph's order: what a node reads was followed before it
        user = heapq.heappop(waiting)
        trace = _follow(user, traces)
        if trace is None:
            yield Reader(user, _role(user, traces))
        else:
            traces[user] = trace
            wait_for(user.users)


def joins_channels(node: fx.Node, axis: int) -> bool:
    """True where something takes this axis of `node` for channels, and nothing takes it for positions."""
    shown = False
    for reader in axis_readers(node, axis):
        if reader.role == "positions":
            return False
        shown = shown or reader.role == "channels"
    return shown


def _trace(shape: Sequence[int], strides: dict[int, int]) -> torch.Tensor:
    return torch.empty_strided(shape, [strides.get(i, 0) for i in range(len(shape))], device="meta")


def _axes(trace: torch.Tensor) -> dict[int, int]:
    """Where the followed axis is now, maybe split into several, with their strides."""
    return {i: trace.stride(i) for i in range(trace.ndim) if trace.stride(i) and trace.shape[i] > 1}


def _follow(node: fx.Node, traces: dict[fx.Node, Trace]) -> Trace | None:
    """The node's trace, or None where the followed axis is not one that can be told in what it returns."""
    name = _name(node)
    followed = [traces[source] for source in node.all_input_nodes if source in traces]
    if name == "getitem":
        parts = followed[0]
        return None if isinstance(parts, torch.Tensor) else parts[node.args[1]]  # type: ignore[index]
    if not all(isinstance(trace, torch.Tensor) for trace in followed):
        return None
    plain = [trace for trace in followed if isinstance(trace, torch.Tensor)]
    if name in _COPIES:
        return plain[0]
    if is_view(node) or name == "_unsafe_view":
        return _rearranged(node, plain[0])
    output = tensor(node)
    if output is None:
        return None
    shape = _sizes(output.shape)
    if is_pointwise(node):
        return _together([trace.expand(shape) for trace in plain])
    if name == "cat":
        axis = argument(node, "dim") % len(shape)
        return _together([_joined(trace, shape, axis) for trace in plain])
    if name in _KEEP_AXES or name.startswith(_RESAMPLING):
        return _resized(plain[0], shape)
    if any(norm in name for norm in _FEATURE_NORMS):
        normalized = node.args[1] if len(node.args) > 1 else ()
        first = len(shape) - len(normalized) if isinstance(normalized, Sequence) else len(shape)
        return plain[0] if min(_axes(plain[0]), default=-1) >= first else None
    return None


def _rearranged(node: fx.Node, trace: torch.Tensor) -> Trace | None:
    def value(source: fx.Node) -> Any:
        if source is node.all_input_nodes[0]:
            return trace
        found = source.meta["val"]
        return found if isinstance(found, torch.Tensor) else hint(found)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    target: Any = node.target if _name(node) != "_unsafe_view" else torch.ops.aten.reshape.default
    try:
        result = target(*args, **kwargs)
    except RuntimeError:  # a view that mixes the followed axis with another one
        return None
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    if any(part.untyped_storage().nbytes() != trace.untyped_storage().nbytes() for part in parts):
        return None  # a copy, which `reshape` makes where a view would mix axes
    return result if isinstance(result, torch.Tensor) else parts


def _joined(trace: torch.Tensor, shape: Sequence[int], axis: int) -> torch.Tensor | None:
    axes = _axes(trace)
    if axis in axes:
        return _trace(shape, {axis: 1}) if len(axes) == 1 else None
    return _trace(shape, axes)


def _resized(trace: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    axes = _axes(trace)
    if len(shape) != trace.ndim or any(shape[i] != trace.shape[i] for i in axes):
        return None
    return _trace(shape, axes)


def _together(traces: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The one trace that all operands have, where they have the same."""
    first = traces[0]
    if first is None or any(trace is None or _axes(trace) != _axes(first) for trace in traces):
        return None
    return first


def _role(node: fx.Node, traces: dict[fx.Node, Trace]) -> Role | None:
    """What a node takes the followed axis of its input for, where it is an operator that treats channels apart."""
    name = _name(node)
    first = _MATRIX_PRODUCTS.get(name, 0)
    factors = [argument if isinstance(argument, fx.Node) else None for argument in node.args[first : first + 3]]
    traced = [traces.get(factor) if factor is not None else None for factor in factors]
    if name in ("scaled_dot_product_attention", *_MATRIX_PRODUCTS):
        return _role_in_product(name, factors, traced)
    trace = traced[0] if traced else None
    if not isinstance(trace, torch.Tensor) or trace.ndim < 2:
        return None
    channels: int | None = None
    if name in (*_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS):
        weight = tensor(factors[1])
        channels = None if weight is None else trace.ndim + 1 - weight.ndim
    elif any(norm in name for norm in _CHANNEL_NORMS):
        channels = 1
    elif name == "linear" or any(norm in name for norm in _FEATURE_NORMS):
        channels = trace.ndim - 1
    return _told(trace, channels) if channels is not None else None


def _role_in_product(name: str, factors: Sequence[fx.Node | None], traced: Sequence[Trace | None]) -> Role | None:
    if name == "scaled_dot_product_attention":
        sequences = [trace for trace in traced if isinstance(trace, torch.Tensor)]
        return "positions" if any(trace.ndim - 2 in _axes(trace) for trace in sequences) else None
    left, right = traced[:2]
    if isinstance(left, torch.Tensor) and _is_weight(factors[1]):
        return _told(left, left.ndim - 1)
    if isinstance(right, torch.Tensor) and _is_weight(factors[0]):
        return _told(right, right.ndim - 2)
    return None


def _told(trace: torch.Tensor, channels: int) -> Role | None:
    axes = _axes(trace)
    if set(axes) == {channels}:
        return "channels"
    return "positions" if channels not in axes else None


def _is_weight(node: fx.Node | None) -> bool:
    while node is not None and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node is not None and node.op == "get_attr"


def _sizes(shape: Iterable[Any]) -> list[int]:
    """Sizes that are not fixed count as in the example they were captured with."""
    return list(map(hint, shape))


def _name(node: fx.Node) -> str:
    """The operator's name, without its library and overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))
