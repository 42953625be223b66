"""A recorder for the CPU that is as unforgiving as CUDA graphs are.

It keeps the operators that ran and the very memory they ran on. A replay runs those operators again: no Python code of
the program, no other memory. It refuses what would be a silent error on a device: memory that was freed or replaced
since, a replay in the midst of another, a replay or recording without the lock. What a replay returned is overwritten
by the next replay of any graph, as memory of a shared pool is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deepcache_fx.execution.cuda_graphs import Recording, RecordingError, Run


class Tape(TorchDispatchMode):
    """Notes every operator with the tensors that it took and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


@dataclass
class Outside:
    """Memory that a graph reads or writes and did not allocate."""

    owner: weakref.ref[torch.Tensor]
    address: int
    memory: torch.Tensor
    """The same memory, through a tensor that stays when the owner's is replaced."""

    def check(self) -> None:
        owner = self.owner()
        assert owner is not None, "a graph would read memory that was freed"
        assert owner.data_ptr() == self.address, "a graph would read an address that its owner has left"


class FakeGraph:
    """The recorded operators; outputs lie in memory of the graph's own."""

    def __init__(self, recorder: FakeRecorder, tape: Tape, outputs: Sequence[Any]) -> None:
        self.recorder = recorder
        self.alive = True
        self.replays = 0
        inside: set[int] = set()
        self.outside: dict[int, Outside] = {}
        for _, args, kwargs, result in tape.calls:
            for value in _tensors((args, kwargs)):
                if id(value) not in inside and id(value) not in self.outside:
                    self.outside[id(value)] = Outside(weakref.ref(value), value.data_ptr(), value.detach())
            inside |= {id(value) for value in _tensors(result)} - set(self.outside)
        self.calls = tape.calls
        with torch.inference_mode(False):  # memory, which no mode keeps from being written
            self.outputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in outputs]
        self.produced = [id(value) for value in outputs]
        # The tape keeps what it ran on alive, under its own eyes: let go of what lies outside.
        known = {key: item.memory for key, item in self.outside.items()}
        self.calls = [
            (func, _mapped(args, known), _mapped(kwargs, known), [id(v) for v in _tensors(result)])
            for func, args, kwargs, result in tape.calls
        ]
        self._names = {id(memory): key for key, memory in known.items()}

    def replay(self) -> None:
        assert self.alive, "a graph that was given back is replayed"
        self.recorder.check()
        self.recorder.between()
        for item in self.outside.values():
            item.check()
        self.replays += 1
        self.recorder.spoil_outputs()
        values: dict[int, torch.Tensor] = {key: item.memory for key, item in self.outside.items()}

        def current(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value if id(value) in self._names else values[id(value)]

        for func, args, kwargs, names in self.calls:
            result = func(*pytree.tree_map(current, args), **pytree.tree_map(current, kwargs))
            values.update(zip(names, _tensors(result), strict=True))
        for output, name in zip(self.outputs, self.produced, strict=True):
            if isinstance(output, torch.Tensor):
                output.copy_(values[name])

    def reset(self) -> None:
        self.recorder.check()
        self.alive = False
        self.calls, self.outside = [], {}


class FakeRecorder:
    """Stands in for `CudaRecorder`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.graphs: list[FakeGraph] = []
        self.fail: list[str] = []
        """Recordings that are to fail, by their order: pop the first at each."""
        self.is_usable = True
        self.between: Callable[[], object] = lambda: None
        """Called at every step: what other threads may do just then."""
        self.begun = self.kept = self.finished = self.freed = 0

    def check(self) -> None:
        assert self.lock._is_owned(), "the recorder is used without its lock"  # type: ignore[attr-defined]

    def begin(self) -> bool:
        self.check()
        self.between()
        self.begun += self.is_usable
        return self.is_usable

    def keep(self, tensor: torch.Tensor) -> None:
        self.check()
        self.between()
        self.kept += 1

    def record(self, run: Run) -> Recording:
        self.check()
        self.between()
        run()  # to warm up
        self.between()
        reason = self.fail.pop(0) if self.fail else ""
        if reason:
            raise RecordingError(reason)
        with Tape() as tape:
            outputs = run()
        graph = FakeGraph(self, tape, outputs)
        self.graphs.append(graph)
        return Recording(graph.replay, graph.outputs, graph.reset)

    def finish(self) -> None:
        self.check()
        self.between()
        self.finished += 1

    def free(self) -> None:
        self.check()
        self.freed += 1

    def spoil_outputs(self) -> None:
        for graph in self.graphs:
            for output in graph.outputs:
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    output.fill_(float("nan"))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _mapped(tree: Any, known: dict[int, torch.Tensor]) -> Any:
    return pytree.tree_map(lambda leaf: known.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)
