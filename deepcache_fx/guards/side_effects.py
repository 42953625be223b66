"""What a model's forward does besides returning a result: a graph of it would not, so such a model runs itself.

Attention processors that keep their maps for the pipeline (self-attention guidance), recording hooks, counters.
"""

from __future__ import annotations

import operator
import types
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx

from deepcache_fx.errors import Uncapturable
from deepcache_fx.guards.fingerprint import NOT_STATE, Same
from deepcache_fx.guards.namespaces import Namespace, instance
from deepcache_fx.guards.reached_code import CONTAINERS, Reached
from deepcache_fx.guards.stray_tensors import remove_strays

_Holder = tuple[Hashable, str]
"""What kind of thing, and the name in it: a class and an attribute of its instances, code and a variable of it."""

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)

_DEPTH = 6
_MANY = 10_000


class Watched:
    """A capture that is under way: whoever makes it says what came of it."""

    def __init__(self, before: _Memory) -> None:
        self._before: _Memory | None = before
        self.graph: fx.GraphModule | None = None
        self.written: list[_Written] = []
        """What forward itself left behind: `torch.export` gives attributes that were there the values that they had."""

    def traced(self) -> None:
        """The model's forward has returned, and nobody has tidied up behind it yet."""
        if self._before is not None:
            self.written = self._before.written()

    def over(self) -> None:
        """The capture is made: what it called `traced` by may live on in a cycle, and is to keep nothing alive."""
        self._before = self.graph = None
        self.written = []

    def captured(self, graph: fx.GraphModule) -> None:
        """The graph: it may hold FakeTensors of the capture, nothing else may."""
        self.graph = graph


class SideEffects:
    """Refuses to capture where forward was seen to write into Python objects: the model's, or others that it reaches.

    A tensor that forward leaves there is enough. A plain value may be written once, as by a model that prepares
    something at its first call; the second time it is refused.
    """

    def __init__(self) -> None:
        self._written: set[_Holder] = set()
        self._refused: dict[_Holder, str] = {}
        self._strays: dict[frozenset[types.CodeType], str] = {}
        """By all of the code that forward reaches: who held a FakeTensor after its capture."""
        self.doubts = 0
        """How often a plain value was written where the model's settings do not show it: to be captured once more."""

    @contextmanager
    def watching(
        self, module: torch.nn.Module, objects: Iterable[object], also: Iterable[object] = ()
    ) -> Iterator[Watched]:
        """Raise an Uncapturable where the block, a capture, leaves something behind, and put back what was there.

        Args:
            module: The model.
            objects: Every object of the model with attributes, itself and its submodules among them.
            also: Whatever else the block may call or write into: functions that are arguments of the call, say.
        """
        objects = list(objects)
        _refuse_hooks(module)
        reached = Reached(also, objects, NOT_STATE)
        own = [instance(item, NOT_STATE) for item in objects]
        self._refuse_known(own, reached)
        before = _Memory([*own, *reached.namespaces])
        sizes = [memo.cache_info() for memo in reached.memos]
        watched = Watched(before)
        try:
            yield watched
        except BaseException:
            before.bring_back()
            watched.over()
            raise
        finally:
            for memo, size in zip(reached.memos, sizes, strict=True):
                if memo.cache_info() != size:
                    memo.cache_clear()  # it may remember results without values
        keys, anew, graph = {space.key for space in own}, _made_anew(objects), watched.graph
        traced = [item for item in watched.written if item.space.key in keys and item.holder not in anew]
        watched.over()
        for item in traced:
            if not item.holds_tensor and item.is_there:
                item.space.put(item.name, item.value)  # as after a call of the model: the next capture sees it
        reason = self._judge(before, keys, traced)
        strays = remove_strays(graph) if graph is not None else []
        if strays and reason is None:
            before.bring_back()
            reason = self._strays[frozenset(reached.codes)] = _sentence(" and ".join(strays), None)
        if reason is not None:
            raise Uncapturable(reason)

    def _refuse_known(self, own: Iterable[Namespace], reached: Reached) -> None:
        if not self._refused and not self._strays:
            return
        keys = {space.key for space in (*own, *reached.namespaces)}
        reasons = [reason for (key, _), reason in self._refused.items() if key in keys]
        reasons += [self._strays[codes] for codes in [frozenset(reached.codes)] if codes in self._strays]
        if reasons:
            raise Uncapturable(reasons[0])

    def _judge(self, before: _Memory, own: set[Hashable], traced: Iterable[_Written]) -> str | None:
        """Why the capture counts for nothing, if so: then all is as it was."""
        written = [*before.written(), *traced]
        if not written:
            before.bring_back()  # a scale that was multiplied and divided again, but for rounding
            return None
        refused = {
            item.holder: _sentence(item.space.label, item.name)
            for item in written
            if item.holds_tensor or item.holder in self._written
        }
        if refused:
            before.bring_back()
            self._refused |= refused
            return next(iter(refused.values()))
        self._written.update(item.holder for item in written)
        self.doubts += any(item.space.key not in own for item in written)
        return None


