"""What an argument is put together of: dictionaries, lists, tuples and records, down to its tensors."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from deepcache_fx.graph.records import attributes, is_record, with_attributes


def members(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, by key, index or attribute, dictionaries in sorted order; None for anything else."""
    if isinstance(value, dict):
        return [(name, value[name]) for name in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return attributes(value) if is_record(value) else None


def leaves(value: Any, path: str = "", *, joint: str = ".") -> Iterator[tuple[str, Any]]:
    """Everything in it that is no container, in the order of its tensors, with the way there."""
    found = members(value)
    if found is None:
        yield path, value
    else:
        for name, item in found:
            yield from leaves(item, f"{path}{joint}{name}" if path else str(name), joint=joint)


def tensors_left(args: tuple[Any, ...], kwargs: dict[str, Any], given: list[torch.Tensor]) -> list[str]:
    """Where among its arguments a function has left tensors that it was not given."""
    known = {id(tensor) for tensor in given}
    everything = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    return [path for path, value in leaves(everything) if isinstance(value, torch.Tensor) and id(value) not in known]


class Copies:
    """Copies of arguments, with other tensors in the place of theirs: who writes into them leaves the caller's alone.

    A container that the arguments hold twice is one in the copy, too. Functions and other objects are the same ones.

    Args:
        tensors: What takes the place of each tensor, in order.
    """

    def __init__(self, tensors: Iterator[torch.Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return next(self._tensors)
        found = members(value)
        if found is None:
            return _changeable_copy(value)
        items = [(name, self.of(item)) for name, item in found]
        if id(value) not in self._made:
            self._made[id(value)] = _with_members(value, items)
        return self._made[id(value)]


def _with_members(value: Any, items: list[tuple[Any, Any]]) -> Any:
    kind = type(value)
    if kind is dict:
        return dict(items)
    if isinstance(value, dict):
        made = copy.copy(value)
        for name, item in items:
            if item is not value[name]:
                made[name] = item
        return made
    values = [item for _, item in items]
    if isinstance(value, tuple):
        if all(item is before for item, before in zip(values, value, strict=True)):
            return value
        return kind(*values) if hasattr(value, "_fields") else kind(values)
    if isinstance(value, list):
        listed = copy.copy(value)
        listed[:] = values
        return listed
    return with_attributes(value, dict(items))


def _changeable_copy(value: Any) -> Any:
    if isinstance(value, (set, bytearray, deque)) or hasattr(type(value), "__array__"):
        return copy.copy(value)
    return value
