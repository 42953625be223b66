"""Split a captured UNet at a skip connection into a full and a shallow variant, each in stages by how often they run.

    graph(x, t, text) -> y        full.prompt(text)               -> k       once per prompt
                           ->     full.step(x, t, text, k)        -> y, c    every N-th step: fills the cache
                                  shallow.prompt(text)            -> l       once per prompt
                                  shallow.step(x, t, text, c, l)  -> y       every other step

DeepCache declares one thing: the deep operand of the skip connection changes slowly. What follows is dataflow. The
shallow variant reads the cache, and dead-code elimination makes it shallow. At *refresh rate*, what depends on the deep
operand alone moves into the full variant, and the cache holds whatever of it is cheapest to hold; the layers that the
concatenation leads to are first split into a part of each operand. At *prompt rate*, what depends on the prompt alone
leaves both variants for a stage before them. Each variant has its own, so that a step waits for no more than it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from deepcache_fx.capture import Captured
from deepcache_fx.forecast import combine_refreshes
from deepcache_fx.macs import Macs, total_macs
from deepcache_fx.skips import SkipConnection
from passes import SplitOverCat
from passes.match import ancestors, eliminate_dead_code
from passes.rates import also_return, extract, partition

RATES = ("refresh_rate", "prompt_rate")
"""What can be separated beside the deep operand itself; `optimize(..., disable=)` takes these names, too."""


@dataclass(frozen=True)
class Cost:
    """What a step computes, and how many bytes are kept for it."""

    macs: Macs
    cache_bytes: int


@dataclass(frozen=True)
class Variant:
    """One kind of step.

    `prompt` maps the inputs that `prompt_inputs` counts to the prompt values, and is None where there are none. `step`
    takes the prompt values last; behind them, once `fuse_linears` has run, weights that were laid out together.
    """

    step: fx.GraphModule
    macs: Macs
    prompt: fx.GraphModule | None = None
    prompt_inputs: tuple[int, ...] = ()
    prompt_macs: Macs = Macs()  # noqa: RUF009 - immutable


@dataclass(frozen=True)
class Variants:
    """Two programs over one set of weights.

    `full.step` maps (*inputs, *prompt values) to (*outputs, *cache); `shallow.step` maps (*inputs, *cache, *prompt
    values) to the outputs. `cache` holds fake tensors like the cached values. With a forecast, the shallow step takes
    the caches of the last `forecast` + 1 full steps, newest first, and their weights.
    """

    branch: SkipConnection
    full: Variant
    shallow: Variant
    num_outputs: int
    cache: tuple[torch.Tensor, ...]
    plain: Cost
    """Of the shallow step, were the deep operand cached as it is and nothing done at prompt rate."""

    @property
    def cost(self) -> Cost:
        """Of the shallow step."""
        return Cost(self.shallow.macs, sum(map(_bytes, self.cache)))

    def shallow_reads(self) -> frozenset[int]:
        """Which inputs, by number, the shallow variant reads; of a ControlNet's residuals those are few."""
        inputs = self.shallow.step.graph.find_nodes(op="placeholder")
        return frozenset(self.shallow.prompt_inputs).union(i for i, node in enumerate(inputs) if node.users)


def plain_cost(graph: fx.Graph, deep: fx.Node) -> Cost:
    """What a shallow step costs where the deep operand is cached as it is. Walks the graph, copies nothing."""
    return Cost(total_macs(ancestors([graph.output_node()], given=[deep])), _bytes(deep.meta["val"]))


