"""Compute linear layers that read the same input as one product.

    graph(x)                          graph(x, W)         W = Joined((Wq, Wk, Wv)).tensor()
        q = linear(x, Wq)                 y = linear(x, W)
        k = linear(x, Wk)       ->        q = y[..., :C]
        v = linear(x, Wv)                 k, v = y[..., C : 2 * C], y[..., 2 * C :]

Self-attention's Q, K and V, cross-attention's K and V, and the time projections of all residual blocks are such layers.
The last have a SiLU each of the same embedding: `MergeEqual` must come first. Several variants of a graph that need
different layers must be fused each by itself, after dead code is gone: a product is computed whole.

No second copy of the weights lives on, and changes of them are seen:

- Weights that a `WeightLayout` has put one after another are read as one matrix, without a copy. The graph takes it as
  a further input, after all others: `joined` says of which weights, in order, and `bind` gives it at every call. (As an
  input: a graph that read on past the end of a parameter would do what no compiler expects. Inductor's autotuning, for
  one, would have it read a stand-in of the parameter's own size.)
- Else the graph joins them at every call, where that pays: it reads and writes every weight once more, and reads the
  input of K numbers a row once instead of n times. So the input must have more rows than 2 * (all outputs) / (n - 1):
  true of the tokens of a large image, false of a prompt or a time embedding.
- Else the layers stay as they are, and `declined` says so.

Weights that are computed (LoRA that is not fused, quantisation) make no siblings. Equal up to the order of summation in
the matrix product. The parts are views with gaps: a `view` of one becomes a `reshape`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.shared.match import is_op, tensor, value
from passes.shared.operators import argument, count
from passes.shared.rewrite import Declined, add_call, is_returned, origin, propagate, views_of
from passes.weight_layout import Joined, WeightLayout

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_NEEDS_ITS_STRIDES = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype)


class FuseLinears(PassBase):
    """See the module's first lines.

    Args:
        layout: Weights and biases that were laid out, if any.

    Attributes:
        joined: What the inputs stand for that the last call added to the graph.
        done: The layers that the last call has put together, and how.
        declined: The siblings that the last call left apart, and why.
    """

    keeps_metadata = True

    def __init__(self, layout: WeightLayout | None = None) -> None:
        super().__init__()
        self.layout = layout if layout is not None else WeightLayout()
        self.joined: tuple[Joined, ...] = ()
        self.done: tuple[str, ...] = ()
        self.declined: tuple[Declined, ...] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        declined = []
        done = []
        self.joined = ()
        parts: list[fx.Node] = []
        for siblings in _siblings(graph_module):
            free = [node for node in siblings if not _is_bound(node)]
            if len(free) < len(siblings):
                bound = tuple(node.name for node in siblings if node not in free)
                declined.append(Declined(bound, "an output or an operator after it depends on the strides"))
            runs, rest = self._runs(graph_module, free)
            done += [f"{_names(run)}: read as one" for run in runs]
            if len(rest) > 1:
                if _pays(rest):
                    runs.append(rest)
                    done.append(f"{_names(rest)}: weights joined at every call")
                else:
                    reason = (
                        "the weights are not laid out together, and there are too few rows to join them at every call"
                    )
                    declined.append(Declined(tuple(node.name for node in rest), reason))
            for run in runs:
                parts += self._fuse(graph_module, run)
        propagate(graph_module.graph, parts)
        self.declined, self.done = tuple(declined), tuple(done)
        return PassResult(graph_module, bool(parts))

    def _runs(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> tuple[list[list[fx.Node]], list[fx.Node]]:
        """The nodes whose weights were laid out one after another, in that order, and the other nodes."""
        by_weight = {id(_read(module, argument(node, "weight"))): node for node in nodes}
        runs = self.layout.runs(_read(module, argument(node, "weight")) for node in nodes)
        fusible = [[by_weight[id(weight)] for weight in run] for run in runs]
        inside = {node for run in fusible for node in run}
        return fusible, [node for node in nodes if node not in inside]

    def _fuse(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Replace linear layers by one; returns what stands in their place."""
        position = {node: index for index, node in enumerate(module.graph.nodes)}
        first = min(nodes, key=position.__getitem__)
        weight = self._join(module, [argument(node, "weight") for node in nodes], before=first)
        biases = [argument(node, "bias") for node in nodes if argument(node, "bias") is not None]
        bias = self._join(module, biases, before=first) if biases else None
        product = add_call(aten.linear.default, (argument(first, "input"), weight, bias), before=first, like=first)
        parts = []
        start = 0
        for node in nodes:
            output = tensor(node)
            assert output is not None
            end = start + output.shape[-1]
            parts.append(add_call(aten.slice.Tensor, (product, output.ndim - 1, start, end), before=first, like=node))
            start = end
        for node, part in zip(nodes, parts, strict=True):
            _let_views_copy(node)
            node.replace_all_uses_with(part)
            module.graph.erase_node(node)
        _erase_unused(module.graph)
        return parts

    def _join(self, module: fx.GraphModule, nodes: Sequence[fx.Node], *, before: fx.Node) -> fx.Node:
        """The parameters end to end: an input where they lie so, else put together."""
        tensors = [_read(module, node) for node in nodes]
        if [list(map(id, run)) for run in self.layout.runs(tensors)] == [list(map(id, tensors))]:
            self.joined += (Joined(tensors),)
            return _add_input(module.graph, nodes)
        # The originals may come later in the graph than the first layer.
        again = []
        with module.graph.inserting_before(before):
            for node in nodes:
                again.append(module.graph.get_attr(str(node.target)))
                again[-1].meta = {**origin(node), "val": node.meta["val"]}
        return add_call(aten.cat.default, (again, 0), before=before, like=before)


