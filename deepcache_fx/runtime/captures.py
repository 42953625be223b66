"""What was captured, by structure and signature: as many as are wanted, the least recently used goes first.

A capture outlives the weights it was made with. Where the model's are other objects of the same kinds (a LoRA that is
patched in by making new parameters, `load_state_dict(assign=True)`), all entries are bound to them before one runs.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Protocol, Self, TypeVar

import torch
from torch import fx

from deepcache_fx.graph.capture import CAPTURE_LOCK, Captured
from deepcache_fx.graph.signature import Call
from deepcache_fx.graph.weights import Binding
from deepcache_fx.guards.fingerprint import Settings
from deepcache_fx.guards.model_state import ModelState
from deepcache_fx.runtime.sources import sources_forgotten


class Bindable(Protocol):
    """An entry (see `assemble.Entry`)."""

    binding: Binding | None
    weights: int
    source: str | None
    captured: Captured

    def graphs(self) -> list[fx.GraphModule]:
        """All that hold weights."""

    def copies_weights(self) -> bool:
        """True where something else than these graphs may hold the values of weights."""

    def renewed(self, others: Collection[torch.Tensor]) -> Self:
        """The entry over other weights, which the graphs hold already."""

    def at(self, call: Call) -> Self | None:
        """The entry of the same capture for a call of other sizes; None where the capture does not serve those."""

    def release(self) -> None:
        """Give recorded graphs back."""


E = TypeVar("E", bound=Bindable)


class Captures(OrderedDict[Hashable, E]):
    """Entries by (structure, call), the least recently used first.

    Args:
        limit: How many there may be.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self.made = 0
        """How many there have been."""
        self.captured = 0
        """How many of them were captured; others were loaded, or are of a capture that serves many sizes."""
        self.rebound = 0
        """How often entries were bound to other weights."""

    def is_at_hand(self, settings: Settings, call: Call) -> bool:
        """True where there is an entry of these settings and this call, bound to the weights that they stand for."""
        entry = self.get((settings.structure, call.key))
        return entry is not None and entry.weights == settings.weights

    def find_or_make(
        self,
        settings: Settings,
        call: Call,
        model_state: ModelState,
        module: torch.nn.Module,
        make: Callable[[torch.nn.Module, Call], E],
    ) -> tuple[Settings, E]:
        """The entry of these settings and this call, made now if there is none, under the lock that captures need.

        None is made under the name of settings that have changed since `model_state` looked at the module.

        Returns:
            The settings that the entry belongs to, and the entry.
        """
        key = (settings.structure, call.key)
        entry = self.get(key)
        if entry is None or entry.weights != settings.weights:
            dropped: list[E] = []
            try:
                with CAPTURE_LOCK, sources_forgotten():
                    settings = model_state.settings(module, call.sample.device, at_run_start=True)
                    self.rebound += _bind_all(self, settings, model_state, module, dropped)
                    key = (settings.structure, call.key)
                    entry = self.get(key)  # another thread may have been first
                    if entry is None:
                        entry = self._of_other_sizes(settings, call)
                        if entry is None:
                            entry = make(module, call)
                            self.captured += entry.source is None
                        entry.binding = Binding(entry.graphs(), model_state.weights())
                        entry.weights = settings.weights
                        self[key] = entry
                        self.made += 1
                        while len(self) > self._limit:
                            dropped.append(self.popitem(last=False)[1])
                    model_state.note_values()
            finally:
                for old in dropped:  # not under the lock, which recorded programs take after their own
                    old.release()
        elif len(self) > 1:
            with CAPTURE_LOCK:
                if key in self:
                    self.move_to_end(key)
        return settings, entry

    def give_up(self, key: Hashable) -> None:
        """Let go of one, if it is there."""
        with CAPTURE_LOCK:
            old = self.pop(key, None)
        if old is not None:
            old.release()

    def release(self) -> None:
        """Let go of all of them, and give back what they hold on the device."""
        with CAPTURE_LOCK:
            dropped = list(self.values())
            self.clear()
        for old in dropped:  # not under the lock, as above
            old.release()

    def _of_other_sizes(self, settings: Settings, call: Call) -> E | None:
        """The entry of a capture that is here, and serves the sizes of this call as well."""
        others = [other for key, other in self.items() if isinstance(key, tuple) and key[0] == settings.structure]
        return next((found for other in reversed(others) if (found := other.at(call)) is not None), None)


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
    renewed_captures: set[int] = set()
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
            if id(entry.captured) in renewed_captures:  # of that one it is made again when it is asked for
                del entries[key]
                continue
            renewed_captures.add(id(entry.captured))
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
