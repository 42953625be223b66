"""What was captured, by settings and signature: as many as are wanted, the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Protocol, TypeVar

import torch

from deepcache_fx.graph.capture import CAPTURE_LOCK, Captured
from deepcache_fx.runtime.sources import sources_forgotten


class Releasable(Protocol):
    captured: Captured

    def release(self) -> None:
        """Give recorded graphs back."""


E = TypeVar("E", bound=Releasable)


def find_or_make(
    entries: OrderedDict[Hashable, E],
    settings: Hashable,
    call: Hashable,
    *,
    look: Callable[[], Hashable],
    make: Callable[[], E],
    keep_only: Callable[[Collection[int]], object],
    module: torch.nn.Module,
    limit: int,
) -> tuple[Hashable, E]:
    """The entry of these settings and this call, made now if there is none, under the lock that captures need.

    Args:
        entries: By (settings, call).
        settings: Of the module, as last seen.
        call: Its key.
        look: Gives the settings as they are: none is made under the name of settings that have changed since.
        make: Makes an entry.
        keep_only: Is told the ids of the parameters that the module has, before an entry is made.
        module: What is captured.
        limit: How many entries there may be.

    Returns:
        The settings that the entry belongs to, and the entry.
    """
    entry = entries.get((settings, call))
    if entry is None:
        dropped: list[E] = []
        try:
            with CAPTURE_LOCK:
                settings = look()
                key = (settings, call)
                entry = entries.get(key)  # another thread may have been first
                if entry is None:
                    live = {id(p) for p in module.parameters()}
                    keep_only(live)
                    dropped += _with_replaced_weights(entries, live)
                    with sources_forgotten():
                        entry = entries[key] = make()
                    while len(entries) > limit:
                        dropped.append(entries.popitem(last=False)[1])
        finally:
            for old in dropped:  # not under the lock, which recorded programs take after their own
                old.release()
    elif len(entries) > 1:
        with CAPTURE_LOCK:
            if (settings, call) in entries:
                entries.move_to_end((settings, call))
    return settings, entry


def _with_replaced_weights(entries: OrderedDict[Hashable, E], live: Collection[int]) -> list[E]:
    """Programs over parameters that the module no longer has can never run again: let go of those."""
    replaced = [key for key, e in entries.items() if any(id(p) not in live for p in e.captured.graph.parameters())]
    return [entries.pop(key) for key in replaced]
