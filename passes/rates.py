"""Sort a graph's values by how often they change, and take the ones that change rarely into a graph of their own.

Some inputs of a graph change less often than the others. What depends on those alone (*slow* values) need not be
computed at every call: a first graph computes it when the slow inputs change, a second takes what it needs of it as
further inputs.

    graph(x, text)                    first(text)               second(x, text, kept_k)
        k = linear(text, W)               k = linear(text, W)
        h = view(k, ...)         ->       return (k,)               h = view(kept_k, ...)
        return attention(x, h)                                      return attention(x, h)

`partition` says which values to keep in between. All slow *work* moves: products, convolutions, norms, reductions,
whatever is more than moving numbers about. Views, casts and pointwise operators may stay behind, where their inputs
are cheaper to hold than their outputs. Which ones is a minimum cut: of all ways to part the graph, the one that holds
the fewest bytes, then the one that keeps the fewest views, then the one that moves most.

What depends on no input at all (weights, constants and what is computed from them) belongs to either graph: each
computes what it needs. Moving it would keep a copy of the weights, deaf to changes of the originals.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from passes.runner import refresh_metadata
from passes.shared.match import eliminate_dead_code, is_impure, is_op, is_view, tensor
from passes.shared.minimum_cut import Network
from passes.shared.operators import count, is_pointwise, is_random
from passes.shared.rewrite import add_call, copied_graph, origin, views_of
from passes.shared.sizes import is_size, layout, read_from_inputs, symbols

aten = torch.ops.aten

# Operators that move numbers about, besides views and pointwise operators.
_MOVES = (
    *(aten.cat.default, aten.stack.default, aten.repeat.default, aten.constant_pad_nd.default),
    *(aten.slice_scatter.default, aten.select_scatter.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
)


@dataclass(frozen=True)
class Partition:
    """Which values change rarely, and which of them to hold. Nodes are in the graph's order."""

    slow: tuple[fx.Node, ...]
    """Everything that depends on moving values, parameters and constants alone; the moving values not included."""
    moved: tuple[fx.Node, ...]
    """The part of it to compute when a moving value changes."""
    kept: tuple[fx.Node, ...]
    """The values to hold, of `moved` and of the moving values themselves: what the rest of the graph reads of them."""
    kept_bytes: int
    """Of the values in `kept`, without those that are held in any case."""


def partition(graph: fx.Graph, moving: Collection[fx.Node], *, held: bool = False) -> Partition:
    """Find what depends on the `moving` values alone, and the values of it that are cheapest to hold.

    Args:
        graph: With `meta["val"]` on every node; it is not changed.
        moving: The values that change rarely: placeholders, or any other nodes (then what they depend on is ignored).
        held: The caller has the moving values at hand at every call anyway: using them costs nothing.

    Example:
        >>> text, sizes = graph.find_nodes(op="placeholder")[2:]
        >>> result = partition(graph, {text, sizes}, held=True)
        >>> prompt_stage = extract(graph_module, result.kept)
    """
    slow = _slow_nodes(graph, moving)
    cut = _Cut(slow, moving, held)
    moved = cut.moved()
    kept = [node for node in graph.nodes if node in moved and any(user not in moved for user in node.users)]
    return Partition(
        slow=tuple(node for node in slow if node not in moving),
        moved=tuple(node for node in slow if node in moved and node not in moving),
        kept=tuple(kept),
        kept_bytes=sum(_bytes(node) for node in kept if not (held and node in moving)),
    )


def _slow_nodes(graph: fx.Graph, moving: Collection[fx.Node]) -> list[fx.Node]:
    """The moving values and what depends on nothing else that is given."""
    slow: dict[fx.Node, None] = {}
    free: set[fx.Node] = set()
    own = {symbol for node in moving if node.op == "placeholder" for symbol in symbols(node.meta["val"])}
    for node in graph.nodes:
        if node in moving:
            slow[node] = None
        elif node.op == "get_attr":
            free.add(node)
        elif is_size(node):  # of the inputs' shapes: any graph can compute it that is given those
            if symbols(node.meta["val"]) <= own or not all(node.op == "placeholder" for node in moving):
                free.add(node)
        elif node.op == "call_function" and not is_impure(node) and not is_random(node):
            sources = node.all_input_nodes
            if all(source in free for source in sources):
                free.add(node)
            elif all(source in free or source in slow for source in sources) and not _is_size(node):
                slow[node] = None
    return list(slow)


def _is_size(node: fx.Node) -> bool:
    """True for a number taken from a tensor's shape: read where it is used, for it cannot be held in a buffer."""
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _is_work(node: fx.Node) -> bool:
    return not (node.target is operator.getitem or is_view(node) or is_pointwise(node) or is_op(node, *_MOVES))


def _is_part_of_another(node: fx.Node) -> bool:
    """True where holding the node's value may hold all of another; a cast is a value of its own."""
    if node.target is operator.getitem:
        return True
    before, after = tensor(node.args[0]) if node.args else None, tensor(node)
    is_cast = before is not None and after is not None and before.dtype != after.dtype
    return is_view(node) and not is_cast


def _bytes(node: fx.Node) -> int:
    value = tensor(node)
    assert value is not None
    return count(value) * value.element_size()


