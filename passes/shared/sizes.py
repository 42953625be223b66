"""Sizes that are not fixed: symbols of the inputs' shapes, in a graph that was captured for many sizes.

    n = sym_size(conv, 2)           n_0 = sym_size(x, 2)
    view(conv, [2, n, ...])   ->    n = floordiv(n_0, 2)           whatever `conv` is, and whether it is computed
                                    view(conv, [2, n, ...])

A size counts as the one of the example that the graph was captured with wherever something has to be weighed. Symbols
are never compared as numbers: that would fit the graph to the example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

aten = torch.ops.aten

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def hint(size: int | torch.SymInt) -> int:
    """The size in the example that the graph was captured with."""
    return size if isinstance(size, int) else int(size.node.hint)


def expression(size: Any) -> Any:
    """What stands for a size: equal for sizes that are known to be equal, comparing which asks nothing."""
    return size.node.expr if isinstance(size, _SYMBOLS) else size


def layout(value: torch.Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shape and strides, to be compared."""
    return tuple(map(expression, value.shape)), tuple(map(expression, value.stride()))


def is_size(node: fx.Node) -> bool:
    """True for a number made of the inputs' sizes."""
    return isinstance(node.meta.get("val"), _SYMBOLS)


def symbols(value: Any) -> set[sympy.Symbol]:
    """Those in a size, or in the shape of a tensor."""
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return {symbol for size in sizes if isinstance(size, _SYMBOLS) for symbol in size.node.expr.free_symbols}


def places(shapes: Iterable[tuple[Any, Iterable[Any]]]) -> dict[sympy.Symbol, tuple[Any, int]]:
    """Where every symbol stands alone: the first of the named shapes that has it, and the axis."""
    found: dict[sympy.Symbol, tuple[Any, int]] = {}
    for name, shape in shapes:
        for axis, expr in enumerate(map(expression, shape)):
            if isinstance(expr, sympy.Symbol):
                found.setdefault(expr, (name, axis))
    return found


def read_from_inputs(graph: fx.Graph, inputs: Collection[fx.Node] | None = None) -> bool:
    """Compute every size from the shapes of the inputs, or of these alone; False, and nothing done, where one lacks.

    What is computed of a tensor for its size alone is computed no more once dead code is gone.
    """
    sized = [node for node in graph.nodes if node.op == "call_function" and is_size(node)]
    if not sized:
        return True
    placeholders = [node for node in graph.find_nodes(op="placeholder") if inputs is None or node in inputs]
    known = places((node, node.meta["val"].shape) for node in placeholders)
    if not set().union(*(symbols(node.meta["val"]) for node in sized)) <= set(known):
        return False
    first = graph.find_nodes(op="placeholder")[-1].next
    before = set(graph.nodes)
    with graph.inserting_before(first):
        tracer = fx.proxy.GraphAppendingTracer(graph)
        roots: dict[sympy.Symbol, Any] = {}
        made: dict[Any, fx.Node] = {}
        for node in sized:
            expr = expression(node.meta["val"])
            if expr not in made:
                for symbol in sorted(expr.free_symbols - set(roots), key=str):
                    roots[symbol] = fx.Proxy(graph.call_function(aten.sym_size.int, known[symbol]), tracer)
                made[expr] = _node(sympy_interp(PythonReferenceAnalysis, roots, expr))
    for new in graph.nodes:
        if new is first:
            break
        if new not in before:
            args, kwargs = fx.map_arg((new.args, new.kwargs), lambda source: source.meta["val"])
            new.meta["val"] = new.target(*args, **kwargs)
    for node in sized:
        value = made[expression(node.meta["val"])]
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    return True


def _node(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def evaluated(size: Any, values: Mapping[sympy.Symbol, int]) -> int:
    """A size for these values of its symbols.

    Raises:
        KeyError: there is a symbol that has no value.
    """
    expr = expression(size)
    if isinstance(expr, int):
        return expr
    return int(expr.xreplace({symbol: sympy.Integer(values[symbol]) for symbol in expr.free_symbols}))
