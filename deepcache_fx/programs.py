"""The two programs of one signature, and the deep feature that one leaves for the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deepcache_fx.capture import CAPTURE_LOCK
from deepcache_fx.compile import Program


class DeepFeature:
    """The cached values of one UNet call.

    `values` is None while they live in static buffers that several calls share (see `cuda_graphs.Recorded`).
    """

    __slots__ = ("__weakref__", "values")

    def __init__(self, values: tuple[torch.Tensor, ...] | None = None) -> None:
        self.values = values


class Programs(Protocol):
    """What the runtime runs: flat tensors in, flat output leaves out."""

    @property
    def first_call_seconds(self) -> dict[str, float]:
        """Per variant, the duration of its first call: compilation, recording and one step."""

    def full(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], DeepFeature]:
        """A full step: the outputs, and the deep feature for the shallow steps to come."""

    def shallow(self, tensors: Sequence[torch.Tensor], feature: DeepFeature) -> Sequence[Any]:
        """A shallow step upon a deep feature of an earlier full step of these same programs."""

    def cuda_graphs(self) -> str:
        """Whether CUDA graphs are in use, or why not."""

    def release(self) -> None:
        """Give recorded graphs back: called when the programs are no longer wanted."""


@dataclass(frozen=True)
class Called:
    """Programs that are called as they are."""

    full_program: Program
    shallow_program: Program
    num_outputs: int
    why_not_recorded: str = "off"
    first_call_seconds: dict[str, float] = field(default_factory=dict)

    def full(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], DeepFeature]:
        leaves = self._call("full", self.full_program, tensors)
        return leaves[: self.num_outputs], DeepFeature(tuple(leaves[self.num_outputs :]))

    def shallow(self, tensors: Sequence[torch.Tensor], feature: DeepFeature) -> Sequence[Any]:
        assert feature.values is not None, "this deep feature lives in other programs' buffers"
        return self._call("shallow", self.shallow_program, (*tensors, *feature.values))

    def _call(self, name: str, program: Program, tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
        if name in self.first_call_seconds:
            return program(*tensors)
        with CAPTURE_LOCK:  # the first call compiles
            started = time.perf_counter()
            leaves = program(*tensors)
            self.first_call_seconds[name] = time.perf_counter() - started
        return leaves

    def cuda_graphs(self) -> str:
        return self.why_not_recorded

    def release(self) -> None:
        """Nothing is held."""
