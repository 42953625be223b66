"""Times the UNet calls of a pipeline from outside, by module hooks: the same for every way to run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.speed.measure import DeviceClock


class CallTimer:
    """Times every UNet call, without making the device wait.

    Attached once for all runs of an arm: `deepcache_fx` takes hooks for a part of the model, and captures anew where
    they change.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._spans: list[tuple[Any, Any]] = []
        self._start: Any = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        """Of the last call."""

    @contextmanager
    def attached(self, unet: torch.nn.Module) -> Iterator[CallTimer]:
        before = unet.register_forward_pre_hook(self._before, with_kwargs=True)
        after = unet.register_forward_hook(self._after)
        try:
            yield self
        finally:
            before.remove()
            after.remove()

    def take(self) -> list[float]:
        """Seconds of the calls since the last `take`, in order."""
        spans, self._spans = self._spans, []
        return self._clock.seconds(spans)

    def _before(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments = args, kwargs
        self._start = self._clock.mark()

    def _after(self, unet: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._spans.append((self._start, self._clock.mark()))
