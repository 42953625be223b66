"""Arguments that are no tensors: what a graph bakes in of a function or an object, as part of a key.

Plain values count by value. A function is its code with what it closes over, its defaults, and the globals that the
code names; an object is itself with its attributes. Whatever of that changes, the key changes.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import functools
import itertools
import pathlib
import sys
import types
import uuid
import weakref
from collections import deque
from collections.abc import Hashable, Iterable
from enum import Enum
from typing import Any

import torch

from deepcache_fx.graph.identity import Same
from deepcache_fx.graph.records import attributes, compares_by_value, is_record

PLAIN: frozenset[type] = frozenset(
    {
        bool,
        int,
        str,
        bytes,
        type(None),
        type(Ellipsis),
        range,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        uuid.UUID,
        datetime.date,
        datetime.datetime,
        datetime.timedelta,
        decimal.Decimal,
        fractions.Fraction,
        pathlib.PurePosixPath,
        pathlib.PosixPath,
        pathlib.PureWindowsPath,
    }
)
"""Types whose values are compared as they are. Not floats: 0.0 equals -0.0, and NaN does not equal itself."""

_DEPTH = 4
"""How far attributes of attributes, and functions in closures, are followed; beyond, an object is itself."""
_MOST = 2000
"""So many values in one argument are looked at in every call, and no more."""
_MOST_BYTES = 2**20
_STANDARD = frozenset(torch.nn.Module().__dict__)
_EMPTY = "no value yet"


class UnsupportedInput(Exception):
    """An argument that cannot be part of a key: what a graph would bake in of it cannot be looked at in every call."""


def constant(value: Any, known: object = None) -> Hashable:
    """A key for a value that is no tensor. Tensors in it count by identity, and by how often they were written into.

    Args:
        known: An object that is followed otherwise, where the value leads to it: the model itself.

    Raises:
        UnsupportedInput: the value holds too much, is used up by being read, or hides what it holds.
    """
    kind = type(value)
    if kind in PLAIN:
        return (kind, value)
    if kind is float:
        return number(value)
    return _Walk(known).key(value, _DEPTH)


def number(value: float) -> Hashable:
    """Equal for the same number to the bit's sign; one NaN equals another."""
    return (float, value) if value and value == value else (float, repr(value))


