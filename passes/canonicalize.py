"""Drop what a captured graph carries but does not need: identities and metadata assertions.

    x = div(y, 1.0)                        x -> y
    x = clone(y)                           x -> y, where it keeps y's strides
    x = dropout(y, p, False)               x -> y; as well where p is 0
    x = to(y, dtype), contiguous(y)        x -> y, where y is so already
    x = to(to(y, wider), dtype)            x -> to(y, dtype), where nothing is lost on the way
    x = view(y, shape), expand(y, shape)   x -> y, where it has that shape and those strides already
    _assert_tensor_metadata(y, ...)        (removed: the caller guards shapes, types and devices)

Exact, in a functional graph: nobody writes into y. Clones of inputs and clones that are returned stay, for no output
may come to share memory with an input or another output; the others share memory already. Inductor drops all of these
too, but only when it compiles; an eager graph runs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.shared.match import eliminate_dead_code, is_op, is_view, tensor, value
from passes.shared.sizes import layout

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default)
_SHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)


def _is_same(node: fx.Node, read: Callable[[torch.Tensor], object]) -> bool:
    """True where this reads the same of the node as of its first argument."""
    before, after = tensor(node.args[0]), tensor(node)
    return before is not None and after is not None and read(before) == read(after)


def _is_division_by_one(node: fx.Node) -> bool:
    if not is_op(node, aten.div.Tensor) or node.kwargs or isinstance(node.args[1], fx.Node) or node.args[1] != 1:
        return False
    # Integer division makes floats; division of a tensor with gaps or repeats makes a dense one.
    return _is_same(node, lambda t: (t.dtype, layout(t)[1])) and _may_share(node)


def _is_plain_clone(node: fx.Node) -> bool:
    return is_op(node, aten.clone.default) and _is_same(node, lambda t: layout(t)[1]) and _may_share(node)


def _may_share(node: fx.Node) -> bool:
    """True where the node may become its argument: neither is an output, and the argument is no input."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return not any(user.op == "output" for user in node.users) and not _may_alias_input(source)


def _is_alias(node: fx.Node) -> bool:
    """An operator that returns its argument as it is."""
    if is_op(node, aten.dropout.default):
        return node.args[2] is False or bool(node.args[1] == 0)
    if is_op(node, *_SHAPES):
        return _is_same(node, layout)
    if not is_op(node, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.contiguous.default):
        return False
    copies = bool(node.kwargs.get("copy")) or True in node.args[2:]
    return _is_same(node, lambda t: (t.dtype, t.device, layout(t)[1])) and not copies


def _source_of_casts(node: fx.Node) -> fx.Node | None:
    """What a cast of a cast is computed from, where the cast in between only widens: it changes no value."""
    between = node.args[0] if is_op(node, *_CASTS) else None
    if not isinstance(between, fx.Node) or not is_op(between, *_CASTS):
        return None
    source = between.args[0]
    first, middle, last = tensor(source), tensor(between), tensor(node)
    if first is None or middle is None or last is None or len({v.device for v in (first, middle, last)}) > 1:
        return None
    floats = all(v.is_floating_point() for v in (first, middle, last))
    widens = first.dtype != middle.dtype == torch.promote_types(first.dtype, middle.dtype)
    if not (floats and widens and layout(first)[1] == layout(last)[1]):
        return None
    assert isinstance(source, fx.Node)
    returned = any(user.op == "output" for user in node.users)
    becomes_source = first.dtype == last.dtype
    return None if becomes_source and (returned or _may_alias_input(source)) else source


def _may_alias_input(node: fx.Node) -> bool:
    """True where a value is an input or parameter, or may be a view of one."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node.op != "call_function"


class Canonicalize(PassBase):
    """See the module's first lines."""

    keeps_metadata = True  # only removes nodes

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            if is_op(node, aten._assert_tensor_metadata.default):
                graph.erase_node(node)
                modified = True
            elif (source := _source_of_casts(node)) is not None:
                if value(source).dtype == value(node).dtype:
                    node.replace_all_uses_with(source)
                    graph.erase_node(node)
                else:
                    node.args = (source, *node.args[1:])
                modified = True
            elif _is_division_by_one(node) or _is_plain_clone(node) or _is_alias(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                modified = True
        modified = eliminate_dead_code(graph) or modified
        return PassResult(graph_module, modified)
