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

A schedule may cut at several skip connections: each has a cache and a shallow variant of its own. With a forecast, the
variant of a deeper cut refreshes the caches of those above it, of which it computes the deep operands anyway:

    cut 1: shallow.step(x, t, text, c_1, l_1) -> y, c_0           cut 0: shallow.step(x, t, text, c_0, l_0) -> y
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from torch import fx

from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.forecast import combine_refreshes
from deepcache_fx.graph.macs import Macs, Size, total_macs
from deepcache_fx.graph.skips import SkipConnection
from passes import SplitOverCat
from passes.rates import also_return, extract, partition
from passes.shared.match import ancestors, eliminate_dead_code
from passes.shared.operators import count
from passes.shared.rewrite import add_call, copied_graph, propagate, strides_matter
from passes.shared.sizes import hint

aten = torch.ops.aten

CHANNELS_LAST = ("cuda",)
"""Where cached feature maps take the layout of channels-last convolutions."""

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
    takes the prompt values last.
    """

    step: fx.GraphModule
    macs: Macs
    prompt: fx.GraphModule | None = None
    prompt_inputs: tuple[int, ...] = ()
    prompt_macs: Macs = Macs()  # noqa: RUF009 - immutable


@dataclass(frozen=True)
class Cut:
    """A skip connection at which shallow steps begin, and their variant.

    `shallow.step` maps (*inputs, *cache, *prompt values) to (*outputs, *caches of the first `refreshed` cuts). `cache`
    holds fake tensors like the cached values. With a forecast the step takes the last `forecast` + 1 of its caches,
    newest first, and their weights.
    """

    branch: SkipConnection
    shallow: Variant
    cache: tuple[torch.Tensor, ...]
    plain: Cost
    """Of the shallow step, were the deep operand cached as it is and nothing done at prompt rate."""
    refreshed: int = 0
    """How many of the cuts above it the step refreshes."""

    @property
    def cost(self) -> Cost:
        """Of the shallow step."""
        return Cost(self.shallow.macs, sum(map(_bytes, self.cache)))

    def reads(self) -> frozenset[int]:
        """Which inputs, by number, the shallow variant reads; of a ControlNet's residuals those are few."""
        inputs = self.shallow.step.graph.find_nodes(op="placeholder")
        return frozenset(self.shallow.prompt_inputs).union(i for i, node in enumerate(inputs) if node.users)


@dataclass(frozen=True)
class Variants:
    """A full program, and a shallow one for each cut, over one set of weights.

    `full.step` maps (*inputs, *prompt values) to (*outputs, *cache of each cut).
    """

    full: Variant
    cuts: tuple[Cut, ...]
    """From the shallowest; most schedules have one. A program that caches nothing has none."""
    num_outputs: int

    def named(self) -> dict[str, Variant]:
        """All variants by name: "full", "shallow" for the shallowest cut, "shallow_3" for another, at branch 3."""
        named = {
            f"shallow_{cut.branch.index}" if place else "shallow": cut.shallow for place, cut in enumerate(self.cuts)
        }
        return {"full": self.full, **named}

    def with_steps(self, steps: Mapping[str, fx.GraphModule]) -> Variants:
        """The same with other graphs for the steps of the `named` variants."""
        full, *shallow = (
            variant
            if steps[name] is variant.step
            else replace(variant, step=steps[name], macs=total_macs(steps[name].graph.nodes))
            for name, variant in self.named().items()
        )
        cuts = tuple(replace(cut, shallow=variant) for cut, variant in zip(self.cuts, shallow, strict=True))
        return replace(self, full=full, cuts=cuts)

    def at(self, size: Size, whole: fx.Graph) -> Variants:
        """The same graphs, counted for other sizes. `whole` is the graph that was split."""

        def counted(variant: Variant) -> Variant:
            before = total_macs(variant.prompt.graph.nodes, size) if variant.prompt is not None else Macs()
            return replace(variant, macs=total_macs(variant.step.graph.nodes, size), prompt_macs=before)

        cuts = tuple(
            replace(
                cut,
                shallow=counted(cut.shallow),
                cache=tuple(sized(value, size) for value in cut.cache),
                plain=plain_cost(whole, cut.branch.deep, size),
            )
            for cut in self.cuts
        )
        return replace(self, full=counted(self.full), cuts=cuts)


def sized(value: torch.Tensor, size: Size) -> torch.Tensor:
    """A tensor without values, of numbers for its sizes."""
    shape, strides = list(map(size, value.shape)), list(map(size, value.stride()))
    return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")


def plain_cost(graph: fx.Graph, deep: fx.Node, size: Size = hint) -> Cost:
    """What a shallow step costs where the deep operand is cached as it is. Walks the graph, copies nothing."""
    return Cost(total_macs(ancestors([graph.output_node()], given=[deep]), size), _bytes(sized(deep.meta["val"], size)))


