"""What happens inside one UNet call: kernels, launches, gaps and, on a CPU, memory.

As torch.profiler sees them; of OpenVINO's programs, as its own counters do.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.speed.measure import synchronize
from deepcache_fx.execution.openvino import NodeTime


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel (on a CPU: calls of one operator) within one UNet call."""

    name: str
    count: int
    seconds: float


@dataclass(frozen=True)
class CallProfile:
    """One UNet call seen by torch.profiler."""

    kernels: tuple[KernelTime, ...]
    """Longest first. On a CPU, operators by the time not spent in operators they call."""
    count: int
    """Device kernels, copies and fills; on a CPU, ATen operators that no other ATen operator called."""
    launches: int
    """Runtime calls that put work on the device; zero on a CPU."""
    span: float
    """Seconds from the start of the first kernel to the end of the last (on a CPU: of the call)."""
    busy: float
    """Seconds of it in which a kernel ran; the rest is gaps."""
    peak_bytes: int | None
    """Allocated during the call at the worst moment (on a CPU only)."""

    @property
    def gaps(self) -> float:
        return max(0.0, self.span - self.busy)


class CallProfiler:
    """Profiles the UNet calls of these numbers. Their times include the profiler's own."""

    def __init__(self, device: torch.device, indices: tuple[int, ...]) -> None:
        self._device = device
        self._indices = indices
        self.profiles: dict[int, CallProfile] = {}

    def __call__(self, index: int, function: Callable[[], Any]) -> Any:
        if index not in self._indices:
            return function()
        result, self.profiles[index] = profile_call(function, self._device)
        return result


def profile_call(function: Callable[[], Any], device: torch.device) -> tuple[Any, CallProfile]:
    """Run a function under torch.profiler."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    synchronize(device)
    with torch.profiler.profile(activities=activities, profile_memory=not on_gpu) as profiler:
        started = time.perf_counter()
        result = function()
        synchronize(device)
        wall = time.perf_counter() - started
    events = list(profiler.events() or [])
    return result, _device_profile(events) if on_gpu else _operator_profile(events, wall, _peak_bytes(profiler))


def _device_profile(events: list[Any]) -> CallProfile:
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    counts = Counter(e.name for e in kernels)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in kernels:
        seconds[event.name] += event.time_range.elapsed_us() / 1e6
    return CallProfile(
        kernels=_longest_first(counts, seconds),
        count=len(kernels),
        launches=sum(_is_launch(e.name) for e in events if e.device_type == DeviceType.CPU),
        span=(max(end for _, end in spans) - spans[0][0]) / 1e6 if spans else 0.0,
        busy=_union(spans) / 1e6,
        peak_bytes=None,
    )


def _is_launch(name: str) -> bool:
    return name.startswith(("cuda", "cu")) and any(part in name for part in ("Launch", "MemcpyAsync", "MemsetAsync"))


def _operator_profile(events: list[Any], wall: float, peak: int | None) -> CallProfile:
    operators = [e for e in events if e.device_type == DeviceType.CPU and not e.name.startswith("[")]
    counts = Counter(e.name for e in operators)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in operators:
        seconds[event.name] += event.self_cpu_time_total / 1e6
    return CallProfile(
        kernels=_longest_first(counts, seconds),
        count=sum(_is_outermost(event) for event in operators),
        launches=0,
        span=wall,
        busy=min(wall, sum(time for name, time in seconds.items() if name.startswith(("aten::", "mkldnn::")))),
        peak_bytes=peak,
    )


def _is_outermost(event: Any) -> bool:
    if not event.name.startswith("aten::"):
        return False
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return False
        parent = parent.cpu_parent
    return True


def _longest_first(counts: Counter[str], seconds: dict[str, float]) -> tuple[KernelTime, ...]:
    rows = [KernelTime(name, counts[name], seconds[name]) for name in counts]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def node_profile(nodes: Sequence[NodeTime], span: float) -> CallProfile:
    """What OpenVINO counted of one call, which took `span` seconds with the host's part. Attention is told apart."""
    counts: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for node in nodes:
        name = f"attention, {node.kind}" if "attention" in node.of else node.kind
        counts[name] += 1
        seconds[name] += node.seconds
    busy = sum(seconds.values())
    return CallProfile(_longest_first(counts, seconds), counts.total(), 0, span, min(span, busy), None)


def _union(spans: list[tuple[float, float]]) -> float:
    """Total length of the union of intervals sorted by start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def _peak_bytes(profiler: Any) -> int | None:
    """The highest running sum of allocations minus releases."""
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
