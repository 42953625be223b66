"""What was captured, by structure and signature: as many as are wanted, the least recently used goes first.

A capture outlives the weights it was made with. Where the model's are other objects of the same kinds (a LoRA that is
patched in by making new parameters, `load_state_dict(assign=True)`), all entries are bound to them before one runs.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Protocol, Self, TypeVar

import torch
from torch import fx

from deepcache_fx.graph.capture import CAPTURE_LOCK
from deepcache_fx.graph.weights import Binding
from deepcache_fx.guards.fingerprint import Settings
from deepcache_fx.guards.model_state import ModelState
from deepcache_fx.runtime.sources import sources_forgotten


class Bindable(Protocol):
    """An entry (see `assemble.Entry`)."""

    binding: Binding | None
    weights: int

    def graphs(self) -> list[fx.GraphModule]:
        """All that hold weights."""

    def copies_weights(self) -> bool:
        """True where something else than these graphs may hold the values of weights."""

    def renewed(self, others: Collection[torch.Tensor]) -> Self:
        """The entry over other weights, which the graphs hold already."""

    def release(self) -> None:
        """Give recorded graphs back."""


E = TypeVar("E", bound=Bindable)


def is_at_hand(entries: Mapping[Hashable, E], settings: Settings | None, call: Hashable) -> bool:
    """True where there is an entry of these settings and this call, bound to the weights that they stand for."""
    if settings is None:
        return False
    entry = entries.get((settings.structure, call))
    return entry is not None and entry.weights == settings.weights


def find_or_make(
    entries: OrderedDict[Hashable, E],
    settings: Settings | None,
    call: Hashable,
    *,
    look: Callable[[], Settings],
    make: Callable[[], E],
    model_state: ModelState,
    module: torch.nn.Module,
    limit: int,
    rebound: Callable[[], object],
) -> tuple[Settings, E]:
    """The entry of these settings and this call, made now if there is none, under the lock that captures need.

    Args:
        entries: By (structure, call).
        settings: Of the module, as last seen.
        call: Its key.
        look: Gives the settings as they are: none is made under the name of settings that have changed since.
        make: Makes an entry.
        model_state: Knows the module's weights, as of the last look.
        module: What is captured.
        limit: How many entries there may be.
        rebound: Is called where entries were bound to other weights.

    Returns:
        The settings that the entry belongs to, and the entry.
    """
    key = (settings.structure, call) if settings is not None else None
    entry = entries.get(key)
    if settings is None or entry is None or entry.weights != settings.weights:
        dropped: list[E] = []
        try:
            with CAPTURE_LOCK, sources_forgotten():
                settings = look()
                if _bind_all(entries, settings, model_state, module, dropped):
                    rebound()
                key = (settings.structure, call)
                entry = entries.get(key)  # another thread may have been first
                if entry is None:
                    entry = make()
                    entry.binding = Binding(entry.graphs(), model_state.weights())
                    entry.weights = settings.weights
                    entries[key] = entry
                    while len(entries) > limit:
                        dropped.append(entries.popitem(last=False)[1])
                model_state.note_values()
        finally:
            for old in dropped:  # not under the lock, which recorded programs take after their own
                old.release()
    elif len(entries) > 1:
        with CAPTURE_LOCK:
            if key in entries:
                entries.move_to_end(key)
    return settings, entry


def _bind_all(
    entries: OrderedDict[Hashable, E],
    settings: Settings,
    model_state: ModelState,
    module: torch.nn.Module,
    dropped: list[E],
) -> bool:
    """Bind the entries of the model's present structure to its present weights; true where those are others.

    Not only the one that is asked for: the others would keep the weights before alive. So would entries of another
    structure over weights that the model no longer has: let go of those.
    """
    weights = model_state.weights()
    live = set(map(id, weights))
    is_rebound = False
    for key, entry in list(entries.items()):
        assert isinstance(key, tuple)
        assert entry.binding is not None
        if key[0] != settings.structure:
            if not entry.binding.all_in(live):
                dropped.append(entries.pop(key))
            continue
        if entry.weights == settings.weights:
            continue
        others = entry.binding.replaced(weights)
        if others or entry.copies_weights():
            dropped.append(entry)
            try:
                entry.binding.bind(weights)
                entries[key] = renewed = entry.renewed(others.values())
                renewed.binding = Binding(renewed.graphs(), weights)
            except BaseException as error:  # of its graphs some may hold others by now
                del entries[key]
                if not isinstance(error, Exception):
                    raise
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"{type(module).__name__} is captured anew for other weights: {reason}", stacklevel=2)
                continue
            renewed.weights = settings.weights
            is_rebound = is_rebound or bool(others)
        else:
            entry.weights = settings.weights
    return is_rebound
