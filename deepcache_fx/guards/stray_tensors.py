"""Whether a FakeTensor has left a capture: which of those still alive is held by something else than the graph.

`torch.export` runs forward on tensors without values. What forward keeps of them would stay in the user's objects, and
end up in images. `reached_code` finds most places beforehand; here none is missed, for all living objects are asked.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from deepcache_fx.guards.namespaces import instance, is_library

_META = ("tensor_meta", "from_node", "stack_trace", "nn_module_stack", "torch_fn", "original_aten")
_ANONYMOUS = (dict, list, tuple, set, frozenset, deque, types.CellType, types.MethodType, functools.partial)
_MANY = 32
_HEIGHT = 6


def remove_strays(graph: fx.GraphModule) -> list[str]:
    """Take the capture's FakeTensors away from everything that is neither the graph nor PyTorch; who held them.

    Lists and dictionaries lose such items, variables their value: what was there before is not known.
    """
    mode = _mode_of(graph)
    if mode is None or not _suspects(mode):
        return []
    gc.collect()  # cycles that nothing holds
    suspects = _suspects(mode)[:_MANY]
    with _thawed():
        holders = [holder for tensor in suspects for holder in _holders(tensor, suspects)]
    return sorted(set(holders))


@contextmanager
def _thawed() -> Iterator[None]:
    """The collector finds holders among all objects: among those, too, that `gc.freeze` took out of its sight."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            gc.freeze()


def _mode_of(graph: fx.GraphModule) -> FakeTensorMode | None:
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            mode: FakeTensorMode = node.meta["val"].fake_mode
            return mode
    return None


def _suspects(mode: FakeTensorMode) -> list[FakeTensor]:
    """Those that have more references than graphs, and the mode itself, account for."""
    everything = gc.get_objects()
    tensors = [item for item in everything if type(item) is FakeTensor and item.fake_mode is mode]
    metas = [item for item in everything if type(item) is dict and _is_meta(item)]
    del everything
    known: Counter[int] = Counter()
    for meta in metas:
        _count(meta, known)
    if mode.shape_env is not None:
        known.update(id(tracked.fake) for tracked in mode.shape_env.tracked_fakes or ())
    nothing = object()
    (base,) = [sys.getrefcount(item) - 1 for item in [nothing]]
    return [tensor for tensor in tensors if sys.getrefcount(tensor) - base > known[id(tensor)]]


def _is_meta(value: dict[Any, Any]) -> bool:
    """True for what `torch.fx` notes of a node."""
    return "val" in value and any(key in value for key in _META)


def _count(value: Any, known: Counter[int]) -> None:
    if type(value) is FakeTensor:
        known[id(value)] += 1
    elif isinstance(value, (list, tuple)):
        for item in value:
            _count(item, known)
    elif isinstance(value, dict):
        for item in value.values():
            _count(item, known)


def _holders(tensor: FakeTensor, ours: Any) -> Iterable[str]:
    """Who holds a tensor, up through containers, without PyTorch; it is taken away from them."""
    referrers = gc.get_referrers(tensor)
    for referrer in referrers:
        if referrer is ours or _is_own_frame(referrer):
            continue
        owners = list(_owners(referrer, {id(ours), id(referrers)}, _HEIGHT))
        foreign = [label for label in owners if label]
        if foreign or not owners:
            _take_away(tensor, referrer)
            yield from foreign or [f"a {type(referrer).__name__}"]


def _owners(holder: Any, seen: AbstractSet[int], height: int) -> Iterable[str]:
    """Of a container: what holds it. An empty string for PyTorch and other libraries."""
    seen = seen | {id(holder)}
    if isinstance(holder, types.FrameType):
        name = str(holder.f_globals.get("__name__"))
        yield "" if is_library(name) else f"running code of {name}"
    elif isinstance(holder, types.ModuleType):
        yield "" if is_library(holder.__name__) else f"the module {holder.__name__}"
    elif isinstance(holder, types.FunctionType):
        yield "" if is_library(holder.__module__) else f"the function {holder.__qualname__}"
    elif isinstance(holder, type):
        yield "" if is_library(holder.__module__) else f"the class {holder.__name__}"
    elif isinstance(holder, torch.Tensor) or (isinstance(holder, dict) and _is_meta(holder)):
        yield ""  # of a tensor that wraps others, its own stand-in does
    elif not isinstance(holder, _ANONYMOUS) or (isinstance(holder, dict) and type(holder) is not dict):
        yield "" if type(holder).__module__.partition(".")[0] == "torch" else f"a {type(holder).__name__}"
    elif isinstance(holder, dict) and "__name__" in holder and "__builtins__" in holder:
        name = str(holder["__name__"])
        yield "" if is_library(name) else f"the module {name}"
    elif height:
        found = gc.get_referrers(holder)
        ours = seen | {id(found)}
        for index in range(min(len(found), _MANY)):
            if id(found[index]) not in seen and not _is_own_frame(found[index]):
                yield from _owners(found[index], ours, height - 1)


def _is_own_frame(value: object) -> bool:
    return isinstance(value, types.FrameType) and value.f_globals.get("__name__") == __name__


def _take_away(tensor: FakeTensor, holder: Any) -> None:
    if isinstance(holder, dict):
        for key in [key for key, value in holder.items() if value is tensor]:
            del holder[key]
    elif isinstance(holder, (list, deque)):
        kept = [value for value in holder if value is not tensor]
        holder.clear()
        holder.extend(kept)
    elif isinstance(holder, set):
        holder.discard(tensor)
    elif isinstance(holder, types.CellType):
        del holder.cell_contents
    elif type(holder).__name__ == "_lru_list_elem":
        for memo in gc.get_objects():
            if isinstance(memo, functools._lru_cache_wrapper) and any(holder is x for x in gc.get_referents(memo)):
                memo.cache_clear()
    elif not isinstance(holder, (tuple, frozenset, types.FrameType, types.MethodType, functools.partial)):
        own = instance(holder)
        for name in [name for name, value in own.items().items() if value is tensor]:
            own.remove(name)
