"""Clocks and memory around single UNet calls and whole runs, on CUDA and on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

UNetCall = Callable[[int, Callable[[], Any]], Any]
"""Makes call number `index` of a run, `function()`, and returns its result: this is where a run is observed."""


def plainly(index: int, function: Callable[[], Any]) -> Any:
    """Makes the call and observes nothing."""
    return function()


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds from an idle device to an idle device, and the result."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result


class DeviceClock:
    """Tells times without making the device wait: by CUDA events, or by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """A point in time: that of the device, once it has done what was asked of it before."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        """From the first to the second mark of each; waits for the device."""
        synchronize(self._device)
        if self._device.type != "cuda":
            return [end - start for start, end in spans]
        return [start.elapsed_time(end) / 1e3 for start, end in spans]


class StepTimer:
    """Times every UNet call of a run without making the device wait."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._spans: list[tuple[Any, Any]] = []

    def __call__(self, index: int, function: Callable[[], Any]) -> Any:
        start = self._clock.mark()
        result = function()
        self._spans.append((start, self._clock.mark()))
        return result

    def seconds(self) -> list[float]:
        """One per call, in order."""
        return self._clock.seconds(self._spans)


class HostTimer:
    """Times the host's part of every UNet call: from the call on an idle device until it returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []

    def __call__(self, index: int, function: Callable[[], Any]) -> Any:
        synchronize(self._device)
        started = time.perf_counter()
        result = function()
        self.seconds.append(time.perf_counter() - started)
        return result


# Memory on CUDA. On a CPU see kernels.CallProfile.peak_bytes.


@dataclass(frozen=True)
class Memory:
    """What the CUDA allocator holds, now and at most since `reset_peak`. Zeros on a CPU."""

    allocated: int
    reserved: int
    peak: int


def memory(device: torch.device) -> Memory:
    if device.type != "cuda":
        return Memory(0, 0, 0)
    torch.cuda.synchronize(device)
    return Memory(
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
    )


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
