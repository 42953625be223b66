"""What recording uses of `torch.cuda`, for the CPU: as unforgiving where a recording fails as CUDA is.

Written after ATen/cuda/CUDAGraph.cpp, CUDAGeneratorImpl.cpp and CUDACachingAllocator.h: `capture_end` throws before it
ends the allocation to the pool, which is then refused to every later recording; generators stay in their recording
state; the stream is whichever was entered last and not left. Nothing is launched: a program tells what it does by
`launch`, `wait` (as `.item()`) and `draw` (as `torch.randn`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

Pool = tuple[int, int]


class Stream:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda_stream = number
        self.cuda = cuda
        self.waited_for: list[int] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other.cuda_stream)

    def synchronize(self) -> None:
        self.cuda.synchronize()


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.pool: Pool | None = None
        self.launches = 0
        self.is_invalid = self.has_ended = False
        self.was_reset = False

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        cuda = self.cuda
        self.pool, self.stream = pool or cuda.new_pool(), cuda.stream
        cuda.uses[self.pool] = cuda.uses.get(self.pool, 0) + 1
        if self.pool in cuda.recorded_to:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        cuda.recorded_to.append(self.pool)
        assert self.stream.cuda_stream != 0, "CUDA graphs must be captured on a non-default stream."
        cuda.recorded[self.stream.cuda_stream] = self
        cuda.generator_is_recorded = True

    def capture_end(self) -> None:
        cuda = self.cuda
        assert cuda.stream is self.stream, "Capture must end on the same stream it began on."
        del cuda.recorded[self.stream.cuda_stream]
        if self.is_invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        assert self.pool is not None
        cuda.end_allocation(0, self.pool)
        cuda.generator_is_recorded = False
        self.has_ended = True
        if cuda.fails_to_instantiate:
            cuda.fails_to_instantiate = False
            raise torch.OutOfMemoryError("CUDA error: out of memory")

    def replay(self) -> None:
        assert self.has_ended
        assert not self.was_reset
        self.cuda.replays += 1

    def reset(self) -> None:
        if self.has_ended and not self.was_reset:
            assert self.pool is not None
            self.cuda.release(0, self.pool)
        self.was_reset = True


@dataclass
class FakeCuda:
    """The state of a process."""

    device: int = 0
    uses: dict[Pool, int] = field(default_factory=dict)
    """How many graphs hold each pool."""
    recorded_to: list[Pool] = field(default_factory=list)
    recorded: dict[int, Graph] = field(default_factory=dict)
    """By stream."""
    generator_is_recorded: bool = False
    fails_to_instantiate: bool = False
    replays: int = 0
    pools: int = 0
    streams: int = 0
    frees: int = 0
    asked: list[int] = field(default_factory=list)
    """Of which devices it was asked whether the current stream is being recorded."""

    def __post_init__(self) -> None:
        self.default = self.stream = Stream(self, 0)

    # What a program does.

    def launch(self) -> None:
        graph = self.recorded.get(self.stream.cuda_stream)
        if graph is not None:
            graph.launches += 1

    def wait(self) -> None:
        graph = self.recorded.get(self.stream.cuda_stream)
        if graph is not None:
            graph.is_invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    def draw(self) -> None:
        is_recorded = self.stream.cuda_stream in self.recorded
        if self.generator_is_recorded and not is_recorded:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    # What recording calls.

    def new_pool(self) -> Pool:
        self.pools += 1
        return 0, self.pools

    def new_stream(self) -> Stream:
        self.streams += 1
        return Stream(self, self.streams)

    def synchronize(self) -> None:
        assert self.stream.cuda_stream not in self.recorded

    def end_allocation(self, device: int, pool: Pool) -> None:
        if pool not in self.recorded_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recorded_to.remove(pool)

    def release(self, device: int, pool: Pool) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "a pool is given back twice"

    def is_recording(self) -> bool:
        self.asked.append(self.device)
        return self.device == 0 and self.stream.cuda_stream in self.recorded

    def empty_cache(self) -> None:
        self.frees += 1

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, torch.device(device).index or 0
        try:
            yield
        finally:
            self.device = before

    @property
    def is_as_before(self) -> bool:
        """True where the next recording, allocation and random number find nothing left over."""
        return not self.recorded_to and not self.recorded and not self.generator_is_recorded


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put a fake in the place of what recording uses of `torch.cuda`."""
    cuda = FakeCuda()
    zeros = torch.zeros
    for owner, name, value in (
        (torch.cuda, "CUDAGraph", lambda: Graph(cuda)),
        (torch.cuda, "Stream", cuda.new_stream),
        (torch.cuda, "stream", cuda.on_stream),
        (torch.cuda, "device", cuda.on_device),
        (torch.cuda, "current_device", lambda: cuda.device),
        (torch.cuda, "current_stream", lambda device=None: cuda.stream),
        (torch.cuda, "graph_pool_handle", cuda.new_pool),
        (torch.cuda, "synchronize", cuda.synchronize),
        (torch.cuda, "empty_cache", cuda.empty_cache),
        (torch._C, "_cuda_endAllocateToPool", cuda.end_allocation),
        (torch._C, "_cuda_releasePool", cuda.release),
        (torch._C, "_cuda_isCurrentStreamCapturing", cuda.is_recording),
        (torch._C, "_cuda_getCurrentRawStream", lambda device: cuda.stream.cuda_stream),
        (torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options)),
    ):
        monkeypatch.setattr(owner, name, value, raising=False)
    return cuda