def _refuse_hooks(module: torch.nn.Module) -> None:
    hooks = [
        (f"layer {name}", hook)
        for name, sub in module.named_modules()
        if name
        for hook in (*sub._forward_hooks.values(), *sub._forward_pre_hooks.values())
    ]
    everywhere = torch.nn.modules.module
    for found in (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks):
        hooks += [("every layer", hook) for hook in found.values()]
    for place, hook in hooks:
        origin = getattr(hook, "__module__", type(hook).__module__)  # torch's own, as weight_norm's, is pure
        if not str(origin).startswith("torch."):
            label = getattr(hook, "__qualname__", type(hook).__name__)
            raise Uncapturable(f"{place} has a forward hook ({label}), which a graph would not call")


def _made_anew(objects: Iterable[object]) -> set[_Holder]:
    """What PyTorch's own hooks write before every forward: weight_norm's weight, say."""
    return {
        (instance(item, NOT_STATE).key, hook.name)
        for item in objects
        if isinstance(item, torch.nn.Module)
        for hook in item._forward_pre_hooks.values()
        if hasattr(hook, "name")
    }


def _sentence(label: str, name: str | None) -> str:
    what = "" if name is None else f" ({name})"
    return f"{label} keeps something of each call{what}, which a graph would not"


class _Written(NamedTuple):
    """A name that stands for something else than before, or for nothing."""

    space: Namespace
    name: str
    value: Any
    is_there: bool
    holds_tensor: bool

    @property
    def holder(self) -> _Holder:
        return self.space.key, self.name


class _Memory:
    """What some names stand for, down through lists and dictionaries, as it is now."""

    def __init__(self, namespaces: Iterable[Namespace]) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._before = [
            (space, {name: (value, _state(value, self._containers)) for name, value in space.items().items()})
            for space in namespaces
        ]

    def written(self) -> list[_Written]:
        """What has changed since."""
        found = []
        for space, before in self._before:
            now = space.items()
            for name in [name for name in before if name not in now]:
                found.append(_Written(space, name, None, False, False))
            for name, value in now.items():
                if name not in before or before[name][1] != _state(value, {}):
                    found.append(_Written(space, name, value, True, _holds_tensor(value)))
        return found

    def bring_back(self) -> None:
        for space, before in self._before:
            now = space.items()
            for name in [name for name in now if name not in before]:
                space.remove(name)
            for name, (value, _) in before.items():
                if name not in now or now[name] is not value:
                    space.put(name, value)
        for container, copy in self._containers.values():
            if not _same_items(container, copy):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(copy)


def _same_items(container: Any, copy: Any) -> bool:
    if isinstance(container, dict):
        return _same_items(list(container), list(copy)) and _same_items(list(container.values()), list(copy.values()))
    if isinstance(container, set):
        return bool(container == copy)
    return len(container) == len(copy) and all(map(operator.is_, container, copy))


def _state(value: Any, containers: dict[int, tuple[Any, Any]], depth: int = _DEPTH) -> object:
    """Equal for equal plain values (floats: to 12 digits) and the same objects; notes lists and dictionaries."""
    if isinstance(value, (bool, int, str)):
        return (type(value), value)
    if isinstance(value, float):
        return f"{value:.12g}"
    if not isinstance(value, (*CONTAINERS, tuple)) or depth == 0 or len(value) > _MANY:
        return Same(value)
    if not isinstance(value, tuple) and type(value) in CONTAINERS:
        containers[id(value)] = (value, value.copy())
    if isinstance(value, dict):
        return tuple((Same(key), _state(item, containers, depth - 1)) for key, item in value.items())
    if isinstance(value, set):
        return frozenset(_state(item, containers, depth - 1) for item in value)
    return tuple(_state(item, containers, depth - 1) for item in value)


def _holds_tensor(value: Any, depth: int = _DEPTH) -> bool:
    """True for tensors, and symbols that stand for a tensor's values, down through objects that were made of them."""
    if isinstance(value, (torch.Tensor, *_SYMBOLS)):
        return True
    if depth == 0 or isinstance(value, (torch.nn.Module, type, types.ModuleType)):
        return False
    if isinstance(value, types.FunctionType):
        inner: Iterable[Any] = [cell.cell_contents for cell in value.__closure__ or ()]
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple, set, deque)):
        inner = value
    else:
        inner = getattr(value, "__dict__", {}).values()
    return any(_holds_tensor(item, depth - 1) for item in list(inner))
