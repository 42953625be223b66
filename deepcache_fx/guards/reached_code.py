"""What Python code can write into beside the model's attributes: found by following the functions that it names.

Closure cells, defaults, attributes of functions, class attributes, globals, and the objects bound or held there.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from deepcache_fx.guards.namespaces import (
    Namespace,
    arguments,
    class_attributes,
    closure,
    contents,
    default_arguments,
    defaults,
    function_attributes,
    instance,
    is_library,
    variable,
)

CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)

_OBJECTS_OF_LIBRARIES = (types.SimpleNamespace, threading.local, argparse.Namespace, torch.nn.Module)
_NO_STATE = (torch.Tensor, torch.dtype, torch.device, torch.Generator, str, bytes, int, float, complex, type(None))
_DEPTH = 4
_MANY = 1000


class Reached:
    """Everything found by following these roots: functions, objects, classes, containers.

    Raises nothing: what cannot be read is left out. A FakeTensor in a place that is not found is found otherwise (see
    `stray_tensors`).
    """

    def __init__(self, roots: Iterable[Any], known: Iterable[Any] = (), skipped: frozenset[str] = frozenset()) -> None:
        """`known` are objects whose attributes are watched anyway; `skipped` attributes of others are not."""
        self.namespaces: list[Namespace] = []
        self.memos: list[Any] = []
        """Memoized functions (`functools.lru_cache`)."""
        self.codes: set[types.CodeType] = set()
        self._skipped = skipped
        self._seen: dict[int, Any] = {}
        self._classes: set[int] = set()
        self._globals: dict[int, tuple[str, Any, set[str]]] = {}
        self._queue: deque[tuple[Any, int]] = deque()
        known = list(known)
        self._seen.update((id(item), item) for item in known)
        for item in known:
            for value in item.__dict__.values():
                if not isinstance(value, (*_NO_STATE, torch.nn.Module)):
                    self._add(value, 2)
        for kind in {type(item): None for item in known}:
            self._known_class(kind)
        for function in vars(torch.nn.functional).values():
            self._others(function)
        given = {f"argument {i}": root for i, root in enumerate(roots)}
        for root in given.values():
            self._add(root, _DEPTH)
        while self._queue:
            self._follow(*self._queue.popleft())
        for label, variables, names in self._globals.values():
            self.namespaces += [variable(label, variables, name) for name in names if not hasattr(builtins, name)]
        if given:
            self.namespaces.append(arguments("the call", frozenset(self.codes), given))

    def _add(self, value: Any, depth: int) -> None:
        if not isinstance(value, _NO_STATE) and depth > 0 and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._queue.append((value, depth))

    def _follow(self, value: Any, depth: int) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._add(value.__func__, depth)
            self._add(value.__self__, _DEPTH)
        elif isinstance(value, functools.partial):
            self._add(value.func, depth)
            self._arguments(value)
        elif isinstance(value, (staticmethod, classmethod)):
            self._add(value.__func__, depth)
        elif isinstance(value, property):
            for accessor in (value.fget, value.fset, value.fdel):
                self._add(accessor, depth)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.memos.append(value)
            self._add(value.__wrapped__, depth)
        elif isinstance(value, type):
            if not is_library(value.__module__):
                self._class(value)
        elif isinstance(value, (*CONTAINERS, tuple, frozenset)):
            if len(value) <= _MANY:
                for item in list(value.values() if isinstance(value, dict) else value):
                    self._add(item, depth - 1)
        elif isinstance(value, weakref.ref):
            self._add(value(), depth)
        else:
            self._object(value, depth)

    def _arguments(self, partial: functools.partial[Any]) -> None:
        given = {f"argument {i}": value for i, value in enumerate(partial.args)} | partial.keywords
        code = getattr(partial.func, "__code__", type(partial.func))
        label = f"a partial {getattr(partial.func, '__qualname__', code)}"
        self.namespaces.append(arguments(label, (code, "partial"), given))
        for value in given.values():
            self._add(value, _DEPTH)

    def _object(self, value: Any, depth: int) -> None:
        kind = type(value)
        root = kind.__module__.partition(".")[0]
        is_inert = root in sys.stdlib_module_names or root in ("torch", "numpy", "triton")
        if isinstance(value, types.ModuleType) or (is_inert and not isinstance(value, _OBJECTS_OF_LIBRARIES)):
            return
        namespace = instance(value, self._skipped)
        self.namespaces.append(namespace)
        if not is_library(kind.__module__):
            self._class(kind)
        for item in namespace.items().values():
            self._add(item, depth - 1)

    # Code.

    def _function(self, function: types.FunctionType) -> None:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        if is_library(function.__globals__.get("__name__")):
            for cell in cells.values():  # of a decorator, as torch.no_grad: the function that it decorates
                self._others(contents(cell))
            self._others(getattr(function, "__wrapped__", None))
            return
        self.codes.add(function.__code__)
        if cells:
            self.namespaces.append(closure(function, cells))
            for cell in cells.values():
                self._add(contents(cell), _DEPTH)
        given = defaults(function).values()
        if any(not isinstance(value, _NO_STATE) for value in given):
            self.namespaces.append(default_arguments(function))
            for value in given:
                self._add(value, _DEPTH)
        self.namespaces.append(function_attributes(function))
        for value in list(function.__dict__.values()):
            self._add(value, _DEPTH)
        names = {name for code in _with_nested(function.__code__) for name in code.co_names}
        self._module(str(function.__globals__.get("__name__")), function.__globals__, names)

    def _module(self, label: str, variables: dict[str, Any], names: set[str]) -> None:
        """Follow those globals of a module that some code names."""
        _, _, known = self._globals.setdefault(id(variables), (label, variables, set()))
        new = names - known
        known |= new
        for name in new:
            value = variables.get(name)
            imported = sys.modules.get(name) if value is None else value  # imported within the function
            if isinstance(imported, types.ModuleType):
                inner = getattr(imported, "__name__", None)
                if not is_library(inner):
                    self._module(str(inner), vars(imported), names)
            else:
                self._add(value, _DEPTH)

    # Classes.

    def _class(self, cls: type) -> None:
        for kind in cls.__mro__:
            if is_library(kind.__module__) or id(kind) in self._classes:
                continue
            self._classes.add(id(kind))
            self.namespaces.append(class_attributes(kind))
            for value in list(vars(kind).values()):
                self._add(value, _DEPTH)

    def _known_class(self, cls: type) -> None:
        """Of a library's class too: its functions may have been replaced, as may those of its module."""
        for kind in cls.__mro__:
            if id(kind) in self._classes or kind in (object, torch.nn.Module):
                continue
            if is_library(kind.__module__):
                self._classes.add(id(kind))
                self.namespaces.append(class_attributes(kind))
                for value in (*vars(kind).values(), *vars(sys.modules.get(kind.__module__, kind)).values()):
                    self._others(value)
            else:
                self._class(kind)

    def _others(self, value: Any) -> None:
        """Follow a function that is not the library's own."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, types.FunctionType):
            if not is_library(value.__globals__.get("__name__")) or value.__closure__:
                self._add(value, _DEPTH)
        elif isinstance(value, (functools.partial, types.MethodType)):
            self._add(value, _DEPTH)


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)
