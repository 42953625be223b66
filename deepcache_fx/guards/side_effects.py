"""What a model's forward does besides returning a result: a graph of it would not, so such a model runs itself.

Attention processors that keep their maps for the pipeline (self-attention guidance), recording hooks, counters.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepcache_fx.errors import Uncapturable
from deepcache_fx.guards.fingerprint import NOT_STATE, Same

_Holder = tuple[type, str]
"""A class, and an attribute of its instances."""


class SideEffects:
    """Refuses to capture where forward was seen to write into the Python objects of the model.

    A tensor that forward leaves in an object is enough. A plain value may be written once, as by a model that prepares
    something at its first call; the second time it is refused.
    """

    def __init__(self) -> None:
        self._written: set[_Holder] = set()
        self._refused: set[_Holder] = set()

    def check(self, module: torch.nn.Module, objects: Iterable[object]) -> None:
        """Raise an Uncapturable for hooks inside of `module`, and for classes that are known to write."""
        for name, sub in module.named_modules():
            for hook in (*sub._forward_hooks.values(), *sub._forward_pre_hooks.values()) if name else ():
                origin = getattr(hook, "__module__", type(hook).__module__)  # torch's own, as weight_norm's, is pure
                if not str(origin).startswith("torch."):
                    label = getattr(hook, "__qualname__", type(hook).__name__)
                    raise Uncapturable(f"layer {name} has a forward hook ({label}), which a graph would not call")
        kinds = {type(item) for item in objects}
        for kind, name in self._refused:
            if kind in kinds:
                raise Uncapturable(_reason(kind, name))

    @contextmanager
    def watching(self, objects: Iterable[object]) -> Iterator[None]:
        """Raise an Uncapturable where the block writes into one of these objects, and put back what was there."""
        before = _Memory(objects)
        try:
            yield
        except BaseException:
            before.bring_back()
            raise
        written = before.written()
        if not written:
            before.bring_back()  # a scale that was multiplied and divided again, but for rounding
        for holder, with_tensor in written:
            if with_tensor or holder in self._written:
                before.bring_back()
                self._refused.add(holder)
                raise Uncapturable(_reason(*holder))
            self._written.add(holder)


def _reason(kind: type, name: str) -> str:
    return f"{kind.__name__} keeps something of each call ({name}), which a graph would not"


class _Memory:
    """The attributes of some objects, down through lists and dictionaries, as they are now."""

    def __init__(self, objects: Iterable[object]) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._objects = [
            (item, {name: (value, _state(value, self._containers)) for name, value in _own(item)}) for item in objects
        ]

    def written(self) -> list[tuple[_Holder, bool]]:
        """What has changed since, and whether a tensor was left there."""
        found = []
        for item, before in self._objects:
            for name, value in _own(item):
                if name not in before or before[name][1] != _state(value, []):
                    found.append(((type(item), name), _holds_tensor(value)))
        return found

    def bring_back(self) -> None:
        for item, before in self._objects:
            for name, value in _own(item):
                if name not in before:
                    del item.__dict__[name]
                elif value is not before[name][0]:
                    item.__dict__[name] = before[name][0]
        for container, copy in self._containers:
            if not _same_items(container, copy):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(copy)


def _own(item: object) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in item.__dict__.items() if name not in NOT_STATE]


def _same_items(container: Any, copy: Any) -> bool:
    if isinstance(container, dict):
        return _same_items(list(container), list(copy)) and _same_items(list(container.values()), list(copy.values()))
    return len(container) == len(copy) and all(map(operator.is_, container, copy))


def _state(value: Any, containers: list[tuple[Any, Any]]) -> object:
    """Equal for equal plain values (floats: to 12 digits) and the same objects; notes lists and dictionaries."""
    if isinstance(value, (bool, int, str)):
        return (type(value), value)
    if isinstance(value, float):
        return f"{value:.12g}"
    if type(value) in (dict, list, OrderedDict):
        containers.append((value, value.copy()))
    if isinstance(value, dict):
        return tuple((Same(key), _state(item, containers)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_state(item, containers) for item in value)
    return Same(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds_tensor, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)
