"""Functions that keep what they saw, each in another place: what a model's forward may call."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

LAST: Any = None
ALL: list[Any] = []
STATE = types.SimpleNamespace(last=None)
CALLS = 0


@dataclass
class Kept:
    """A function, and a look at what it has kept."""

    function: Callable[..., Any]
    kept: Callable[[], Any]
    name: str
    """As the reason says it."""


def nonlocal_variable(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    last = None

    def keep(x: torch.Tensor) -> None:
        nonlocal last
        last = value(x, last)

    return Kept(keep, lambda: last, "last")


def nested_function(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    last = None

    def keep(x: torch.Tensor) -> None:
        def inner() -> None:
            nonlocal last
            last = value(x, last)

        inner()

    return Kept(keep, lambda: last, "last")


def default_argument(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    def keep(x: torch.Tensor, store: dict[str, Any] = {}) -> None:  # noqa: B006
        store["last"] = value(x, store.get("last"))

    store = {}
    keep.__defaults__ = (store,)
    return Kept(keep, lambda: store.get("last"), "default 0")


def keyword_default(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    store: list[Any] = [None]

    def keep(x: torch.Tensor, *, store: list[Any] = store) -> None:
        store[0] = value(x, store[0])

    return Kept(keep, lambda: store[0], "store")


def class_attribute(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    class Holder:
        last = None

    def keep(x: torch.Tensor) -> None:
        Holder.last = value(x, Holder.last)

    return Kept(keep, lambda: Holder.last, "last")


def module_global(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    global LAST
    LAST = None

    def keep(x: torch.Tensor) -> None:
        global LAST
        LAST = value(x, LAST)

    return Kept(keep, lambda: LAST, "LAST")


def global_list(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    ALL.clear()

    def keep(x: torch.Tensor) -> None:
        ALL.append(value(x, ALL[-1] if ALL else None))

    return Kept(keep, lambda: ALL[-1] if ALL else None, "ALL")


def global_object(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    STATE.last = None

    def keep(x: torch.Tensor) -> None:
        STATE.last = value(x, STATE.last)

    return Kept(keep, lambda: STATE.last, "last")


class Foreign:
    """Not one of the model's objects."""

    __slots__ = ("last", "value")

    def __init__(self, value: Callable[[torch.Tensor, Any], Any]) -> None:
        self.value, self.last = value, None

    def keep(self, x: torch.Tensor) -> None:
        self.last = self.value(x, self.last)

    def __call__(self, x: torch.Tensor) -> None:
        self.keep(x)


def bound_method(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    foreign = Foreign(value)
    return Kept(foreign.keep, lambda: foreign.last, "last")


def object_with_slots(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    foreign = Foreign(value)
    return Kept(foreign, lambda: foreign.last, "last")


def partial(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    store: deque[Any] = deque()

    def keep(into: deque[Any], x: torch.Tensor) -> None:
        into.append(value(x, into[-1] if into else None))

    return Kept(functools.partial(keep, store), lambda: store[-1] if store else None, "argument 0")


def function_attribute(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    def keep(x: torch.Tensor) -> None:
        keep.last = value(x, getattr(keep, "last", None))  # type: ignore[attr-defined]

    return Kept(keep, lambda: getattr(keep, "last", None), "last")


def decorated(value: Callable[[torch.Tensor, Any], Any]) -> Kept:
    inner = nonlocal_variable(value)
    return Kept(torch.no_grad()(inner.function), inner.kept, inner.name)


@dataclass
class Deep:
    """Further from the function than its code is followed: found by what holds the tensor alone."""

    next: Any = None
    kept: dict[str, Any] = field(default_factory=dict)


PLACES: dict[str, Callable[[Callable[[torch.Tensor, Any], Any]], Kept]] = {
    "a nonlocal variable": nonlocal_variable,
    "a nonlocal variable of a nested function": nested_function,
    "a default argument": default_argument,
    "a keyword's default": keyword_default,
    "a class attribute": class_attribute,
    "a global": module_global,
    "a global list": global_list,
    "an attribute of a global object": global_object,
    "the object of a bound method": bound_method,
    "an object with slots": object_with_slots,
    "a partial function's argument": partial,
    "an attribute of the function": function_attribute,
    "a decorated function's variable": decorated,
}