class _Cut:
    """The cheapest way to part slow values from the rest, as a minimum cut between a source and a sink.

    A value on the source's side is moved; so are all that it is computed from (an edge that cannot be cut). A moved
    value that the other side reads is held, and paid for once, however many readers there are: its one edge with a
    price leads to a second point, which no reader on the sink's side can be cut from.
    """

    def __init__(self, slow: Sequence[fx.Node], moving: Collection[fx.Node], held: bool) -> None:
        self._slow = slow
        members = set(slow)
        prices = {node: self._price(node, held and node in moving) for node in slow}
        self._never = sum(price for price in prices.values() if price is not None) + 1
        self._network = Network()
        for node in slow:
            price = prices[node]
            self._network.add(node, ("read", node), self._never if price is None else price)
            for user in node.users:
                self._network.add(("read", node), user if user in members else "sink", self._never)
            if node in moving:
                self._network.add("source", node, self._never)
                continue
            if _is_work(node):
                self._network.add("source", node, self._never)
            for source in node.all_input_nodes:
                if source in members:
                    self._network.add(node, source, self._never)

    def _price(self, node: fx.Node, is_held: bool) -> int | None:
        """Bytes, with a surcharge on views that no number of them makes up for a byte; None for what cannot be held."""
        if is_held:
            return 0
        if tensor(node) is None:
            return None
        return _bytes(node) * (len(self._slow) + 1) + _is_part_of_another(node)

    def moved(self) -> set[fx.Node]:
        left_behind = self._network.sink_side("source", "sink")
        return {node for node in self._slow if node not in left_behind}


@dataclass(frozen=True)
class Extracted:
    """A graph in two stages. Both share the parameters of the graph they were made from."""

    first: fx.GraphModule
    """Maps the inputs it needs, in their order, to the kept values."""
    second: fx.GraphModule
    """Maps (*inputs, *kept values) to (*outputs, *values also returned). All inputs remain, needed or not."""
    kept: tuple[fx.Node, ...]
    """The nodes of the original graph whose values pass from the first to the second: inputs are not among them."""


def extract(gm: fx.GraphModule, kept: Iterable[fx.Node], also: Iterable[fx.Node] = ()) -> Extracted:
    """Compute the `kept` values in a graph of their own, and take them as further inputs in another.

    `kept` comes from `partition`; an input among them stays an input. A kept view is cloned, for it would hold all of
    what it is a view of; so is an output that is a kept value or a view of one, for a caller may write into outputs.
    The second graph returns the values in `also` too, as `also_return` does.
    """
    kept = tuple(node for node in kept if node.op != "placeholder")
    first, nodes = copied_graph(gm.graph)
    output = first.output_node()
    values = _held([nodes[node] for node in kept], output)
    output.args = (tuple(values),)
    output.meta = {}
    eliminate_dead_code(first)
    read_from_inputs(first, [node for node in first.find_nodes(op="placeholder") if not all(map(is_size, node.users))])
    eliminate_dead_code(first)
    for placeholder in first.find_nodes(op="placeholder"):
        if not placeholder.users:
            first.erase_node(placeholder)

    second, nodes = copied_graph(gm.graph)
    strides_changed = False
    placeholder = second.find_nodes(op="placeholder")[-1]
    for node, value in zip(kept, values, strict=True):
        with second.inserting_after(placeholder):
            placeholder = second.placeholder(f"kept_{node.name}")
        placeholder.meta = {**origin(node), "val": value.meta["val"]}
        strides_changed |= layout(value.meta["val"]) != layout(node.meta["val"])
        nodes[node].replace_all_uses_with(placeholder)
        _part_outputs(second, placeholder)
    _append_outputs(second, [nodes[node] for node in also])
    eliminate_dead_code(second)
    result = Extracted(fx.GraphModule(gm, first), fx.GraphModule(gm, second), kept)
    if strides_changed:
        refresh_metadata(result.second)
    return result


def also_return(gm: fx.GraphModule, kept: Iterable[fx.Node]) -> fx.GraphModule:
    """The graph that returns (*outputs, *kept values): it does its own work and that of the first stage at once.

    The kept values come as from `extract`; they share no memory with the outputs.
    """
    graph, nodes = copied_graph(gm.graph)
    _append_outputs(graph, [nodes[node] for node in kept if node.op != "placeholder"])
    eliminate_dead_code(graph)
    return fx.GraphModule(gm, graph)


def _append_outputs(graph: fx.Graph, kept: Sequence[fx.Node]) -> None:
    for node in kept:
        _part_outputs(graph, node)
    output = graph.output_node()
    [leaves] = output.args
    assert isinstance(leaves, (tuple, list))
    output.args = ((*leaves, *_held(kept, output)),)


def _held(kept: Iterable[fx.Node], output: fx.Node) -> list[fx.Node]:
    """What to return of values so that each has memory of its own, and no more than it needs."""
    return [
        add_call(aten.clone.default, (node,), before=output, like=node) if _is_part_of_another(node) else node
        for node in kept
    ]


def _part_outputs(graph: fx.Graph, kept: fx.Node) -> None:
    output = graph.output_node()
    shared = set(views_of(kept))
    [leaves] = output.args
    clone = {
        leaf: add_call(aten.clone.default, (leaf,), before=output, like=leaf)
        for leaf in output.all_input_nodes
        if leaf in shared
    }
    output.args = (fx.map_arg(leaves, lambda leaf: clone.get(leaf, leaf)),)
