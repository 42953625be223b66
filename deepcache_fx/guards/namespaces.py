"""What can be written into beside the attributes of modules: names, what they stand for, and how to change that."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

LIBRARIES = frozenset(
    {
        *sys.stdlib_module_names,
        "_pytest",
        "accelerate",
        "deepcache_fx",
        "diffusers",
        "einops",
        "huggingface_hub",
        "hypothesis",
        "numpy",
        "passes",
        "peft",
        "pluggy",
        "pytest",
        "safetensors",
        "torch",
        "torchao",
        "torchvision",
        "transformers",
        "triton",
        "xformers",
    }
)
"""Their own code keeps nothing of a call: only what others put into it is followed."""

_DUNDER = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__", "__qualname__")


@dataclass(frozen=True)
class Namespace:
    """Some names, what they stand for now, and how to change that."""

    label: str
    """As a sentence about it begins."""
    key: Hashable
    """Equal for those that the same code writes into."""
    items: Callable[[], dict[str, Any]]
    put: Callable[[str, Any], object]
    remove: Callable[[str], object]


def is_library(name: object) -> bool:
    """True for the name of a module that is followed no further."""
    return isinstance(name, str) and name.partition(".")[0] in LIBRARIES


def instance(item: Any, skipped: frozenset[str] = frozenset()) -> Namespace:
    """The attributes of one object, in its dictionary and its slots."""
    own: dict[str, Any] | None = getattr(item, "__dict__", None)
    kind: Any = type(item)
    slots = [name for cls in type(item).__mro__ for name, v in vars(cls).items() if _is_slot(v)]

    def items() -> dict[str, Any]:
        found = {} if own is None else {name: value for name, value in own.items() if name not in skipped}
        return found | {name: getattr(item, name) for name in slots if hasattr(item, name)}

    def put(name: str, value: Any) -> None:
        if name in slots:
            object.__setattr__(item, name, value)
        elif own is not None:
            own[name] = value

    def remove(name: str) -> None:
        if name in slots or isinstance(item, type):
            delattr(item, name)
        elif own is not None:
            del own[name]

    return Namespace(type(item).__name__, kind, items, put, remove)


def arguments(label: str, key: Hashable, given: dict[str, Any]) -> Namespace:
    """What a call or a partial function was given: changed in place alone."""
    return Namespace(label, key, given.copy, _ignore, _ignore)


def function_attributes(function: types.FunctionType) -> Namespace:
    """What has been set on a function."""
    own = function.__dict__
    label = f"the function {function.__qualname__}"
    return Namespace(label, (function.__code__, "own"), own.copy, own.__setitem__, own.pop)


def default_arguments(function: types.FunctionType) -> Namespace:
    """Changed in place alone."""
    label = f"a default of {function.__qualname__}"
    return Namespace(label, function.__code__, functools.partial(defaults, function), _ignore, _ignore)


def closure(function: types.FunctionType, cells: dict[str, types.CellType]) -> Namespace:
    """The variables of an outer function."""

    def items() -> dict[str, Any]:
        return {name: cell.cell_contents for name, cell in cells.items() if not _is_empty(cell)}

    def put(name: str, value: Any) -> None:
        cells[name].cell_contents = value

    def remove(name: str) -> None:
        del cells[name].cell_contents

    return Namespace(f"the closure of {function.__qualname__}", (function.__code__, "closure"), items, put, remove)


def class_attributes(cls: type) -> Namespace:
    """The class's own, without those of its bases."""

    def items() -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if name not in _DUNDER and not _is_abc(name)}

    return Namespace(
        f"the class {cls.__name__}",
        (cls, "own"),
        items,
        functools.partial(type.__setattr__, cls),
        functools.partial(type.__delattr__, cls),
    )


def variable(label: str, variables: dict[str, Any], name: str) -> Namespace:
    """One global of a module."""

    def items() -> dict[str, Any]:
        return {name: variables[name]} if name in variables else {}

    return Namespace(f"the module {label}", (label, name), items, variables.__setitem__, variables.pop)


def defaults(function: types.FunctionType) -> dict[str, Any]:
    """Of arguments."""
    found = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    return found | (function.__kwdefaults__ or {})


def contents(cell: types.CellType) -> Any:
    """None where the cell is empty."""
    return None if _is_empty(cell) else cell.cell_contents


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _ignore(*_: Any) -> None:
    """Defaults are changed in place alone."""


def _is_slot(value: object) -> bool:
    return isinstance(value, types.MemberDescriptorType)


def _is_abc(name: str) -> bool:
    return name.startswith("_abc_")