class _Walk:
    """One way through what an argument holds. Meets every object once."""

    def __init__(self, known: object) -> None:
        self._known = known
        self._met: dict[int, int] = {}
        self._kept: list[object] = []
        self._left = _MOST

    def key(self, value: Any, depth: int) -> Hashable:
        kind = type(value)
        self._left -= 1
        if self._left < 0:
            raise UnsupportedInput(
                f"it holds more than {_MOST} values, too many to be looked at in every call; where they do not matter, "
                "name it in `ignore`"
            )
        if kind in PLAIN:
            return (kind, value)
        if kind is float:
            return number(value)
        if isinstance(value, Enum):
            return (kind, Same(value))
        if isinstance(value, (type, types.ModuleType)) or value is self._known:
            return Same(value)
        if isinstance(value, torch.Tensor):
            return (Same(value), None if value.is_inference() else value._version)
        if id(value) in self._met:
            return ("again", self._met[id(value)])
        if kind is not tuple:  # of values that do not change it says nothing to be the same object
            self._met[id(value)] = len(self._met)
            self._kept.append(value)  # an address may be given to another object
        return (kind, self._content(value, kind, depth))

    def _content(self, value: Any, kind: type, depth: int) -> Hashable:
        if isinstance(value, (dict, types.MappingProxyType)):
            items = tuple((self.key(name, depth), self.key(item, depth)) for name, item in value.items())
            return (items, self._attributes(value, depth))
        if isinstance(value, (list, tuple, deque)):
            return (tuple([self.key(item, depth) for item in value]), self._attributes(value, depth))
        if isinstance(value, (set, frozenset)):
            return frozenset([self.key(item, depth) for item in value])
        if isinstance(value, (int, str, bytes, float, complex)):  # enumerations of one's own, strings with attributes
            return (repr(value), self._attributes(value, depth))
        if isinstance(value, bytearray):
            return bytes(value)
        if isinstance(value, slice):
            return tuple([self.key(item, depth) for item in (value.start, value.stop, value.step)])
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            return _array(value)
        if isinstance(value, functools.partial):
            return tuple([self.key(item, depth) for item in (value.func, value.args, value.keywords)])
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return (self.key(value.__self__, depth), self.key(value.__func__, depth))
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            return (value.__qualname__, Same(owner) if isinstance(owner, types.ModuleType) else self.key(owner, depth))
        if isinstance(value, weakref.ReferenceType):
            return self.key(value(), depth)
        if isinstance(value, torch.nn.Module):
            return self._module(value, depth)
        if hasattr(kind, "__next__"):
            raise UnsupportedInput(f"{kind.__name__} is an iterator, which is used up by being read")
        return self._object(value, kind, depth)

    def _object(self, value: Any, kind: type, depth: int) -> Hashable:
        if is_record(value):
            return self._attributes(value, depth + 1)  # equal by their values, not for being the same object
        inside = attributes(value)
        if not inside and getattr(kind, "__hash__", None) is None:
            raise UnsupportedInput(f"{kind.__name__} {value!r:.80} may change, and does not show what it holds")
        if not inside and compares_by_value(kind):
            return (value,)  # it tells itself when it equals another
        if depth == 0:
            return Same(value)
        called = kind.__dict__.get("__call__")
        code = self.key(called, depth - 1) if isinstance(called, types.FunctionType) else None
        return (Same(value), self._attributes(value, depth), self._of_classes(kind), code)

    def _attributes(self, value: Any, depth: int) -> Hashable:
        found = attributes(value)
        if not found or depth <= 0:
            return None
        return tuple([(name, self.key(item, depth - 1)) for name, item in found])

    @staticmethod
    def _of_classes(kind: type) -> Hashable:
        """Plain values among the attributes that an object has of its classes."""
        return tuple(
            [
                (name, number(item) if type(item) is float else (type(item), item))
                for base in kind.__mro__[:-1]
                for name, item in base.__dict__.items()
                if type(item) in (bool, int, float, str) and not name.startswith("__")
            ]
        )

    def _module(self, value: torch.nn.Module, depth: int) -> Hashable:
        own = [(name, item) for name, item in value.__dict__.items() if name not in _STANDARD]
        tensors = itertools.chain(value._parameters.items(), value._buffers.items())
        return (
            Same(value),
            value.training,
            tuple([(name, self.key(item, depth - 1)) for name, item in own]) if depth > 0 else None,
            tuple([(name, self.key(item, depth)) for name, item in tensors]),
            tuple([(name, self.key(item, depth)) for name, item in value._modules.items()]),
        )

    def _function(self, value: types.FunctionType, depth: int) -> Hashable:
        """Another function of the same code that closes over the same does the same."""
        if depth == 0:
            return Same(value)
        inner = depth - 1
        code, around = value.__code__, value.__globals__
        return (
            Same(code),
            Same(around),
            tuple([self.key(_cell(cell), inner) for cell in value.__closure__ or ()]),
            self._values(value.__defaults__ or (), inner),
            self._values((value.__kwdefaults__ or {}).items(), inner),
            self._values(value.__dict__.items(), inner),
            tuple([(name, self._global(around[name], around, inner)) for name in _names(code) if name in around]),
        )

    def _values(self, values: Iterable[Any], depth: int) -> Hashable:
        return tuple([self.key(value, depth) for value in values])

    def _global(self, value: Any, around: dict[str, Any], depth: int) -> Hashable:
        """Values and containers, and functions of the same file; what else a program has is taken to stay."""
        if isinstance(value, types.FunctionType):
            return self.key(value, depth) if value.__globals__ is around else Same(value)
        if isinstance(value, (bool, int, float, str, bytes, torch.Tensor, dict, list, tuple, set)) or value is None:
            return self.key(value, min(depth, 1))
        return Same(value)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function's code, and that of the functions written in it, looks up."""
    inner = [_names(item) for item in code.co_consts if isinstance(item, types.CodeType)]
    return tuple(dict.fromkeys(itertools.chain(code.co_names, *inner)))


def _array(value: Any) -> Hashable:
    """NumPy's, by value."""
    if value.dtype.hasobject:
        raise UnsupportedInput("it is a NumPy array of Python objects; pass a list, or a tensor")
    if value.nbytes > _MOST_BYTES:
        raise UnsupportedInput(
            f"it is a NumPy array of {value.nbytes} bytes, too many to be compared in every call; pass a tensor"
        )
    return (value.dtype.str, value.shape, value.strides, value.tobytes())
