"""Whether a capture is to serve many sizes: what was asked for, what has been met, what could not be captured."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from deepcache_fx.graph.signature import Call
from deepcache_fx.graph.sizes import family, free_axes, sizes_of
from deepcache_fx.options import Options


class SizesMet:
    """Of one runtime. Calls are of one family where they differ in their sizes alone."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._first: dict[Hashable, tuple[torch.Size, ...]] = {}
        self._refused: dict[Hashable, str] = {}
        self._lines: dict[str, None] = {}

    def want_symbols(self, call: Call) -> bool:
        """True where a capture for this call is to serve other sizes, too: it is about to be made."""
        if self._options.dynamic is False or not any(map(free_axes, call.tensors)):
            return False
        of_family, sizes = family(call), sizes_of(call)
        is_second = self._first.setdefault(of_family, sizes) != sizes
        if of_family in self._refused or not (self._options.dynamic is True or is_second):
            return False
        if self._options.passes:
            self.refuse(call, "passes of one's own are given numbers for sizes")
            return False
        return True

    def note(self, call: Call) -> None:
        """Programs for this call may come from elsewhere: another size is the second one."""
        self._first.setdefault(family(call), sizes_of(call))

    def captured(self, sizes: str) -> None:
        """A capture was made for the sizes that this describes."""
        when = "at the second size" if self._options.dynamic == "auto" else "dynamic=True"
        self._lines[f"one capture for many sizes ({when}): {sizes}"] = None

    def refuse(self, call: Call, reason: str) -> None:
        """Have every call of this family be captured by itself from now on."""
        self._refused[family(call)] = reason
        self._lines[f"a capture for each size: {reason}"] = None

    def lines(self) -> tuple[str, ...]:
        """What came of it, for a reader."""
        return tuple(self._lines)
