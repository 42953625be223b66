"""Find the skip connections of a captured UNet, by dataflow alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

import torch
from torch import fx

from deepcache_fx.errors import BranchError
from deepcache_fx.graph.channels import axis_readers, joins_channels
from deepcache_fx.graph.macs import total_macs
from deepcache_fx.schedules.branch import Branch
from passes.shared.match import ancestors, is_op, tensor
from passes.shared.operators import argument
from passes.shared.sizes import hint

aten = torch.ops.aten


@dataclass(frozen=True)
class SkipConnection:
    """A `cat` on the channel axis that joins a deep feature with the skip that was set aside on the way down."""

    index: int
    """Counted from the output: 0 is the shallowest."""
    block: int
    layer: int
    """The published numbering: up block, and layer in it, counted from the output."""
    cat: fx.Node
    deep: fx.Node
    """The operand that DeepCache keeps: everything below it is skipped in a shallow step."""

    @property
    def operand(self) -> Literal[0, 1]:
        """Which operand of the `cat` is the deep one."""
        operands = self.cat.args[0]
        assert isinstance(operands, Sequence)
        return 0 if operands[0] is self.deep else 1


def find_skip_connections(graph: fx.Graph) -> tuple[SkipConnection, ...]:
    """All skip connections, shallowest first. Reads the dataflow alone: no class or attribute names.

    A skip connection is a two-operand `cat` on axis 1 of a feature map that is read as its channels (see `channels`)
    and whose operands share a convolution or linear layer over feature maps (the trunk), one of them being computed
    through more than the other: that one is deep.
    """
    found = []
    for node in reversed(list(graph.find_nodes(op="call_function", target=aten.cat.default))):
        deep = _deep_operand(node)
        if deep is not None:
            found.append((node, deep))
    result: list[SkipConnection] = []
    for block, (_, group) in enumerate(groupby(found, key=_block_key([cat for cat, _ in found]))):
        for layer, (cat, deep) in enumerate(group):
            result.append(SkipConnection(len(result), block, layer, cat, deep))
    return tuple(result)


def require_skip_connections(graph: fx.Graph, model: str) -> tuple[SkipConnection, ...]:
    """`find_skip_connections`, where there must be one. `model` is for the error.

    Raises:
        BranchError: there is none; says which concatenations were looked at, and what reads them as what.
    """
    found = find_skip_connections(graph)
    if found:
        return found
    message = (
        f"{model} has no skip connection (a concatenation on the channel axis of a deep and a shallow feature): "
        "DeepCache needs a U-Net"
    )
    others = list(islice(_other_cats(graph), 3))
    if others:
        message += f". What it joins are not shown to be channels on axis 1: {'; '.join(others)}. "
        message += "Transformers have no cut yet"
    raise BranchError(message)


def _other_cats(graph: fx.Graph) -> Iterator[str]:
    """Descriptions of the concatenations that join a deep and a shallow feature in another way, from the output."""
    for cat in reversed(list(graph.find_nodes(op="call_function", target=aten.cat.default))):
        output = tensor(cat)
        if output is None or output.ndim < 3 or _deeper_operand(cat) is None:
            continue
        axis = _axis(cat)
        readers = list(islice(axis_readers(cat, axis), 8))
        told = dict.fromkeys(f"{reader.name} as its {reader.role}" for reader in readers if reader.role is not None)
        untold = dict.fromkeys(reader.name for reader in readers)
        yield (
            f"{cat.name} on axis {axis} of {tuple(output.shape)}, read by "
            f"{' and '.join(told) or ' and '.join(untold) or 'no operator'}"
        )


def _deep_operand(cat: fx.Node) -> fx.Node | None:
    output = tensor(cat)
    if output is None or output.ndim < 3 or _axis(cat) != 1 or not joins_channels(cat, 1):
        return None
    return _deeper_operand(cat)


def _axis(cat: fx.Node) -> int:
    return int(argument(cat, "dim")) % int(cat.meta["val"].ndim)


def _deeper_operand(cat: fx.Node) -> fx.Node | None:
    """Of two operands that share a trunk, the one that is computed through more than the other."""
    operands = cat.args[0]
    if not isinstance(operands, Sequence) or len(operands) != 2:
        return None
    first, second = operands
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    through_first, through_second = ancestors([first]), ancestors([second])
    if not any(map(_is_trunk_layer, through_first & through_second)):
        return None
    only_first = total_macs(through_first - through_second).total
    only_second = total_macs(through_second - through_first).total
    if only_first == only_second:
        return None
    return first if only_first > only_second else second


def _is_trunk_layer(node: fx.Node) -> bool:
    output = tensor(node)
    if output is None or output.ndim < 3:
        return False
    return is_op(
        node, aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding
    )


def _block_key(cats: list[fx.Node]) -> Callable[[tuple[fx.Node, fx.Node]], object]:
    """Groups skip connections into up blocks: by the module that holds the `cat`, else by resolution."""
    owners = {_owner(cat) for cat in cats}
    if len(owners) > 1:
        return lambda found: _owner(found[0])
    return lambda found: tuple(map(hint, found[0].meta["val"].shape[2:]))


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "")


def pick_branch(branches: Sequence[SkipConnection], branch: Branch, model: str) -> SkipConnection:
    """The skip connection a user means by a number or by the published (block, layer).

    Raises:
        BranchError: there is none such; names the range.
    """
    assert branches, "see require_skip_connections"
    if isinstance(branch, int):
        if branch < len(branches):
            return branches[branch]
        raise BranchError(
            f"branch {branch} is out of range: {model} has skip connections 0 (shallowest) to {len(branches) - 1}"
        )
    for candidate in branches:
        if (candidate.block, candidate.layer) == branch:
            return candidate
    layers = {b.block: sum(c.block == b.block for c in branches) for b in branches}
    text = ", ".join(f"block {block}: layers 0-{count - 1}" for block, count in layers.items())
    raise BranchError(f"branch (block, layer) = {branch} is out of range: {model} has {text}")


def pick_branches(
    skips: Sequence[SkipConnection], branch: Branch, deeper: Sequence[Branch], model: str
) -> dict[Branch | None, SkipConnection]:
    """The skip connections that a schedule uses, from the shallowest: None is `branch`, the others by their names.

    Raises:
        BranchError: there is none such, or one of `deeper` is not deeper than `branch`.
    """
    first = pick_branch(skips, branch, model)
    found = {name: pick_branch(skips, name, model) for name in deeper}
    for name, skip in found.items():
        if skip.index <= first.index:
            raise BranchError(
                f"the schedule's branch {name} must be deeper than optimize's branch {branch}: {model} has skip "
                f"connections {first.index + 1} to {len(skips) - 1} there"
            )
    return {None: first, **dict(sorted(found.items(), key=lambda item: item[1].index))}
