"""The programs of one signature: what runs once per prompt, a full step, a shallow step, and what passes between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deepcache_fx.capture import CAPTURE_LOCK
from deepcache_fx.compile import Program
from deepcache_fx.forecast import coefficients, weights_on

Values = tuple[torch.Tensor, ...]


class DeepFeature:
    """The cached values of one UNet call at its last refreshes.

    `steps` are those of the refreshes, newest first. `values` are as many tuples, again with the oldest repeated to
    make up the number that a forecast reads; None while they live in static buffers that several calls share (see
    `recorded.Recorded`).
    """

    __slots__ = ("__weakref__", "steps", "values")

    def __init__(self, steps: tuple[int, ...], values: tuple[Values, ...] | None) -> None:
        self.steps = steps
        self.values = values


Stamps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PromptValues:
    """What a prompt stage computed, and from what."""

    stage: PromptStage
    sources: Values
    stamps: Stamps
    values: Values


@dataclass(frozen=True)
class PromptStage:
    """Computes what a variant's steps need of the prompt, once for as long as the prompt stays.

    The prompt stays where every input is the same tensor, in the same memory, unchanged in place. Of the weights,
    changes in place are seen too, but for those through `parameter.data`, which PyTorch does not count: the runtime
    forgets prompt values at the start of every run.
    """

    program: Program
    inputs: tuple[int, ...]
    weights: Values

    def __call__(self, tensors: Sequence[torch.Tensor], known: PromptValues | None) -> PromptValues:
        """The values for these inputs of the step: the known ones, where they still hold."""
        sources = tuple([tensors[index] for index in self.inputs])
        stamps = self._stamps(sources)
        if (
            known is not None
            and known.stage is self
            and stamps is not None
            and known.stamps == stamps
            and all(new is old for new, old in zip(sources, known.sources, strict=True))
        ):
            return known
        return PromptValues(self, sources, stamps or (), tuple(self.program(*sources)))

    def _stamps(self, sources: Values) -> Stamps | None:
        """None where changes are not counted: such inputs are taken to be new at every step."""
        if any(source.is_inference() for source in sources):
            return None
        counted = [w for w in self.weights if not w.is_inference()]
        return tuple([(t._version, t.data_ptr()) for t in (*sources, *counted)])


class Programs(Protocol):
    """What the runtime runs: flat tensors in, flat output leaves out."""

    @property
    def first_call_seconds(self) -> dict[str, float]:
        """Per variant, the duration of its first call: compilation, recording and one step."""

    def full(
        self, step: int, tensors: Sequence[torch.Tensor], prompt: Values = (), before: DeepFeature | None = None
    ) -> tuple[Sequence[Any], DeepFeature]:
        """A full step: the outputs, and the deep feature for the shallow steps to come.

        `before` is this call's deep feature so far, for a forecast; it must not be used again.
        """

    def shallow(
        self, step: int, tensors: Sequence[torch.Tensor], feature: DeepFeature, prompt: Values = ()
    ) -> Sequence[Any]:
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
    order: int = 0
    """Of the forecast."""
    why_not_recorded: str = "off"
    first_call_seconds: dict[str, float] = field(default_factory=dict)

    def full(
        self, step: int, tensors: Sequence[torch.Tensor], prompt: Values = (), before: DeepFeature | None = None
    ) -> tuple[Sequence[Any], DeepFeature]:
        leaves = self._call("full", self.full_program, (*tensors, *prompt))
        new = tuple(leaves[self.num_outputs :])
        older: tuple[Values, ...] = (new,)
        steps: tuple[int, ...] = (step,)
        if before is not None and self.order:
            assert before.values is not None, "this deep feature lives in other programs' buffers"
            older, steps = before.values, (step, *before.steps)
        return leaves[: self.num_outputs], DeepFeature(
            steps[: self.order + 1], (new, *older, *[older[-1]] * self.order)[: self.order + 1]
        )

    def shallow(
        self, step: int, tensors: Sequence[torch.Tensor], feature: DeepFeature, prompt: Values = ()
    ) -> Sequence[Any]:
        assert feature.values is not None, "this deep feature lives in other programs' buffers"
        cached = [value for values in feature.values for value in values]
        if self.order:
            cached.append(weights_on(cached[0].device, coefficients(step, feature.steps, self.order)))
        return self._call("shallow", self.shallow_program, (*tensors, *cached, *prompt))

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