def split(
    captured: Captured,
    branches: SkipConnection | Sequence[SkipConnection],
    *,
    rates: Collection[str] = (),
    prompt_inputs: Collection[int] = (),
    forecast: int = 0,
) -> Variants:
    """Split at skip connections of `captured.graph`, which stays as it is.

    Args:
        captured: What was captured.
        branches: One of its skip connections, or several from the shallowest.
        rates: Which of `RATES` to separate.
        prompt_inputs: The inputs, by number, that change with the prompt alone. They may change at any time, and the
            prompt stages must then run anew: what is at stake is only how often.
        forecast: How many refreshes besides the last the shallow step reads (see `forecast`).
    """
    branches = [branches] if isinstance(branches, SkipConnection) else list(branches)
    whole = captured.graph.graph
    graph, nodes = _copy(captured.graph)
    kept = _to_keep(graph, [nodes[branch.cat] for branch in branches], branches, "refresh_rate" in rates)
    full = also_return(graph, chain.from_iterable(kept))
    outputs = len(whole.output_node().args[0])  # type: ignore[arg-type]
    caches = _caches(full, outputs, kept)
    chosen = prompt_inputs if "prompt_rate" in rates else ()
    cuts = []
    for number, branch in enumerate(branches):
        # A deeper step knows newer values for the cuts above it. Forecasts are better for them; where values are
        # repeated, all caches stay those of the last full step, as published.
        refreshed = number if forecast else 0
        shallow = extract(graph, kept[number], chain.from_iterable(kept[:refreshed])).second
        if forecast:
            cached = shallow.graph.find_nodes(op="placeholder")[-len(kept[number]) :]
            shallow = combine_refreshes(shallow, cached, forecast)
        plain = plain_cost(whole, branch.deep)
        cuts.append(Cut(branch, in_stages(shallow, chosen), caches[number], plain, refreshed))
    return Variants(in_stages(full, chosen), tuple(cuts), outputs)


def _to_keep(
    graph: fx.GraphModule, cats: Sequence[fx.Node], branches: Sequence[SkipConnection], at_refresh_rate: bool
) -> list[Sequence[fx.Node]]:
    """For each cut, what to keep: its deep operand, or what the refresh rate has made of it."""
    deep: list[fx.Node] = []
    for cat, branch in reversed(list(zip(cats, branches, strict=True))):
        # The deepest first: parting the operands of one may put another node in the place of a deep operand above it.
        operands = cat.args[0]
        assert isinstance(operands, Sequence)
        node = operands[branch.operand]
        assert isinstance(node, fx.Node)
        deep.insert(0, node)
        if at_refresh_rate:
            SplitOverCat(cat.name, alone=branch.operand)(graph)
    kept: list[Sequence[fx.Node]] = [
        partition(graph.graph, {node}).kept if at_refresh_rate else [node] for node in deep
    ]
    return _channels_last(graph, kept) if _has_channels_last_weights(graph) else kept


def _has_channels_last_weights(graph: fx.GraphModule) -> bool:
    """True where convolutions were laid out for a device that wants them so (see `execution.memory_format`)."""
    return any(_is_channels_last(weight) for weight in graph.parameters() if weight.device.type in CHANNELS_LAST)


def _is_channels_last(value: torch.Tensor) -> bool:
    dense = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return dense and not value.is_contiguous()


def _channels_last(graph: fx.GraphModule, kept: Sequence[Sequence[fx.Node]]) -> list[Sequence[fx.Node]]:
    """Keep contiguous feature maps in the layout of those around them, else every shallow step transposes some.

    What a `view` would read in another layout stays as it is.
    """
    instead: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(chain.from_iterable(kept)):
        val = node.meta["val"]
        contiguous = val.ndim == 4 and val.is_contiguous() and not val.is_contiguous(memory_format=torch.channels_last)
        if node.op != "call_function" or not contiguous:
            continue
        options = {"memory_format": torch.channels_last}
        clone = add_call(aten.clone.default, (node,), options, before=node.next, like=node)
        if strides_matter(node, clone.meta["val"]):
            graph.graph.erase_node(clone)
            continue
        instead[node] = clone
        for user in [user for user in node.users if user is not clone]:
            user.replace_input_with(node, clone)
        propagate(graph.graph, [clone])
    return [[instead.get(node, node) for node in nodes] for nodes in kept]


def _caches(full: fx.GraphModule, outputs: int, kept: Sequence[Sequence[fx.Node]]) -> list[tuple[torch.Tensor, ...]]:
    """Of each cut, the values that the full step returns for it."""
    [leaves] = full.graph.output_node().args
    assert isinstance(leaves, (tuple, list))
    values = iter(leaves[outputs:])
    return [tuple(value.meta["val"] for value in islice(values, len(one))) for one in kept]


def refresh_costs(captured: Captured, branches: Sequence[SkipConnection]) -> list[Cost]:
    """What a shallow step costs at each skip connection, from the shallowest, with its refresh rate separated."""
    graph, nodes = _copy(captured.graph)
    costs = []
    for branch in branches:  # shallowest first: parting the operands of one may replace the deep operand before it
        [kept] = _to_keep(graph, [nodes[branch.cat]], [branch], True)
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
    return count(value) * value.element_size()


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same weights."""
    return _copy(module)[0]


def _copy(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph, nodes = copied_graph(module.graph)
    return fx.GraphModule(module, graph), nodes
