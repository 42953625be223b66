"""Take a captured UNet apart into the cells of its `Anatomy`, and count each by rate as the split does."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

from torch import fx

from deepcache_fx.drawing.anatomy import Anatomy, Cell, Level, RateMacs, Rung
from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.macs import node_macs
from deepcache_fx.graph.module_path import module_path, two_parts
from deepcache_fx.graph.skips import SkipConnection
from deepcache_fx.graph.split import Variants
from passes.shared.match import ancestors, tensor


def dissect(captured: Captured, skips: Sequence[SkipConnection], variants: Variants, *, sample: int = 0) -> Anatomy:
    """Take a captured UNet apart along its skip connections, and say of every part how often it runs.

    Args:
        captured: What was captured.
        skips: All of its skip connections, shallowest first.
        variants: What it was split into, at one of them.
        sample: Which of the graph's inputs is the noisy sample.

    Example:
        >>> skips = find_skip_connections(captured.graph.graph)
        >>> dissect(captured, skips, split(captured, skips[0], rates=RATES)).macs.step
    """
    graph = captured.graph.graph
    [cut] = variants.cuts
    branch = cut.branch
    members = _members(graph, skips, graph.find_nodes(op="placeholder")[sample])
    cell_of = {node.name: key for key, nodes in members.items() for node in nodes}
    # What the split has put in the place of a layer after the concatenation belongs to the cell that reads it.
    macs = _macs_by_cell(variants, cell_of, f"up {branch.index}")
    cells = {key: _cell(nodes, macs.get(key, RateMacs())) for key, nodes in members.items()}
    levels = []
    for (_, resolution), group in groupby(skips, key=lambda s: (s.block, _resolution(s.cat))):
        levels.append(Level(resolution, tuple(_rung(skip, cells) for skip in group)))
    return Anatomy(
        levels=tuple(levels),
        middle=cells["middle"],
        middle_resolution=min(
            (_resolution(node) for node in members["middle"] if _is_feature_map(node)),
            key=math.prod,
            default=levels[-1].resolution,
        ),
        shared=cells["shared"],
        branch=branch.index,
        cost=cut.cost,
        plain=cut.plain,
    )


def _members(graph: fx.Graph, skips: Sequence[SkipConnection], sample: fx.Node) -> dict[str, list[fx.Node]]:
    """Every node of the graph by the cell it is in, cells and nodes in the order of computation."""
    ends: dict[str, fx.Node] = {f"down {skip.index}": _set_aside(skip) for skip in skips}
    ends["middle"] = skips[-1].deep
    for skip in reversed(skips[1:]):
        ends[f"up {skip.index}"] = skips[skip.index - 1].deep
    ends["up 0"] = graph.output_node()
    order = {node: number for number, node in enumerate(graph.nodes)}
    cells: dict[str, list[fx.Node]] = {}
    claimed: set[fx.Node] = set()
    for key, end in ends.items():
        new = ancestors([end], given=claimed)
        cells[key] = sorted(new, key=order.__getitem__)
        claimed |= new
    shared = _shared(graph, cells, sample)
    parted = {key: [node for node in nodes if node not in shared] for key, nodes in cells.items()}
    return {"shared": sorted(shared & claimed, key=order.__getitem__), **parted}


def _shared(graph: fx.Graph, cells: Mapping[str, Sequence[fx.Node]], sample: fx.Node) -> set[fx.Node]:
    """What the sample has no part in, and more than one cell reads."""
    cell_of = {node: key for key, nodes in cells.items() for node in nodes}
    fed: set[fx.Node] = {sample}
    for node in graph.nodes:
        if not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    readers: dict[fx.Node, set[str]] = {}
    for node in reversed(list(graph.nodes)):
        if node in fed:
            readers[node] = {cell_of[node]} if node in cell_of else set()
        else:
            readers[node] = set().union(*(readers[user] for user in node.users))
    return {node for node, keys in readers.items() if node not in fed and len(keys) > 1}


def _macs_by_cell(variants: Variants, cell_of: Mapping[str, str], parted: str) -> dict[str, RateMacs]:
    """Of everything the full variant computes. Graphs that are made from one another keep the names of nodes."""
    found: dict[str, RateMacs] = {}

    def count(nodes: Iterable[fx.Node], at_step: Collection[str], is_prompt: bool) -> None:
        for node in nodes:
            macs = node_macs(node).total
            if macs:
                rate = "prompt" if is_prompt else "step" if node.name in at_step else "refresh"
                key = cell_of.get(node.name, parted)
                found[key] = found.get(key, RateMacs()) + RateMacs(**{rate: macs})

    if variants.full.prompt is not None:
        count(variants.full.prompt.graph.nodes, (), True)
    count(variants.full.step.graph.nodes, {node.name for node in variants.cuts[0].shallow.step.graph.nodes}, False)
    return found


def _cell(nodes: Sequence[fx.Node], macs: RateMacs) -> Cell:
    working = [node for node in nodes if node_macs(node).total]
    named = [node for node in working if module_path(node)] or [
        node for node in nodes if node.op == "call_function" and module_path(node)
    ]
    modules = dict.fromkeys(two_parts(module_path(node)) for node in named)
    operators = [str(node.target).split(".")[1] for node in working if str(node.target).count(".")]
    return Cell(macs, tuple(modules), tuple(operators))


def _set_aside(skip: SkipConnection) -> fx.Node:
    first, second = skip.cat.all_input_nodes
    return second if first is skip.deep else first


def _rung(skip: SkipConnection, cells: Mapping[str, Cell]) -> Rung:
    value, deep = tensor(_set_aside(skip)), tensor(skip.deep)
    assert value is not None
    assert deep is not None
    return Rung(
        index=skip.index,
        down=cells[f"down {skip.index}"],
        up=cells[f"up {skip.index}"],
        skip_shape=tuple(value.shape),
        skip_bytes=value.numel() * value.element_size(),
        deep_bytes=deep.numel() * deep.element_size(),
    )


def _is_feature_map(node: fx.Node) -> bool:
    return bool(node_macs(node).total) and "conv" in str(node.target)


def _resolution(node: fx.Node) -> tuple[int, ...]:
    value = tensor(node)
    assert value is not None
    return tuple(value.shape[2:])