def bind(program: Callable[..., Any], joined: Sequence[Joined]) -> Callable[..., Any]:
    """The program of a fused graph as one of the other inputs: it reads the weights as they are at each call."""
    if not joined:
        return program

    def bound(*inputs: torch.Tensor) -> Any:
        return program(*inputs, *[one.tensor() for one in joined])

    return bound


def sibling_parameters(module: fx.GraphModule) -> list[list[torch.Tensor]]:
    """The weights of siblings that can be fused, and their biases: groups as `WeightLayout.lay_out` takes them.

    Example:
        >>> layout = WeightLayout()
        >>> layout.lay_out(sibling_parameters(graph_module), within=unet)
        >>> fuse = FuseLinears(layout)
        >>> run_passes(graph_module, [fuse])
        >>> program = bind(graph_module, fuse.joined)
    """
    groups = []
    for siblings in _siblings(module):
        free = [node for node in siblings if not _is_bound(node)]
        for name in ("weight", "bias"):
            nodes = [argument(node, name) for node in free]
            groups.append([_read(module, node) for node in nodes if node is not None])
    return [group for group in groups if len(group) > 1]


def _siblings(module: fx.GraphModule) -> list[list[fx.Node]]:
    """Linear layers with weights of their own, two or more over the same input, in the graph's order."""
    found: dict[object, list[fx.Node]] = defaultdict(list)
    seen: set[tuple[fx.Node, object]] = set()
    for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        source, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        if any(parameter is not None and parameter.op != "get_attr" for parameter in (weight, bias)):
            continue
        if (source, weight.target) in seen:  # the same layer twice: MergeEqual makes it one
            continue
        seen.add((source, weight.target))
        values = _read(module, weight)
        if values.ndim == 2 and not is_traceable_wrapper_subclass(values):  # a quantised weight, say
            found[source, bias is None, values.dtype].append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _read(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    found = operator.attrgetter(str(node.target))(module)
    assert isinstance(found, torch.Tensor)
    return found


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)


def _is_bound(node: fx.Node) -> bool:
    """True where the layer's output cannot become a part of a larger tensor."""
    return is_returned(node) or any(is_op(user, *_NEEDS_ITS_STRIDES) for view in views_of(node) for user in view.users)


def _pays(nodes: Sequence[fx.Node]) -> bool:
    """True where joining the weights moves fewer numbers than reading the input once saves."""
    weights = [tensor(argument(node, "weight")) for node in nodes]
    source = tensor(nodes[0].args[0])
    assert source is not None
    rows = count(source) // source.shape[-1]
    return (len(nodes) - 1) * rows > 2 * sum(weight.shape[0] for weight in weights if weight is not None)


def _let_views_copy(node: fx.Node) -> None:
    """Spell every `view` of the node so that it works on a tensor with gaps as well."""
    for view in views_of(node):
        for user in view.users:
            if is_op(user, *_VIEWS):
                user.target = aten.reshape.default


def _add_input(graph: fx.Graph, parts: Sequence[fx.Node]) -> fx.Node:
    """An input after all others, for these values end to end."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last), torch.no_grad():
        node = graph.placeholder(f"joined_{parts[0].name}")
        node.meta = {**origin(parts[0]), "val": torch.cat([value(part) for part in parts])}
    return node


def _erase_unused(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
