"""Compute linear layers that read the same input as one product.

    q = linear(x, Wq)                 W = as_strided(Wq, [3 * C, K], [K, 1])     (or cat([Wq, Wk, Wv]))
    k = linear(x, Wk)           ->    y = linear(x, W)
    v = linear(x, Wv)                 q, k, v = y[..., :C], y[..., C : 2 * C], y[..., 2 * C :]

Self-attention's Q, K and V, cross-attention's K and V, and the time projections of all residual blocks are such layers.
The last have a SiLU each of the same embedding: `MergeEqual` must come first. Several variants of a graph that need
different layers must be fused each by itself, after dead code is gone: a product is computed whole.

No second copy of the weights lives on, and changes of them in place are seen:

- Where `lay_out` put weights one after another in one storage, the graph reads them as one matrix. Nothing is copied.
  The caller must see to it that they still lie so when the graph runs (`WeightLayout.intact`): if not, it fails, or
  where only some have moved, reads old weights. So weights that happen to lie together are not taken for laid out.
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
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.match import is_op, tensor
from passes.operators import argument, count
from passes.rewrite import Declined, add_call, is_returned, origin, propagate, views_of
from passes.weight_layout import WeightLayout, are_adjacent, place_of

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_NEEDS_ITS_STRIDES = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype)


class FuseLinears(PassBase):
    """See the module's first lines.

    Args:
        layout: Weights and biases that were laid out, if any.

    Attributes:
        declined: The siblings that the last call left apart, and why.
    """

    keeps_metadata = True

    def __init__(self, layout: WeightLayout | None = None) -> None:
        super().__init__()
        self.layout = layout or WeightLayout(())
        self.declined: tuple[Declined, ...] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        declined = []
        parts: list[fx.Node] = []
        for siblings in _siblings(graph_module):
            free = [node for node in siblings if not _is_bound(node)]
            if len(free) < len(siblings):
                bound = tuple(node.name for node in siblings if node not in free)
                declined.append(Declined(bound, "an output or an operator after it depends on the strides"))
            runs, rest = self._runs(graph_module, free)
            if len(rest) > 1:
                if _pays(rest):
                    runs.append(rest)
                else:
                    reason = (
                        "the weights are not laid out together, and there are too few rows to join them at every call"
                    )
                    declined.append(Declined(tuple(node.name for node in rest), reason))
            for run in runs:
                parts += self._fuse(graph_module, run)
        propagate(graph_module.graph, parts)
        self.declined = tuple(declined)
        return PassResult(graph_module, bool(parts))

    def _runs(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> tuple[list[list[fx.Node]], list[fx.Node]]:
        """The nodes whose weights were laid out one after another, in that order, and the other nodes."""
        weights = {node: _read(module, argument(node, "weight")) for node in nodes}
        laid_out = [node for node in nodes if self.layout.has(weights[node])]
        runs: list[list[fx.Node]] = []
        for node in sorted(laid_out, key=lambda node: place_of(weights[node])):
            if runs and are_adjacent([weights[runs[-1][-1]], weights[node]]):
                runs[-1].append(node)
            else:
                runs.append([node])
        fusible = [run for run in runs if len(run) > 1]
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
        """The parameters end to end: read in place where they lie so, else put together."""
        tensors = [_read(module, node) for node in nodes]
        # The originals may come later in the graph than the first layer.
        again = []
        with module.graph.inserting_before(before):
            for node in nodes:
                again.append(module.graph.get_attr(str(node.target)))
                again[-1].meta = {**origin(node), "val": node.meta["val"]}
        if not (all(map(self.layout.has, tensors)) and are_adjacent(tensors)):
            return add_call(aten.cat.default, (again, 0), before=before, like=before)
        for node in again[1:]:
            module.graph.erase_node(node)
        size = [sum(len(one) for one in tensors), *tensors[0].shape[1:]]
        # Without an offset: from where the first one begins.
        return add_call(
            aten.as_strided.default, (again[0], size, list(tensors[0].stride())), before=before, like=before
        )


def sibling_parameters(module: fx.GraphModule) -> list[list[torch.nn.Parameter]]:
    """The weights of siblings, and their biases: groups as `lay_out` takes them, every parameter once.

    Example:
        >>> layout = lay_out(sibling_parameters(graph_module))
        >>> run_passes(graph_module, [FuseLinears(layout)])
    """
    groups: list[list[torch.nn.Parameter]] = []
    seen: set[int] = set()
    for siblings in _siblings(module):
        for name in ("weight", "bias"):
            nodes = [argument(node, name) for node in siblings]
            values = [_read(module, node) for node in nodes if node is not None]
            group = [one for one in values if isinstance(one, torch.nn.Parameter) and id(one) not in seen]
            seen |= {id(one) for one in group}
            if len(group) > 1:
                groups.append(group)
    return groups


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
    value = operator.attrgetter(str(node.target))(module)
    assert isinstance(value, torch.Tensor)
    return value


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


def _erase_unused(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
