"""Whether everything that was read of a model is still the same objects: asked without reading it again."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch

_attributes = attrgetter("__dict__")
_kind = attrgetter("dtype", "device", "shape")
_version = attrgetter("_version")

_STANDARD = tuple(torch.nn.Module().__dict__)
"""The attributes that every module has, and has first."""

_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})

_EMPTY = object()

_content = attrgetter("cell_contents")
_defaults = attrgetter("__defaults__", "__kwdefaults__")


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY  # empty


class IdentitySnapshot:
    """What was found where, in flat lists.

    A model has some ten thousand attributes: they are compared by identity, in loops that the interpreter runs in C.
    Equal values in other objects count as a change; whoever asks then reads again, and compares what matters.
    """

    def __init__(self) -> None:
        self.objects: list[object] = []
        self._types: list[type] = []
        self._names: list[object] = []
        self._values: list[object] = []
        self._views: list[Iterable[object]] = []
        """Of the attributes' dictionaries: they show what is there now."""
        self._objects_at: list[int] = []
        """Which of the values are told apart by identity alone."""
        self._objects_kept: list[object] = []
        self._containers: list[Any] = []
        self._lengths: list[int] = []
        self._items: list[object] = []
        self._empty: list[Any] = []
        self._sets: list[tuple[set[Any], frozenset[Any]]] = []
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._cells: list[types.CellType] = []
        self._held: list[object] = []
        self._empty_cells: list[types.CellType] = []
        self._functions: list[types.FunctionType] = []
        self._defaults: list[object] = []
        self._weights: list[torch.Tensor] = []
        self._kinds: list[object] = []
        self._strides: list[object] = []
        self._inner: list[tuple[torch.Tensor, str, object]] = []

    def attributes(self, owner: object) -> list[tuple[str, Any]]:
        """The instance attributes of an object."""
        items = list(_attributes(owner).items())
        names, values = [name for name, _ in items], [value for _, value in items]
        skipped = len(_STANDARD) if tuple(names[: len(_STANDARD)]) == _STANDARD else 0
        for index, value in enumerate(values[skipped:], len(self._values) + skipped):
            if type(value) not in _PLAIN:
                self._objects_at.append(index)
                self._objects_kept.append(value)
        self.objects.append(owner)
        self._types.append(type(owner))
        self._views.append(_attributes(owner).values())
        self._names += names
        self._values += values
        return items

    def dictionary(self, value: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        """What a dictionary holds."""
        items = list(value.items())
        if items:
            self._contained(value, [key for key, _ in items])
            self._contained(value.values(), [item for _, item in items])
        else:
            self._empty.append(value)
        return items

    def sequence(self, value: list[Any]) -> list[Any]:
        """What a list holds."""
        items = list(value)
        if items:
            self._contained(value, items)
        else:
            self._empty.append(value)
        return items

    def _contained(self, container: Any, items: list[Any]) -> None:
        self._containers.append(container)
        self._lengths.append(len(items))
        self._items += items

    def set(self, value: set[Any]) -> frozenset[Any]:
        """What a set holds."""
        items = frozenset(value)
        self._sets.append((value, items))
        return items

    def function(self, value: types.FunctionType) -> list[object]:
        """What a function's closure holds, and its defaults."""
        cells = value.__closure__ or ()
        held = [*map(_contents, cells)]
        for cell, content in zip(cells, held, strict=True):
            if content is _EMPTY:
                self._empty_cells.append(cell)
            else:
                self._cells.append(cell)
                self._held.append(content)
        self._functions.append(value)
        self._defaults += _defaults(value)
        return [*held, *(value.__defaults__ or ()), value.__kwdefaults__]

    def tensor(self, value: torch.Tensor) -> int | None:
        """How often a tensor has been written into, where that is counted."""
        if value.is_inference():
            return None
        self._tensors.append(value)
        self._versions.append(value._version)
        return value._version

    def weight(self, value: torch.Tensor) -> tuple[object, ...]:
        """A parameter's type, device, shape and strides, which change without another parameter."""
        kind, stride = _kind(value), value.stride()
        self._weights.append(value)
        self._kinds.append(kind)
        self._strides.append(stride)
        return (*kind, stride)

    def inner(self, owner: torch.Tensor, name: str) -> Any:
        """A tensor that another one wraps: `swap_tensors`, as `Module.to` does it, leaves the outer one the same."""
        value = getattr(owner, name)
        self._inner.append((owner, name, value))
        return value

    def holds(self) -> bool:
        """True where nothing of it has changed."""
        try:
            found = [*map(_attributes, self.objects)]
            return (
                all(map(is_, map(type, self.objects), self._types))
                and sum(map(len, found)) == len(self._values)
                and all(map(is_, chain.from_iterable(map(dict.values, found)), self._values))
                and [*chain.from_iterable(found)] == self._names
                and all(map(eq, map(_kind, self._weights), self._kinds))
                and all(map(eq, map(torch.Tensor.stride, self._weights), self._strides))
                and all(getattr(owner, name, None) is value for owner, name, value in self._inner)
                and self.holds_settings()
            )
        except RuntimeError:  # a dictionary changed its size: another thread is at it
            return False

    def holds_settings(self) -> bool:
        """True where no attribute has changed: asked at every call, so as quickly as it can be.

        Plain values are compared as equal numbers are, the others by identity.
        """
        try:
            values = [*chain.from_iterable(self._views)]
            return (
                values == self._values
                and all(map(is_, map(values.__getitem__, self._objects_at), self._objects_kept))
                and [*map(len, self._containers)] == self._lengths
                and all(map(is_, chain.from_iterable(self._containers), self._items))
                and not any(self._empty)
                and [*map(_version, self._tensors)] == self._versions
                and all(value == items for value, items in self._sets)
                and all(map(is_, map(_content, self._cells), self._held))
                and all(map(is_, chain.from_iterable(map(_defaults, self._functions)), self._defaults))
                and all(_contents(cell) is _EMPTY for cell in self._empty_cells)
            )
        except (RuntimeError, TypeError, ValueError):  # a dictionary is changing its size; arrays compare as arrays
            return False
