"""Record the programs of a signature as CUDA graphs, by hand: a step is then a few copies and one launch.

    inputs, prompt values --copy--> buffers --[full graph]-----> outputs --clone--> caller
                                                 |
                                            cache buffers
                                                 |
    inputs, prompt values --copy--> buffers --[shallow graph]--> outputs --clone--> caller

The contract:

- Input and cache buffers are ordinary allocations outside the graphs' memory pool, and never move. Intermediates and
  outputs lie in one pool, shared by all graphs of a device: no two are replayed at once, and nothing in the pool
  outlives a replay, for outputs are cloned right after it.
- An input that is the same unchanged object as in the last call (a pipeline's prompt embeddings) is not copied again.
- Every cut has cache buffers of its own; a recorded step of a deeper cut may write those of the cuts above it.
- The cache buffers belong to one deep feature at a time. Another thread, or another UNet call of the same step, first
  moves that one out to memory of its own.
- A graph holds raw addresses of weights. They are compared before every replay, and the graph is recorded anew when
  one has moved. From the comparison to the launch nothing here moves weights (`cuda_graphs.Recorder` has the order of
  locks), and what moves them frees no memory that work under way still reads.
- A variant that cannot be recorded is called instead, and `cuda_graphs()` says why.
- What is released has given graphs and buffers back, and is called from then on.

Not done here: nothing is compiled, and values are never inspected: that the inputs fit is the signature's business.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch

from deepcache_fx.execution.cuda_graphs import Recorder, Recording, RecordingError, Run, first_line
from deepcache_fx.execution.memory_format import WEIGHTS_LOCK
from deepcache_fx.execution.programs import DirectPrograms, FeatureCache, History, Values
from deepcache_fx.graph.capture import CAPTURE_LOCK
from deepcache_fx.graph.forecast import coefficients

_TRIES = 3


class _Input:
    """A static buffer and what was last copied into it."""

    __slots__ = ("address", "shared", "source", "target", "tensor", "version")

    def __init__(self, like: torch.Tensor) -> None:
        self.tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        # Along an expanded dimension all elements are one: that one is written.
        self.shared = [d for d in range(like.ndim) if like.stride(d) == 0 and like.shape[d] > 1]
        self.target = self.tensor
        for dimension in self.shared:
            self.target = self.target.narrow(dimension, 0, 1)
        self.source: torch.Tensor | None = None
        self.version: int | None = None
        """The source's counter of changes in place; None where they are not counted."""
        self.address = 0
        """The source's, in case `source.data` is replaced."""


def _fill(inputs: Sequence[_Input], sources: Sequence[torch.Tensor]) -> None:
    """Copy what is not in the buffers yet."""
    for item, source in zip(inputs, sources, strict=True):
        if (
            source is item.source
            and item.version is not None
            and source._version == item.version
            and source.data_ptr() == item.address
        ):
            continue
        values = source
        for dimension in item.shared:
            values = values.narrow(dimension, 0, 1)
        item.target.copy_(values)
        item.source, item.version = source, None if source.is_inference() else source._version
        item.address = source.data_ptr()


class _Prompt:
    """The buffers of a variant's prompt values, and the values last copied into them."""

    def __init__(self, like: Values) -> None:
        self._inputs = tuple(map(_Input, like))
        self.values: Values | None = None

    def fill(self, values: Values) -> None:
        _fill(self._inputs, values)
        self.values = values

    def buffers(self) -> list[torch.Tensor]:
        return _buffers(self._inputs)


@dataclass(frozen=True)
class _Graph:
    recording: Recording
    addresses: tuple[int, ...]
    """Of the weights, when it was recorded."""


