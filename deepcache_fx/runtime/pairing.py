"""What passes between the runtime and a ControlNet: a network that runs before the UNet and computes inputs of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepcache_fx.graph.lazy import LazyTensor


@dataclass(frozen=True)
class PrecomputedInputs:
    """What one call of a ControlNet returned, and the programs that it came from."""

    source: object
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Pairing:
    """Which outputs of a ControlNet the UNet's shallow step reads, as a full step showed it."""

    source: object
    read: frozenset[int]
    """Outputs, by number."""
    unread: Mapping[int, torch.Tensor]
    """The other outputs, by number, of that full step."""
    places: Mapping[int, int]
    """Which input of the UNet, by number, is which unread output."""

    def inputs(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """A shallow step's inputs: where it reads none, a tensor of the last full step will do."""
        return tuple(
            self.unread[self.places[i]] if i in self.places and isinstance(tensor, LazyTensor) else tensor
            for i, tensor in enumerate(tensors)
        )


@dataclass(frozen=True)
class UpcomingCall:
    """What is known of the UNet call that a ControlNet's call comes before."""

    run: int
    """Another number is another run."""
    begins_run: bool
    call: int
    """In its step."""
    is_told: bool
    """False where no scheduler tells the step."""
    is_shallow: bool = False
    pairing: Pairing | None = None


@dataclass
class Expectation:
    """Counts a ControlNet's calls in one thread's step, and keeps what they returned until the UNet takes it."""

    runs: int = 0
    """Of the UNet, forgotten and announced ones included."""
    step: tuple[int, int] | None = None
    calls: int = 0
    precomputed: dict[int, PrecomputedInputs] = field(default_factory=dict)

    def next_call(self, run: int, step: int) -> int:
        """The number of a ControlNet's call in its step."""
        if (run, step) != self.step:
            self.step, self.calls = (run, step), 0
        self.calls += 1
        return self.calls - 1

    def begin(self) -> None:
        """Another run is to begin."""
        self.runs += 1
        self.precomputed.clear()


def pair(
    precomputed: PrecomputedInputs | None,
    received: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    reads: Collection[int],
) -> Pairing | None:
    """How a ControlNet's outputs reach the UNet; None where one of them does not reach it as it is.

    Args:
        precomputed: What the ControlNet returned.
        received: The UNet's inputs as they came.
        values: The same, computed where they had been deferred.
        reads: Which inputs, by number, the shallow step reads.
    """
    if precomputed is None:
        return None
    numbers = {id(output): number for number, output in enumerate(precomputed.outputs)}
    places = {i: numbers[id(tensor)] for i, tensor in enumerate(received) if id(tensor) in numbers}
    if len(set(places.values())) < len(precomputed.outputs):
        return None
    read = frozenset(number for i, number in places.items() if i in reads)
    unread = {i: number for i, number in places.items() if number not in read}
    return Pairing(precomputed.source, read, {number: values[i] for i, number in unread.items()}, unread)
