"""What records and replays CUDA graphs on a device; see `cuda_graph_programs` for what is recorded, and how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from passes.shared.cuda_recording import new_pool, new_stream, record

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
    """What recording needs of a device. `lock` is held over every call of the others, and over every replay.

    Of several locks the earlier is taken first: `lock`, then `graph.capture.CAPTURE_LOCK` (a recording compiles), then
    `memory_format.WEIGHTS_LOCK` (weights stay where they are from the comparison of addresses to the launch).
    """

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
            RecordingError: it could not be recorded; what was allocated for it is free again, and everything else, the
                recordings before among it, is as it was.
        """

    def finish(self) -> None:
        """Wait until no replay is under way: a graph may then be destroyed."""

    def free(self) -> None:
        """Hand memory that nothing uses any more back to the device."""


class CudaRecorder:
    """Records on one CUDA device, all graphs in one memory pool; in another one after a recording that failed."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._device = torch.device("cuda", self._index)
        with torch.cuda.device(self._device):
            self._pool = new_pool()
            self._stream = _stream(self._index)
        self._last: torch.cuda.Stream | None = None

    def begin(self) -> bool:
        if torch.cuda.current_device() == self._index:
            is_recorded = torch._C._cuda_isCurrentStreamCapturing()
        else:
            with torch.cuda.device(self._device):  # else it would be asked of another device's stream
                is_recorded = torch._C._cuda_isCurrentStreamCapturing()
        if is_recorded:
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
            self._warm_up(run)
            is_recorded = False
            try:
                graph, outputs = record(run, device=self._index, pool=self._pool, stream=self._stream)
                is_recorded = True
            except Exception as error:  # it has run, so whatever this is comes of the recording
                raise RecordingError(first_line(error)) from error
            finally:
                if not is_recorded:
                    self._pool = new_pool()
                    self._stream = _STREAMS[self._index] = new_stream()
        return Recording(graph.replay, outputs, graph.reset)

    def _warm_up(self, run: Run) -> None:
        """Compile, tune and allocate workspaces: none of it is allowed while recording."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                run()
        except torch.OutOfMemoryError as error:  # without buffers of its own it may yet fit
            raise RecordingError(first_line(error)) from error
        finally:
            current.wait_stream(self._stream)

    def finish(self) -> None:
        if self._last is not None:
            self._last.synchronize()

    def free(self) -> None:
        torch.cuda.empty_cache()


_STREAMS: dict[int, torch.cuda.Stream] = {}
"""By device, what graphs are recorded on, one at a time.

PyTorch keeps up to 32 MB of workspace for each stream that has ever multiplied matrices: one a model would add up.
"""


def _stream(device: int) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = new_stream()
    return _STREAMS[device]


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Per device type, what records."""


def first_line(error: Exception) -> str:
    """An error's class and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
