"""Record the two programs of a signature as CUDA graphs, by hand: a step is then a few copies and one launch.

    inputs --copy--> input buffers --[full graph]-----> outputs --clone--> caller
                                        |
                                   cache buffers
                                        |
    inputs --copy--> input buffers --[shallow graph]--> outputs --clone--> caller

The contract:

- Input and cache buffers are ordinary allocations outside the graphs' memory pool, and never move. Intermediates and
  outputs lie in one pool, shared by all graphs of a device: no two are replayed at once, and nothing in the pool
  outlives a replay, for outputs are cloned right after it.
- An input that is the same unchanged object as in the last call (a pipeline's prompt embeddings) is not copied again.
- The cache buffers belong to one deep feature at a time. Another thread, or another UNet call of the same step, first
  moves that one out to memory of its own.
- A graph holds raw addresses of weights. They are compared before every replay, and the graph is recorded anew when
  one has moved.
- A variant that cannot be recorded is called instead, and `cuda_graphs()` says why.

Not done here: nothing is compiled, and values are never inspected: that the inputs fit is the signature's business.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deepcache_fx.capture import CAPTURE_LOCK
from deepcache_fx.programs import Called, DeepFeature

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

    def usable(self) -> bool:
        """False where the current stream is being recorded by somebody else."""

    def begin(self) -> None:
        """Order what follows on the current stream after what used the buffers before."""

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
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._last: torch.cuda.Stream | None = None

    def usable(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

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
                raise RecordingError(_first_line(error)) from error
        return Recording(graph.replay, outputs, graph.reset)

    def finish(self) -> None:
        if self._last is not None:
            self._last.synchronize()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Per device type, what records."""


class _Input:
    """A static buffer and what was last copied into it."""

    __slots__ = ("_buffer", "_shared", "_source", "_stamp", "tensor")

    def __init__(self, like: torch.Tensor) -> None:
        self.tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        # Along an expanded dimension all elements are one: that one is written.
        self._shared = [d for d in range(like.ndim) if like.stride(d) == 0 and like.shape[d] > 1]
        self._buffer = self._narrow(self.tensor)
        self._source: torch.Tensor | None = None
        self._stamp: tuple[int, int] | None = None

    def fill(self, source: torch.Tensor) -> None:
        # The counter of in-place changes, and the address in case `source.data` was replaced.
        stamp = None if source.is_inference() else (source._version, source.data_ptr())
        if source is self._source and stamp is not None and stamp == self._stamp:
            return
        self._buffer.copy_(self._narrow(source) if self._shared else source)
        self._source, self._stamp = source, stamp

    def _narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        for dimension in self._shared:
            tensor = tensor.narrow(dimension, 0, 1)
        return tensor


@dataclass(frozen=True)
class _Graph:
    recording: Recording
    addresses: tuple[int, ...]
    """Of the weights, when it was recorded."""


