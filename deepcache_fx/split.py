"""Find the skip connections of a captured UNet and split it at one into a full and a shallow variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import fx

from deepcache_fx.capture import Captured
from deepcache_fx.config import Branch
from deepcache_fx.errors import BranchError
from deepcache_fx.macs import Macs, total_macs
from passes.match import ancestors, eliminate_dead_code, is_op, is_view, tensor

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


def find_skip_connections(graph: fx.Graph) -> tuple[SkipConnection, ...]:
    """All skip connections, shallowest first. Reads the dataflow alone: no class or attribute names.

    A skip connection is a two-operand `cat` on axis 1 of a feature map whose operands share a convolution or linear
    layer over feature maps (the trunk), one of them being computed through more than the other: that one is deep.
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


def _deep_operand(cat: fx.Node) -> fx.Node | None:
    output = tensor(cat)
    operands = cat.args[0]
    axis = cat.args[1] if len(cat.args) > 1 else 0
    if output is None or output.ndim < 3 or not isinstance(operands, Sequence) or len(operands) != 2:
        return None
    if axis not in (1, 1 - output.ndim):
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
    return lambda found: tuple(found[0].meta["val"].shape[2:])


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "")


def pick_branch(branches: Sequence[SkipConnection], branch: Branch, model: str) -> SkipConnection:
    """The skip connection a user means by a number or by the published (block, layer).

    Raises:
        BranchError: there is none such; names the range.
    """
    if not branches:
        raise BranchError(
            f"{model} has no skip connection (a concatenation on the channel axis of a deep and a shallow feature): "
            "DeepCache needs a U-Net"
        )
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


@dataclass(frozen=True)
class Variants:
    """Two programs over one set of weights.

    `full` maps the inputs to (*outputs, *cache); `shallow` maps (*inputs, *cache) to the outputs. `cache` holds the
    fake tensors that describe the cached values.
    """

    branch: SkipConnection
    full: fx.GraphModule
    shallow: fx.GraphModule
    num_outputs: int
    cache: tuple[torch.Tensor, ...]
    full_macs: Macs
    shallow_macs: Macs

    @property
    def cache_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.cache)


def split(captured: Captured, branch: SkipConnection) -> Variants:
    """Cut the graph at the deep operand of a skip connection of `captured.graph`."""
    graph = captured.graph.graph
    deep = branch.deep
    full, full_nodes = _copy(graph)
    output = full.output_node()
    num_outputs = len(output.args[0])  # type: ignore[arg-type]
    _part_from(full, full_nodes[deep])
    output.args = ((*output.args[0], full_nodes[deep]),)  # type: ignore[misc]
    eliminate_dead_code(full)

    shallow, shallow_nodes = _copy(graph)
    with shallow.inserting_after(shallow.find_nodes(op="placeholder")[-1]):
        cached = shallow.placeholder("cached")
    cached.meta["val"] = deep.meta["val"]
    shallow_nodes[deep].replace_all_uses_with(cached)
    _part_from(shallow, cached)
    eliminate_dead_code(shallow)

    return Variants(
        branch=branch,
        full=fx.GraphModule(captured.graph, full, "FullStep"),
        shallow=fx.GraphModule(captured.graph, shallow, "ShallowStep"),
        num_outputs=num_outputs,
        cache=(deep.meta["val"],),
        full_macs=total_macs(full.nodes),
        shallow_macs=total_macs(shallow.nodes),
    )


def _part_from(graph: fx.Graph, kept: fx.Node) -> None:
    """Clone the outputs that are `kept` or a view of it: a caller may write into what it was given."""
    output = graph.output_node()
    leaves = list(output.args[0])  # type: ignore[arg-type]
    for i, leaf in enumerate(leaves):
        node = leaf
        while isinstance(node, fx.Node) and node is not kept and is_view(node):
            node = node.all_input_nodes[0]
        if node is kept:
            with graph.inserting_before(output):
                leaves[i] = graph.call_function(aten.clone.default, (leaf,))
            leaves[i].meta = dict(leaf.meta)
    output.args = (tuple(leaves),)


def _copy(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    results = copy.graph_copy(graph, mapping)
    copy.output(results)
    copy.output_node().meta = dict(graph.output_node().meta)
    return copy, mapping
