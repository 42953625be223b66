"""Which sizes of its inputs a graph serves that was captured with symbols for them.

Symbols are the batch (the first axis of every input) and whatever a feature map has behind its channels: height and
width, frames. Sizes of 1, which broadcast, and all other axes stay numbers. What a model asks about its sizes while it
is captured, which branches of Python its answers led into, and what passes asked of the shapes later, all of that
PyTorch keeps as conditions: Eq(Mod(height, 8), 0) of a UNet of Stable Diffusion. Sizes that break one need another
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from deepcache_fx.graph.signature import Call
from passes.runner import refresh_metadata
from passes.shared.match import eliminate_dead_code
from passes.shared.rewrite import copied_graph
from passes.shared.sizes import evaluated, expression, is_size, layout, places

Values = Mapping[sympy.Symbol, int]
"""What the symbols of a graph stand for in a call."""


def free_axes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes whose sizes may become symbols."""
    axes = range(tensor.ndim) if tensor.ndim >= 4 else range(min(tensor.ndim, 1))
    return tuple(axis for axis in axes if tensor.shape[axis] > 1 and (axis != 1 or tensor.ndim < 4))


def family(call: Call) -> Hashable:
    """Equal for calls that differ in the sizes of free axes, and in strides, alone."""
    shapes = []
    for tensor in call.tensors:
        free = free_axes(tensor)
        shapes.append(tuple(None if axis in free else size for axis, size in enumerate(tensor.shape)))
    return (tuple(shapes), without_tensors(call.key))


def sizes_of(call: Call) -> tuple[torch.Size, ...]:
    """The shapes of a call's tensors."""
    return tuple(tensor.shape for tensor in call.tensors)


def without_tensors(key: Any) -> Hashable:
    """A call's key without the shapes and strides in it."""
    if isinstance(key, tuple):
        if len(key) == 5 and isinstance(key[1], torch.Size):
            return (key[0], len(key[1]), *key[3:])
        return tuple([without_tensors(part) for part in key])
    found: Hashable = key
    return found


class Sizes:
    """The sizes that one captured graph serves.

    Args:
        inputs: Its fake input tensors, in order; they are not kept.
        shape_env: What knows the symbols, and keeps the conditions.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], shape_env: ShapeEnv) -> None:
        self._kinds = [(value.ndim, value.dtype, value.device) for value in inputs]
        self._layouts = [layout(value) for value in inputs]
        self._env = shape_env
        self._env.frozen = False  # what passes ask of the shapes must be kept as well

    @staticmethod
    def of(graph: fx.Graph) -> Sizes | None:
        """None where all of a captured graph's sizes are numbers."""
        inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        if all(type(size) is int for value in inputs for size in value.shape):
            return None
        mode = detect_fake_mode(inputs)
        assert mode is not None
        assert mode.shape_env is not None
        return Sizes(inputs, mode.shape_env)

    def values(self, tensors: Sequence[torch.Tensor]) -> Values | None:
        """What the symbols are for these inputs; None where the graph does not serve them."""
        if [(t.ndim, t.dtype, t.device) for t in tensors] != self._kinds:
            return None
        values = {symbol: int(tensors[number].shape[axis]) for symbol, (number, axis) in self._places().items()}
        try:
            for (shape, like), given in zip(self._layouts, tensors, strict=True):
                if any(evaluated(size, values) != given.shape[axis] for axis, size in enumerate(shape)):
                    return None
                strides = [evaluated(stride, values) for stride in like]
                sized = [axis for axis, size in enumerate(given.shape) if size > 1]
                if any(strides[axis] != given.stride(axis) for axis in sized):
                    return None
            if not all(self._holds(condition, values) for condition in self._conditions()):
                return None
        except KeyError:  # a condition upon what no input tells
            return None
        for symbol, value in values.items():
            bounds = self._env.var_to_range.get(symbol)
            if bounds is not None and not (bounds.lower <= value and value <= bounds.upper):
                return None
        return values

    def describe(self) -> str:
        """The inputs with names for their symbols, and what must divide them, for a reader."""
        names: dict[sympy.Symbol, sympy.Symbol] = {}
        for symbol, (_, axis) in self._places().items():
            name = {0: "batch", 2: "height", 3: "width"}.get(axis, f"axis{axis}")
            names[symbol] = sympy.Symbol(name if sympy.Symbol(name) not in names.values() else f"{name}_{len(names)}")
        shapes = ["x".join(str(sympy.sympify(size).xreplace(names)) for size in shape) for shape, _ in self._layouts]
        divided = [condition for condition in self._conditions() if _is_divisibility(condition)]
        told = sorted({_divisibility(condition.xreplace(names)) for condition in divided})
        return ", ".join(shape or "scalar" for shape in shapes) + (f"; {', '.join(told)}" if told else "")

    def _places(self) -> Mapping[sympy.Symbol, tuple[int, int]]:
        return places(enumerate(shape for shape, _ in self._layouts))

    def _conditions(self) -> Iterable[Any]:
        asserted = (item.expr for items in self._env.deferred_runtime_asserts.values() for item in items)
        for expr in (*(guard.expr for guard in self._env.guards), *asserted):
            yield self._env.replace(expr)

    @staticmethod
    def _holds(condition: Any, values: Values) -> bool:
        known = {symbol: sympy.Integer(values[symbol]) for symbol in condition.free_symbols}
        return bool(condition.xreplace(known) == sympy.true)


def _is_divisibility(condition: Any) -> bool:
    if not isinstance(condition, (sympy.Eq, sympy.Ne)) or condition.args[1] != 0:
        return False
    rest: Any = condition.args[0]
    return type(rest).__name__ == "Mod" and isinstance(rest.args[0], sympy.Symbol) and bool(rest.args[1].is_Integer)


def _divisibility(condition: Any) -> str:
    name, divisor = condition.args[0].args
    return f"{name} {'divides' if isinstance(condition, sympy.Eq) else 'does not divide'} by {divisor}"


def at(values: Values) -> Callable[[Any], int]:
    """What tells a size for these values of its symbols; each but once, for there are few and many ask."""
    known: dict[Any, int] = {}

    def size(item: Any) -> int:
        expr = expression(item)
        if expr not in known:
            known[expr] = evaluated(item, values)
        return known[expr]

    return size


def fixed(module: fx.GraphModule, size: Callable[[Any], int]) -> fx.GraphModule:
    """The graph with numbers in the place of its symbols, over the same weights."""
    graph, _ = copied_graph(module.graph)
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: size(source.meta["val"]) if is_size(source) else source
        )
    eliminate_dead_code(graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        with mode:
            shape, strides = [*map(size, like.shape)], [*map(size, like.stride())]
            value = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        node.meta = {**node.meta, "val": value}
    made = fx.GraphModule(module, graph)
    refresh_metadata(made)
    return made


def depends_on_values(value: object) -> bool:
    """True for a tensor as long as the values of inputs say, not their sizes."""
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))
