"""Record a CUDA graph; where that fails, leave the process as it was before.

`torch.cuda.graph` does not: where a program does what may not be recorded (`.item()`, say) `CUDAGraph.capture_end`
throws at `cudaStreamEndCapture`. What it would have done then is left undone (ATen/cuda/CUDAGraph.cpp):

- the stream is not left: the thread goes on on the stream of the recording;
- the memory pool counts as being recorded to: every later recording into it fails, and while any recording is under
  way the allocator keeps memory back that several streams have used;
- random number generators count as being recorded: `torch.randn` on the device raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

Pool = tuple[int, int]
"""What `torch.cuda.graph_pool_handle` returns."""

_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording failed: the host's allocator may go on asking them which allocations are theirs."""


def new_pool() -> Pool:
    """A pool that nothing has been recorded into."""
    pool: Any = torch.cuda.graph_pool_handle()
    return pool  # type: ignore[no-any-return]


def new_stream() -> torch.cuda.Stream:
    """One of the current device that is not the default one."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def record(
    run: Callable[[], Sequence[Any]], *, device: int, pool: Pool, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Sequence[Any]]:
    """Record what `run` launches; it has run before, so that nothing is left to be compiled or set up.

    Args:
        run: Its outputs are overwritten by every replay.
        device: The current one.
        pool: Where it allocates.
        stream: To record on, not the default one. The current stream is the same afterwards.

    Raises:
        Exception: what `run` raised, or the recording itself. The pool and the stream must not be used again.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is free must not keep the graph from having its memory
    graph = torch.cuda.CUDAGraph()
    is_over = False
    try:
        with torch.cuda.stream(stream):
            # Other threads may allocate meanwhile: only this one is held to what a recording allows.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
            try:
                outputs = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it follows from the first
                    graph.capture_end()
                raise
            graph.capture_end()
            is_over = True
    finally:
        if not is_over:
            _clean_up(graph, device, pool)
    return graph, outputs


def _clean_up(graph: torch.cuda.CUDAGraph, device: int, pool: Pool) -> None:
    """Do what `capture_end` has not done."""
    _failed.append(graph)
    with contextlib.suppress(RuntimeError):  # not recorded to any more: it has done so
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    torch.cuda.empty_cache()
    with contextlib.suppress(RuntimeError):  # all that can be done, and what failed first is what is told
        _record_nothing()


def _record_nothing() -> None:
    """A recording that succeeds takes the generators out of the state that one which failed has left them in."""
    stream = new_stream()
    memory = torch.zeros(1, dtype=torch.float32, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            memory.zero_()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    graph.reset()