class CudaGraphPrograms:
    """The programs of one signature as CUDA graphs (see the module's first lines).

    Args:
        called: The same programs, to be recorded, and called where they cannot be.
        recorder: Shared by all signatures of a device.
        weights: For every variant, by name, the parameters and buffers that it reads.
        cache: For every cut, tensors (fake ones will do) like the values that a full step leaves.
        device: Where everything lies.
    """

    def __init__(
        self,
        called: DirectPrograms,
        recorder: Recorder,
        weights: Mapping[str, Iterable[torch.Tensor]],
        cache: Sequence[Sequence[torch.Tensor]],
        device: torch.device,
    ) -> None:
        self._called = called
        self._recorder = recorder
        self._weights = {name: tuple(tensors) for name, tensors in weights.items()}
        self._cache_like, self._device = tuple(cache), device
        self._graphs: dict[str, _Graph] = {}
        self._inputs: tuple[_Input, ...] = ()
        self._prompts: dict[str, _Prompt] = {}
        self._forecast: Values = ()
        """Of every cut, the weights of its refreshes, where the shallow step forecasts."""
        self._weighed: dict[int, tuple[float, ...]] = {}
        """By cut, the weights that were written last."""
        self._cache: tuple[History, ...] = ()
        """Of every cut."""
        self._resident: Callable[[], FeatureCache | None] = _nobody
        self._failure: str | None = None
        self._moves = 0

    @property
    def first_call_seconds(self) -> dict[str, float]:
        return self._called.first_call_seconds

    def full(
        self, step: int, tensors: Sequence[torch.Tensor], prompt: Values = (), before: FeatureCache | None = None
    ) -> tuple[Sequence[Any], FeatureCache]:
        order = self._called.order
        before = before if order else None
        with self._recorder.lock:
            place = self._move_out if before is None else partial(self._move_in, before)
            recording = self._replay("full", tensors, prompt, place)
            if recording is None:
                self._give_memory(before)
                return self._called.full(step, tensors, prompt, before)
            if before is not None:
                self._called.note_refreshes(before, step, len(self._cache))
                return _cloned(recording.outputs), before
            for newest, *older in self._cache:
                for values in older:  # else they would hold another feature's values: zero times NaN is NaN
                    _copy(newest, values)
            feature = FeatureCache(self._called.first_refresh(step), None)
            self._resident = weakref.ref(feature)
            return _cloned(recording.outputs), feature

    def shallow(
        self, step: int, tensors: Sequence[torch.Tensor], feature: FeatureCache, prompt: Values = (), cut: int = 0
    ) -> Sequence[Any]:
        name = self._called.cuts[cut].name
        with self._recorder.lock:
            recording = self._replay(name, tensors, prompt, partial(self._prepare_shallow, step, feature, cut))
            if recording is None:
                self._give_memory(feature)
                return self._called.shallow(step, tensors, feature, prompt, cut)
            refreshed = self._called.cuts[cut].refreshed
            if refreshed:
                self._called.note_refreshes(feature, step, refreshed)
            outputs = recording.outputs
            return [outputs[0].clone()] if len(outputs) == 1 else _cloned(outputs)

    def cuda_graphs(self) -> str:
        if self._failure is not None:
            return f"not recorded: {self._failure}"
        again = f", {self._moves} times anew because weights had moved" if self._moves else ""
        return f"recorded{again}"

    def release(self) -> None:
        with self._recorder.lock:
            self._failure = "given back"
            self._let_go()

    # Recording.

    def _run_of(self, name: str) -> Run:
        """Made anew at each recording: kept, it would keep this object alive until garbage is collected."""
        if name == "full":
            return self._run_full
        return partial(self._run_shallow, [shallow.name for shallow in self._called.cuts].index(name))

    def _run_full(self) -> Sequence[Any]:
        leaves = self._called.full_program(*_buffers(self._inputs), *self._prompts["full"].buffers())
        return self._keep(leaves, len(self._cache))

    def _run_shallow(self, cut: int) -> Sequence[Any]:
        shallow = self._called.cuts[cut]
        cached = [buffer for buffers in self._cache[cut] for buffer in buffers]
        weights = self._forecast[cut : cut + 1]
        prompt = self._prompts[shallow.name].buffers()
        leaves = shallow.program(*_buffers(self._inputs), *cached, *weights, *prompt)
        return self._keep(leaves, shallow.refreshed)

    def _keep(self, leaves: Sequence[Any], count: int) -> Sequence[Any]:
        """Write what a program returned for the first `count` cuts to their buffers; returns its outputs."""
        for history, values in zip(self._cache, self._called.parts(leaves, count), strict=False):
            for newer, older in reversed(list(pairwise(history))):
                _copy(newer, older)
            _copy(values, history[0])
        return leaves[: self._called.num_outputs]

    def _replay(
        self, name: str, tensors: Sequence[torch.Tensor], prompt: Values, prepare: Callable[[], object]
    ) -> Recording | None:
        """Replay a variant, with its inputs and what `prepare` does in place; None where it has to be called."""
        if not self._fill(name, tensors, prompt):
            return None
        for _ in range(_TRIES):
            with WEIGHTS_LOCK:
                graph = self._graphs.get(name)
                if graph is not None and graph.addresses == self._addresses(name):
                    prepare()
                    graph.recording.replay()
                    return graph.recording
            if not self._record(name):
                return None
        return None  # somebody moves the weights all the time

    def _addresses(self, name: str) -> tuple[int, ...]:
        return tuple(map(torch.Tensor.data_ptr, self._weights[name]))

    def _fill(self, name: str, tensors: Sequence[torch.Tensor], prompt: Values) -> bool:
        """Put the inputs of a variant in place. False where the programs have to be called."""
        if self._failure is not None or not self._recorder.begin():
            return False
        known = self._prompts.get(name)
        if known is None:
            try:
                self._make_buffers(name, tensors, prompt)
            except RuntimeError as error:  # out of memory, or an input that overlaps itself
                self._fail(f"buffers: {first_line(error)}")
                return False
        else:
            _fill(self._inputs, tensors)
            if prompt is not known.values:  # nobody changes a prompt value in place
                known.fill(prompt)
        return True

    def _make_buffers(self, name: str, tensors: Sequence[torch.Tensor], prompt: Values) -> None:
        with torch.inference_mode(False):  # else no later call outside of it could write them
            self._inputs = self._inputs or tuple(map(_Input, tensors))
            if self._called.order and not self._forecast:
                self._forecast = tuple(
                    torch.zeros(self._called.order + 1, dtype=torch.float32, device=self._device)
                    for _ in self._cache_like
                )
            self._cache = self._cache or tuple(
                tuple(
                    tuple(torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=self._device) for c in like)
                    for _ in range(self._called.order + 1)
                )
                for like in self._cache_like
            )
            values = _Prompt(prompt)
        _fill(self._inputs, tensors)
        values.fill(prompt)
        self._prompts[name] = values

    def _record(self, name: str) -> bool:
        """Record a variant; false where that cannot be done."""
        if name in self._graphs:
            self._moves += 1
            self._drop(name)
        if name == "full" or any(shallow.refreshed for shallow in self._called.cuts if shallow.name == name):
            self._move_out()  # running the program writes the cache buffers
        try:
            with CAPTURE_LOCK:  # the warm-up compiles; and weights stay where they are
                addresses = self._addresses(name)
                started = time.perf_counter()
                recording = self._recorder.record(self._run_of(name))
                self.first_call_seconds.setdefault(name, time.perf_counter() - started)
        except RecordingError as error:
            self._fail(f"{name} step: {error}")
            return False
        self._graphs[name] = _Graph(recording, addresses)
        return True

    def _drop(self, name: str) -> None:
        self._recorder.finish()
        self._graphs.pop(name).recording.reset()

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._let_go()

    def _let_go(self) -> None:
        """Give graphs and buffers back; a deep feature that is still wanted gets memory of its own."""
        for name in tuple(self._graphs):
            self._drop(name)
        self._move_out()
        self._inputs = self._cache = self._forecast = ()
        self._weighed.clear()
        self._prompts.clear()

    def _prepare_shallow(self, step: int, feature: FeatureCache, cut: int) -> None:
        """Put the deep feature, and the weights of its refreshes, in place."""
        if feature.values is not None or self._resident() is not feature:
            self._move_in(feature)
        if self._forecast:
            values = coefficients(step, feature.steps[cut], self._called.order, feature.degree)
            if values != self._weighed.get(cut):
                for index, value in enumerate(values):
                    self._forecast[cut][index].fill_(value)  # launches that nothing waits for
                self._weighed[cut] = values

    # Who lives in the cache buffers.

    def _move_out(self) -> None:
        """Give the deep feature in the buffers, if it is still wanted, memory of its own."""
        resident = self._resident()
        if resident is not None:
            resident.values = tuple(
                tuple(tuple(buffer.clone() for buffer in buffers) for buffers in history) for history in self._cache
            )
        self._resident = _nobody

    def _move_in(self, feature: FeatureCache) -> None:
        """Let the buffers hold a deep feature, if they do not yet."""
        if feature.values is not None:
            self._move_out()
            targets = chain.from_iterable(chain.from_iterable(self._cache))
            for value, target in zip(_all_values(feature), targets, strict=True):
                target.copy_(value)
                self._recorder.keep(value)
            feature.values = None
            self._resident = weakref.ref(feature)
        assert self._resident() is feature

    def _give_memory(self, feature: FeatureCache | None) -> None:
        """Let a deep feature have memory of its own, fit to be read on the current stream."""
        if feature is None:
            return
        if feature.values is None:
            self._move_out()
        for value in _all_values(feature):
            self._recorder.keep(value)


def _all_values(feature: FeatureCache) -> Iterator[torch.Tensor]:
    return chain.from_iterable(chain.from_iterable(feature.values or ()))


def _nobody() -> None:
    return None


def _buffers(inputs: Iterable[_Input]) -> list[torch.Tensor]:
    return [item.tensor for item in inputs]


def _copy(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _cloned(outputs: Sequence[Any]) -> list[Any]:
    return [item.clone() if isinstance(item, torch.Tensor) else item for item in outputs]
