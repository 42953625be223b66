"""A graph as plain values, ready for JSON, and back: operators by name, weights by their names in the model.

Nothing is unpickled, and nothing is called while a graph is read. Operators are those of PyTorch and of this library
that write into none of their arguments; arguments are numbers, text, types, devices, and lists of these.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.graph.module_path import module_path

NAMESPACES = ("aten", "deepcache_fx")
_REFUSED = frozenset({"aten::from_file", "aten::save", "aten::set_data"})
_CONSTANTS: Mapping[str, tuple[type, ...]] = {
    "dtype": (torch.dtype,),
    "layout": (torch.layout,),
    "memory_format": (torch.memory_format,),
}


class Unreadable(DeepCacheError):
    """A graph that cannot be written as text, or text that is none of a graph."""


def encode(module: fx.GraphModule, names: Mapping[int, str], constants: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The graph as plain values.

    Args:
        module: A flat graph of operators.
        names: Of the model's weights, by their ids.
        constants: Takes what the graph holds besides.

    Raises:
        Unreadable: it has an operator or an argument that is not written.
    """
    kinds: dict[str, int] = {}
    values: list[Any] = []

    def kind_of(value: Any) -> int:
        described = _describe(value)
        key = repr(described)
        if key not in kinds:
            kinds[key] = len(values)
            values.append(described)
        return kinds[key]

    nodes = []
    for node in module.graph.nodes:
        record: dict[str, Any] = {"name": node.name, "op": node.op, "val": kind_of(node.meta.get("val"))}
        path = module_path(node)
        if path:
            record["path"] = path
        if node.op == "placeholder":
            record["target"] = str(node.target)
        elif node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(module)
            if not isinstance(tensor, torch.Tensor):
                raise Unreadable(f"{node.name} is no tensor")
            record["target"] = str(node.target)
            if id(tensor) in names:
                record["weight"] = names[id(tensor)]
            else:
                known = next((name for name, item in constants.items() if item is tensor), None)
                if known is None:
                    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                        raise Unreadable(f"{node.name} is a {type(tensor).__name__}, which is not written to files")
                    known = f"constant_{len(constants)}"
                    constants[known] = tensor
                record["constant"] = known
        elif node.op == "call_function":
            record["target"] = _operator_name(node.target)
            record["args"] = _encode(node.args)
            record["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
        elif node.op == "output":
            record["args"] = _encode(node.args)
        else:
            raise Unreadable(f"{node.name} is a {node.op}, which is not written to files")
        nodes.append(record)
    return {"values": values, "nodes": nodes}


def decode(
    text: Any, weights: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], mode: FakeTensorMode
) -> fx.GraphModule:
    """The graph of such values, over these weights.

    Raises:
        Unreadable: they are none of a graph, or name a weight that there is not.
    """
    try:
        graph, known, root = fx.Graph(), dict[str, fx.Node](), dict[str, Any]()
        for record in text["nodes"]:
            op, name = record["op"], record["name"]
            if name in known:
                raise Unreadable(f"node {name} is there twice")
            args, kwargs, target = (), {}, record.get("target", "output")
            if op == "get_attr":
                tensor = weights[record["weight"]] if "weight" in record else constants[record["constant"]]
                root[target] = tensor
            elif op == "call_function":
                target = _operator(target)
                args = _decode(record["args"], known)
                kwargs = {str(key): _decode(value, known) for key, value in record["kwargs"].items()}
            elif op == "output":
                args = _decode(record["args"], known)
            elif op != "placeholder":
                raise Unreadable(f"{name} is a {op}")
            node = graph.create_node(op, target, args, kwargs, name=name)
            with mode:  # one for each node: who traces the graph again knows its inputs by their very objects
                node.meta["val"] = _fake(text["values"][record["val"]])
            if "path" in record:
                node.meta["nn_module_stack"] = {"": (f"model.{record['path']}", "")}
            known[name] = node
        graph.lint()
        module = fx.GraphModule(root, graph)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"this is no graph of this model: {type(error).__name__}: {error}") from error
    module.eval()
    return module


def _operator_name(target: object) -> str:
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, torch._ops.OpOverload):
        raise Unreadable(f"{target} is no operator of PyTorch, and is not written to files")
    name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    if _operator(name) is not target:
        raise Unreadable(f"{target} is not written to files")
    return name


def _operator(name: Any) -> Any:
    """The operator of that name, if graphs may call it."""
    if name == "getitem":
        return operator.getitem
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or parts[0] not in NAMESPACES or parts[1].startswith("__"):
        raise Unreadable(f"{name!r} is no operator that a graph may call")
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    found = getattr(packet, parts[2], None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable or found._schema.name in _REFUSED:
        raise Unreadable(f"{name!r} is no operator that a graph may call")
    return found


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, types in _CONSTANTS.items():
        if isinstance(value, types):
            return {name: str(value).removeprefix("torch.")}
    raise Unreadable(f"an argument of the type {type(value).__name__} is not written to files")


def _decode(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise Unreadable(f"{value!r:.80} is no argument")
    [(kind, item)] = value.items()
    if kind == "node":
        return known[item]
    if kind == "float":
        return float.fromhex(item)
    if kind == "tuple":
        return tuple(_decode(one, known) for one in item)
    if kind == "device":
        return torch.device(item)
    found = getattr(torch, item) if kind in _CONSTANTS and isinstance(item, str) else None
    if kind not in _CONSTANTS or not isinstance(found, _CONSTANTS[kind]):
        raise Unreadable(f"{value!r:.80} is no argument")
    return found


def _describe(value: Any) -> Any:
    """The shape, strides, type and device of a node's value."""
    if isinstance(value, torch.Tensor):
        sizes = [*value.shape, *value.stride()]
        if not all(type(size) is int for size in sizes):
            raise Unreadable("a graph for many sizes is not written to files: only those of one size are")
        return [list(value.shape), list(value.stride()), str(value.dtype).removeprefix("torch."), str(value.device)]
    if isinstance(value, (tuple, list)):
        return {"several": [_describe(item) for item in value]}
    return None


def _fake(text: Any) -> Any:
    if text is None:
        return None
    if isinstance(text, dict):
        return [_fake(item) for item in text["several"]]
    shape, stride, dtype, device = text
    kind = getattr(torch, dtype)
    return torch.empty_strided(shape, stride, dtype=kind, device=torch.device(device))