def split(
    captured: Captured,
    branch: SkipConnection,
    *,
    rates: Collection[str] = (),
    prompt_inputs: Collection[int] = (),
    forecast: int = 0,
) -> Variants:
    """Split at a skip connection of `captured.graph`, which stays as it is.

    Args:
        captured: What was captured.
        branch: One of its skip connections.
        rates: Which of `RATES` to separate.
        prompt_inputs: The inputs, by number, that change with the prompt alone. They may change at any time, and the
            prompt stages must then run anew: what is at stake is only how often.
        forecast: How many refreshes besides the last the shallow step reads (see `forecast`).
    """
    whole = captured.graph.graph
    plain = plain_cost(whole, branch.deep)
    graph, nodes = _copy(captured.graph)
    kept: Sequence[fx.Node] = [nodes[branch.deep]]
    if "refresh_rate" in rates:
        kept = _at_refresh_rate(graph, nodes[branch.cat], nodes[branch.deep])
    full = also_return(graph, kept)
    shallow = extract(graph, kept).second
    if forecast:
        cached = shallow.graph.find_nodes(op="placeholder")[-len(kept) :]
        shallow = combine_refreshes(shallow, cached, forecast)
    count = len(whole.output_node().args[0])  # type: ignore[arg-type]
    values = full.graph.output_node().args[0][count:]  # type: ignore[index]
    chosen = prompt_inputs if "prompt_rate" in rates else ()
    return Variants(
        branch=branch,
        full=in_stages(full, chosen),
        shallow=in_stages(shallow, chosen),
        num_outputs=count,
        cache=tuple(value.meta["val"] for value in values),  # type: ignore[union-attr]
        plain=plain,
    )


def refresh_costs(captured: Captured, branches: Sequence[SkipConnection]) -> list[Cost]:
    """What a shallow step costs at each skip connection, from the shallowest, with its refresh rate separated."""
    graph, nodes = _copy(captured.graph)
    costs = []
    for branch in branches:  # shallowest first: parting the operands of one may replace the deep operand before it
        _part_operands(graph, nodes[branch.cat], nodes[branch.deep])
        kept = partition(graph.graph, {nodes[branch.deep]}).kept
        macs = total_macs(ancestors([graph.graph.output_node()], given=kept))
        costs.append(Cost(macs, sum(_bytes(node.meta["val"]) for node in kept)))
    return costs


def keep_outputs(module: fx.GraphModule, chosen: Collection[int]) -> fx.GraphModule:
    """The graph that returns these outputs alone, by number and in order, and does no work for the others."""
    copy, _ = _copy(module)
    output = copy.graph.output_node()
    [leaves] = output.args
    assert isinstance(leaves, (tuple, list))
    output.args = (tuple(leaves[index] for index in sorted(chosen)),)
    eliminate_dead_code(copy.graph)
    copy.recompile()
    return copy


def _at_refresh_rate(graph: fx.GraphModule, cat: fx.Node, deep: fx.Node) -> Sequence[fx.Node]:
    """What to keep so that all that depends on the deep operand alone is computed in full steps."""
    _part_operands(graph, cat, deep)
    return partition(graph.graph, {deep}).kept


def _part_operands(graph: fx.GraphModule, cat: fx.Node, deep: fx.Node) -> None:
    """Let the deep operand go alone through the layers that the concatenation leads to."""
    operands = cat.args[0]
    assert isinstance(operands, Sequence)
    SplitOverCat(cat.name, alone=0 if operands[0] is deep else 1)(graph)


def in_stages(step: fx.GraphModule, prompt_inputs: Collection[int]) -> Variant:
    """Take what depends on these inputs alone, by number, out of a graph, into a stage before it."""
    placeholders = step.graph.find_nodes(op="placeholder")
    moving = {placeholders[index] for index in prompt_inputs}
    kept = [node for node in partition(step.graph, moving, held=True).kept if node not in moving] if moving else []
    if not kept:
        return Variant(step, total_macs(step.graph.nodes))
    two = extract(step, kept)
    names = [node.target for node in placeholders]
    return Variant(
        step=two.second,
        macs=total_macs(two.second.graph.nodes),
        prompt=two.first,
        prompt_inputs=tuple(names.index(node.target) for node in two.first.graph.find_nodes(op="placeholder")),
        prompt_macs=total_macs(two.first.graph.nodes),
    )


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def _copy(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, nodes))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return fx.GraphModule(module, graph), nodes
