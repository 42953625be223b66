"""A graph in core ATen: composite operators taken apart, each on its own, and equal ones only once.

    x = conv2d(x, w, b, [1, 1], [1, 1])    ->    x = convolution(x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)

`ExportedProgram.run_decompositions` does the same by tracing the whole graph, twice, which takes several times as long.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

Decompositions = Mapping[Any, Callable[..., Any]]


def decompositions(keep: Collection[Any]) -> Decompositions:
    """What torch.export makes core ATen with, less those of operators that are to stay whole."""
    table = torch.export.default_decompositions()
    return {target: table[target] for target in table if target not in keep}


def in_core_operators(module: fx.GraphModule, table: Decompositions, keep: Collection[Any]) -> fx.GraphModule:
    """The same graph over the same weights, without composite operators but for those of `keep`.

    An operator that is taken apart into what needs constants of its own stays as it is.
    """
    mode = detect_fake_mode([node.meta.get("val") for node in module.graph.nodes])
    graph = fx.Graph()
    placed: dict[fx.Node, Any] = {}
    known: dict[Hashable, fx.Graph | None] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], placed.__getitem__))
            continue
        if node.target is operator.getitem and isinstance(placed[node.args[0]], (list, tuple)):
            placed[node] = placed[node.args[0]][node.args[1]]
            continue
        parts = None
        if _is_composite(node.target, table) and node.target not in keep:
            key = _key(node)
            if key not in known:
                known[key] = _parts(node, table, mode)
            parts = known[key]
        if parts is None:
            placed[node] = graph.node_copy(node, placed.__getitem__)
        else:
            inputs = zip(parts.find_nodes(op="placeholder"), node.all_input_nodes, strict=True)
            placed[node] = graph.graph_copy(parts, {inner: placed[outer] for inner, outer in inputs})
    return fx.GraphModule(module, graph)


def _is_composite(target: object, table: Decompositions) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in table or target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _key(node: fx.Node) -> Hashable:
    """Equal for calls that are taken apart alike."""
    places = {source: place for place, source in enumerate(node.all_input_nodes)}

    def described(source: fx.Node) -> Any:
        value = source.meta["val"]
        return ("input", places[source], tuple(value.shape), value.stride(), value.dtype)

    args, kwargs = fx.map_arg((node.args, node.kwargs), described)
    return node.target, repr(args), repr(kwargs)


def _parts(node: fx.Node, table: Decompositions, mode: Any) -> fx.Graph | None:
    """What a call consists of; its placeholders are the call's inputs."""
    inputs = node.all_input_nodes

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with mode, torch.no_grad():
        traced = make_fx(call, decomposition_table=table)(*(source.meta["val"] for source in inputs))
    return None if traced.graph.find_nodes(op="get_attr") else traced.graph
