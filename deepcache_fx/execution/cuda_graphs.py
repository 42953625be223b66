"""What records and replays CUDA graphs on a device; see `cuda_graph_programs` for what is recorded, and how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Run = Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Recording:
    """One recorded graph. `outputs` are overwritten by every `replay`."""

    replay: Callable[[], object]
    outputs: Sequence[Any]
    reset: Callable[[], object]


class RecordingError(Exception):
    """A program ran, but could not be recorded."""


class Recorder(Protocol):
    """What recording needs of a device. `lock` is held over every call of the others, and over every replay."""

    lock: threading.RLock

    def begin(self) -> bool:
        """Order what follows on the current stream after what used the buffers before.

        False, and nothing done, where the current stream is being recorded by somebody else.
        """

    def keep(self, tensor: torch.Tensor) -> None:
        """The current stream reads this tensor, whichever it was allocated for: its memory must wait for that."""

    def record(self, run: Run) -> Recording:
        """Run once to warm up, then record.

        Raises:
            RecordingError: it could not be recorded; what was allocated for it is free again.
        """

    def finish(self) -> None:
        """Wait until no replay is under way: a graph may then be destroyed."""


class CudaRecorder:
    """Records on one CUDA device, all graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._last: torch.cuda.Stream | None = None

    def begin(self) -> bool:
        if torch._C._cuda_isCurrentStreamCapturing():
            return False
        last = self._last
        # At nearly every call the stream is the one of the last: seen without making an object of it.
        if last is None or torch._C._cuda_getCurrentRawStream(self._index) != last.cuda_stream:
            self._last = torch.cuda.current_stream(self._device)
            if last is not None:
                self._last.wait_stream(last)
        return True

    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))

    def record(self, run: Run) -> Recording:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()  # compiles, tunes, allocates workspaces: none of it is allowed while recording
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate meanwhile: only this one is held to what a recording allows.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = run()
            except RuntimeError as error:  # out of memory among them
                del graph
                torch.cuda.empty_cache()
                raise RecordingError(first_line(error)) from error
        return Recording(graph.replay, outputs, graph.reset)

    def finish(self) -> None:
        if self._last is not None:
            self._last.synchronize()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Per device type, what records."""


def first_line(error: Exception) -> str:
    """An error's class and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
