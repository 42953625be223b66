"""Objects that are no more than their attributes: dataclasses, namespaces, and others that compare by value."""

from __future__ import annotations

import copy
import functools
import types
from enum import Enum
from typing import Any

import torch

_HEAP_TYPE = 1 << 9
"""Of `type.__flags__`: not one of the interpreter's own."""


def compares_by_value(kind: type) -> bool:
    """True where a class says which of its instances are equal."""
    return getattr(kind, "__eq__", None) is not object.__eq__


@functools.lru_cache(maxsize=4096)
def _is_record_type(kind: Any) -> bool:

    if kind is types.SimpleNamespace:
        return True
    if not compares_by_value(kind) or issubclass(kind, (torch.Tensor, torch.nn.Module, type, Enum)):
        return False
    if not all(base.__flags__ & _HEAP_TYPE for base in kind.__mro__[:-1]):
        return False  # it has a state besides its attributes, as a subclass of str or ndarray
    return bool(kind.__dictoffset__) or any("__slots__" in base.__dict__ for base in kind.__mro__)


def is_record(value: Any) -> bool:
    """True for an instance of a class written in Python that says which of its instances are equal.

    Such an object may be copied, with tensors in the place of those that it holds.
    """
    return _is_record_type(type(value))  # type: ignore[arg-type]


def attributes(value: Any) -> list[tuple[str, Any]]:
    """The instance attributes of an object, in a dictionary or in slots; nothing where it has neither."""
    kind = type(value)
    found = value.__dict__ if kind.__dictoffset__ else None
    items = list(found.items()) if isinstance(found, dict) else []
    for base in kind.__mro__[:-1]:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{base.__name__.lstrip('_')}{name}" if private else name
            if hasattr(value, name):
                items.append((name, getattr(value, name)))
    return items


def with_attributes(value: Any, changed: dict[str, Any]) -> Any:
    """A copy of a record with other attributes, frozen or not."""
    made = copy.copy(value)
    for name, item in changed.items():
        object.__setattr__(made, name, item)
    return made
