"""A graph as Python that a person can read: short operator names, module paths as headings, shapes as comments.

    def shallow(sample, timestep, kept_add):
        # conv_in
        conv2d = aten.conv2d(sample, self.conv_in.weight, self.conv_in.bias, [1, 1], [1, 1])  # f32[2, 16, 8, 8]
        ...
        return (conv2d_8,)

It runs, too: `self` stands for the model. Constants that the capture made are read as its attributes.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.graph.macs import node_macs
from deepcache_fx.graph.module_path import module_path, two_parts
from deepcache_fx.graph.split import Variants

_PLAIN_OVERLOADS = ("default", "Tensor", "Scalar")
"""Which of these is meant the arguments tell: their names are left out."""
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b", "complex": "c"}


class Listings(Mapping[str, str]):
    """The graphs of one signature as text: "full", "shallow", and "full_prompt", "shallow_prompt" where there are such.

    A schedule's deeper cuts have theirs: "shallow_3" at branch 3.
    Written when asked for. The graphs, and the weights they hold, are not kept alive by this.

    Raises:
        DeepCacheError: the graph is asked for after it has been dropped.

    Example:
        >>> print(report(pipe).graphs[0]["shallow"])
    """

    def __init__(self, variants: Variants) -> None:
        self._variants = weakref.ref(variants)
        parts = variants.named()
        self._names = (*parts, *(f"{name}_prompt" for name, part in parts.items() if part.prompt is not None))

    def __getitem__(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(name)
        variants = self._variants()
        if variants is None:
            raise DeepCacheError("the graphs of this report have been dropped: take a new report() of the model")
        variant = variants.named()[name.removesuffix("_prompt")]
        module = variant.prompt if name.endswith("_prompt") else variant.step
        assert module is not None
        return listing(module, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are dictionaries of the text."""
        return dict, (dict(self),)


def listing(module: fx.GraphModule, name: str = "forward") -> str:
    """A graph as the text of one function, valid Python.

    Args:
        module: A flat graph of operators.
        name: What to call the function.

    Example:
        >>> print(listing(captured.graph, "unet"))
    """
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    work = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    macs = sum(node_macs(node).total for node in work)
    lines = [f"# {name}: {len(work)} operators, {macs / 1e9:.3g} GMAC"]
    called = {node.target for node in work if node.target is not operator.getitem}
    others = {_module(target) for target in called if not isinstance(target, torch._ops.OpOverload)}
    lines += [*(f"import {other}" for other in sorted({"torch", *others})), "from torch import inf, nan", ""]
    lines += ["aten = torch.ops.aten", "", "", f"def {name}({', '.join(node.name for node in inputs)}):"]
    lines += [f"    # {node.name}: {_type(node)}" for node in inputs]
    heading = None
    for node in work:
        place = two_parts(module_path(node))
        if place != heading:
            lines += ["", f"    # {place or 'the model itself'}"]
            heading = place
        lines.append(f"    {node.name} = {_call(node)}  # {_type(node)}")
    return "\n".join([*lines, "", f"    return {_text(graph.output_node().args[0])}", ""])


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{_text(node.args[0])}[{_text(node.args[1])}]"
    arguments = [*map(_text, node.args), *(f"{name}={_text(value)}" for name, value in node.kwargs.items())]
    return f"{_operator(node.target)}({', '.join(arguments)})"


def _operator(target: Any) -> str:
    if not isinstance(target, torch._ops.OpOverload):
        return f"{_module(target)}.{getattr(target, '__name__', target)}"
    packet = str(target.overloadpacket)  # "aten.conv2d"
    namespace = "" if packet.startswith("aten.") else "torch.ops."
    overload = target._overloadname
    return f"{namespace}{packet}" if overload in _PLAIN_OVERLOADS else f"{namespace}{packet}.{overload}"


def _module(target: Any) -> str:
    return str(getattr(target, "__module__", "torch")).removeprefix("_")


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return _attribute(str(value.target)) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    return repr(value)


def _attribute(target: str) -> str:
    """`self.down_blocks[0].weight` of `model.down_blocks.0.weight`; the model has that very parameter there."""
    text = "self"
    for part in target.removeprefix("model.").split("."):
        if part.isdigit():
            text = f"{text}[{part}]"
        else:
            text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


def _type(node: fx.Node) -> str:
    """`f16[2, 320, 64, 64]`: what the node returns."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return ", ".join(_tensor(item) for item in value)
    return _tensor(value)


def _tensor(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    match = re.fullmatch(r"([a-z]+)(.*)", str(value.dtype).removeprefix("torch."))
    assert match is not None
    short = _DTYPES.get(match[1], match[1]) + match[2]
    return f"{short}{list(value.shape)}"