class Recorded:
    """The programs of one signature as CUDA graphs (see the module's first lines).

    Args:
        called: The same programs, to be recorded, and called where they cannot be.
        recorder: Shared by all signatures of a device.
        weights: For "full" and "shallow", the parameters and buffers that the variant reads.
        cache: Tensors (fake ones will do) like the values that a full step leaves.
        device: Where everything lies.
    """

    def __init__(
        self,
        called: Called,
        recorder: Recorder,
        weights: Mapping[str, Iterable[torch.Tensor]],
        cache: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self._called = called
        self._recorder = recorder
        self._weights = {name: tuple(tensors) for name, tensors in weights.items()}
        self._cache_like, self._device = tuple(cache), device
        self._runs: dict[str, Run] = {"full": self._run_full, "shallow": self._run_shallow}
        self._graphs: dict[str, _Graph] = {}
        self._inputs: tuple[_Input, ...] = ()
        self._cache: tuple[torch.Tensor, ...] = ()
        self._resident: Callable[[], DeepFeature | None] = _nobody
        self._failure: str | None = None
        self._moves = 0

    @property
    def first_call_seconds(self) -> dict[str, float]:
        return self._called.first_call_seconds

    def full(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], DeepFeature]:
        with self._recorder.lock:
            if not self._begin(tensors):
                return self._called.full(tensors)
            self._move_out()
            recording = self._recording("full")
            if recording is None:
                return self._called.full(tensors)
            recording.replay()
            feature = DeepFeature()
            self._resident = weakref.ref(feature)
            return _cloned(recording.outputs), feature

    def shallow(self, tensors: Sequence[torch.Tensor], feature: DeepFeature) -> Sequence[Any]:
        with self._recorder.lock:
            recording = self._recording("shallow") if self._begin(tensors) else None
            if recording is None:
                if feature.values is None:
                    self._move_out()
                for value in feature.values or ():
                    self._recorder.keep(value)
                return self._called.shallow(tensors, feature)
            if feature.values is not None:
                self._move_in(feature)
            assert self._resident() is feature
            recording.replay()
            return _cloned(recording.outputs)

    def cuda_graphs(self) -> str:
        if self._failure is not None:
            return f"not recorded: {self._failure}"
        again = f", {self._moves} times anew because weights had moved" if self._moves else ""
        return f"recorded{again}"

    def release(self) -> None:
        with self._recorder.lock:
            for name in tuple(self._graphs):
                self._drop(name)

    # Recording.

    def _run_full(self) -> Sequence[Any]:
        leaves = self._called.full_program(*(item.tensor for item in self._inputs))
        for buffer, value in zip(self._cache, leaves[self._called.num_outputs :], strict=True):
            buffer.copy_(value)
        return leaves[: self._called.num_outputs]

    def _run_shallow(self) -> Sequence[Any]:
        return self._called.shallow_program(*(item.tensor for item in self._inputs), *self._cache)

    def _begin(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Fill the input buffers. False where the programs have to be called."""
        if self._failure is not None or not self._recorder.usable():
            return False
        self._recorder.begin()
        if self._inputs:
            for item, tensor in zip(self._inputs, tensors, strict=True):
                item.fill(tensor)
            return True
        try:
            with torch.inference_mode(False):  # else no later call outside of it could write them
                inputs = tuple(map(_Input, tensors))
                self._cache = tuple(
                    torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=self._device)
                    for c in self._cache_like
                )
            for item, tensor in zip(inputs, tensors, strict=True):
                item.fill(tensor)
        except RuntimeError as error:  # out of memory, or an input that overlaps itself
            self._failure = f"buffers: {_first_line(error)}"
            return False
        self._inputs = inputs
        return True

    def _recording(self, name: str) -> Recording | None:
        """The recording of a variant; None where it cannot be recorded."""
        addresses = tuple(map(torch.Tensor.data_ptr, self._weights[name]))
        graph = self._graphs.get(name)
        if graph is not None:
            if graph.addresses == addresses:
                return graph.recording
            self._moves += 1
            self._drop(name)
        try:
            with CAPTURE_LOCK:  # the warm-up compiles
                started = time.perf_counter()
                recording = self._recorder.record(self._runs[name])
                self.first_call_seconds.setdefault(name, time.perf_counter() - started)
        except RecordingError as error:
            self._failure = f"{name} step: {error}"
            self._inputs = ()
            self.release()
            return None
        self._graphs[name] = _Graph(recording, addresses)
        return recording

    def _drop(self, name: str) -> None:
        self._recorder.finish()
        self._graphs.pop(name).recording.reset()

    # Who lives in the cache buffers.

    def _move_out(self) -> None:
        """Give the deep feature in the buffers, if it is still wanted, memory of its own."""
        resident = self._resident()
        if resident is not None:
            resident.values = tuple(buffer.clone() for buffer in self._cache)
        self._resident = _nobody

    def _move_in(self, feature: DeepFeature) -> None:
        assert feature.values is not None
        self._move_out()
        for buffer, value in zip(self._cache, feature.values, strict=True):
            buffer.copy_(value)
            self._recorder.keep(value)
        feature.values = None
        self._resident = weakref.ref(feature)


def _nobody() -> None:
    return None


def _cloned(outputs: Sequence[Any]) -> list[Any]:
    return [item.clone() if isinstance(item, torch.Tensor) else item for item in outputs]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
