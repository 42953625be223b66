"""Multiply-accumulate counts of graph nodes, from the shapes in their metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from passes.shared.sizes import hint

aten = torch.ops.aten

_ATTENTION = (
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates: those of layers, which have weights, and those of activations with activations.

    The latter are the products inside attention, fused or written out. Counters that hook modules see only the former.
    """

    dense: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.attention

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.dense + other.dense, self.attention + other.attention)


Size = Callable[[Any], int]
"""What a size counts as: see `hint`."""


def _product(node: fx.Node, macs: int, first: int = 0) -> Macs:
    """Of a matrix product: a layer's where a factor is a parameter, reshaped or transposed at most.

    The factors are the arguments from `first` on.
    """
    for operand in node.args[first : first + 2] if first else node.all_input_nodes:
        assert isinstance(operand, fx.Node)
        while operand.op == "call_function" and len(operand.all_input_nodes) == 1:
            operand = operand.all_input_nodes[0]
        if operand.op == "get_attr":
            return Macs(dense=macs)
    return Macs(attention=macs)


def node_macs(node: fx.Node, size: Size = hint) -> Macs:
    """MACs of one node; zero for everything that is no contraction. `size` says what sizes that are no numbers are."""
    if node.op != "call_function":
        return Macs()

    def shape(argument: object) -> torch.Size:
        assert isinstance(argument, fx.Node)
        return torch.Size(map(size, argument.meta["val"].shape))

    target = node.target
    if target is aten.linear.default:
        return Macs(dense=shape(node).numel() * shape(node.args[1])[-1])
    packet = getattr(target, "overloadpacket", None)
    if packet in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution):
        transposed = packet is aten.convolution and node.args[6]
        weight = shape(node.args[1])
        output = shape(node.args[0]) if transposed else shape(node)
        return Macs(dense=output.numel() * weight[1:].numel())
    if packet in (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d):
        return Macs(dense=shape(node.args[0]).numel() * shape(node.args[1])[1:].numel())
    if packet in (aten.matmul, aten.mm, aten.bmm, aten._int_mm):
        return _product(node, shape(node).numel() * shape(node.args[0])[-1])
    if packet in (aten.addmm, aten.baddbmm):
        return _product(node, shape(node).numel() * shape(node.args[1])[-1], first=1)
    if packet in (aten.einsum, aten.tensordot, aten.inner):  # an export keeps them whole; they run as matrix products
        tensors = fx.map_arg(node.args, lambda argument: torch.empty(shape(argument), device="meta"))
        with FlopCounterMode(display=False) as counter:
            target(*tensors)  # type: ignore[operator]
        return _product(node, counter.get_total_flops() // 2)
    if packet in _ATTENTION:
        query, key, value = map(shape, node.args[:3])
        return Macs(attention=query[:-1].numel() * key[-2] * (query[-1] + value[-1]))
    return Macs()


def total_macs(nodes: Iterable[fx.Node], size: Size = hint) -> Macs:
    """The sum over nodes."""
    return sum((node_macs(node, size) for node in nodes), Macs())
