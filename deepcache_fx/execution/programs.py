"""The programs of one signature: what runs once per prompt, a full step, a shallow step, and what passes between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch

from deepcache_fx.execution.compile import Compilation, Program
from deepcache_fx.graph.capture import CAPTURE_LOCK
from deepcache_fx.graph.forecast import coefficients, weights_on

Values = tuple[torch.Tensor, ...]


History = tuple[Values, ...]
"""The cached values of one cut at its last refreshes, newest first: as many as its shallow step reads."""


class FeatureCache:
    """What is cached of one UNet call, for every cut.

    `steps` are those of the refreshes of each cut, newest first. `values` are as many histories, the oldest values
    repeated where there have been too few refreshes; None while they live in static buffers that several calls share
    (see `cuda_graph_programs.CudaGraphPrograms`).
    """

    __slots__ = ("__weakref__", "degree", "steps", "values")

    def __init__(self, steps: tuple[tuple[int, ...], ...], values: tuple[History, ...] | None) -> None:
        self.steps = steps
        self.values = values
        self.degree: int | None = None
        """Of the forecast, where that is lower than what the programs can do."""


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
        self, step: int, tensors: Sequence[torch.Tensor], prompt: Values = (), before: FeatureCache | None = None
    ) -> tuple[Sequence[Any], FeatureCache]:
        """A full step: the outputs, and the deep feature for the shallow steps to come.

        `before` is this call's deep feature so far, for a forecast; it must not be used again.
        """

    def shallow(
        self, step: int, tensors: Sequence[torch.Tensor], feature: FeatureCache, prompt: Values = (), cut: int = 0
    ) -> Sequence[Any]:
        """A shallow step upon a deep feature of an earlier full step of these same programs.

        The program of a deeper cut may refresh the cuts above it in the feature.
        """

    def cuda_graphs(self) -> str:
        """Whether CUDA graphs are in use, or why not."""

    def release(self) -> None:
        """Give recorded graphs back: called when the programs are no longer wanted."""


@dataclass(frozen=True)
class ShallowProgram:
    """The program of a cut: (*inputs, *cache, *prompt values) to (*outputs, *caches of the `refreshed` cuts)."""

    name: str
    program: Program
    size: int
    """How many values one refresh of its cache has."""
    refreshed: int = 0
    """How many of the cuts above it are refreshed, from the shallowest."""


@dataclass(frozen=True)
class DirectPrograms:
    """Programs that are called as they are."""

    full_program: Program
    cuts: tuple[ShallowProgram, ...]
    num_outputs: int
    compilation: Compilation
    """Where the programs are from."""
    order: int = 0
    """Of the forecast."""
    why_not_recorded: str = "off"
    first_call_seconds: dict[str, float] = field(default_factory=dict)

    def full(
        self, step: int, tensors: Sequence[torch.Tensor], prompt: Values = (), before: FeatureCache | None = None
    ) -> tuple[Sequence[Any], FeatureCache]:
        leaves = self._call("full", self.full_program, (*tensors, *prompt))
        outputs, count = leaves[: self.num_outputs], len(self.cuts)
        if before is None or not self.order:
            histories = tuple(((values,) * (self.order + 1)) for values in self.parts(leaves, count))
            return outputs, FeatureCache(self.first_refresh(step), histories)
        self.note_refreshes(before, step, count)
        self._push(before, leaves, count)
        return outputs, before

    def shallow(
        self, step: int, tensors: Sequence[torch.Tensor], feature: FeatureCache, prompt: Values = (), cut: int = 0
    ) -> Sequence[Any]:
        assert feature.values is not None, "this deep feature lives in other programs' buffers"
        shallow = self.cuts[cut]
        cached = [value for values in feature.values[cut] for value in values]
        if self.order:
            cached.append(
                weights_on(cached[0].device, coefficients(step, feature.steps[cut], self.order, feature.degree))
            )
        leaves = self._call(shallow.name, shallow.program, (*tensors, *cached, *prompt))
        if not shallow.refreshed:
            return leaves
        self.note_refreshes(feature, step, shallow.refreshed)
        self._push(feature, leaves, shallow.refreshed)
        return leaves[: self.num_outputs]

    def first_refresh(self, step: int) -> tuple[tuple[int, ...], ...]:
        """The refreshes of all cuts where there has been no full step before this one."""
        return ((step,),) * len(self.cuts)

    def note_refreshes(self, feature: FeatureCache, step: int, count: int) -> None:
        """The first `count` cuts are refreshed at this step."""
        known = feature.steps
        feature.steps = (*[(step, *steps)[: self.order + 1] for steps in known[:count]], *known[count:])

    def parts(self, leaves: Sequence[Any], count: int) -> list[Values]:
        """What a program returned behind its outputs, for each of the first `count` cuts."""
        rest = iter(leaves[self.num_outputs :])
        return [tuple(islice(rest, shallow.size)) for shallow in self.cuts[:count]]

    def _push(self, feature: FeatureCache, leaves: Sequence[Any], count: int) -> None:
        known = feature.values
        assert known is not None, "this deep feature lives in other programs' buffers"
        new = zip(self.parts(leaves, count), known, strict=False)
        feature.values = (*[(values, *older)[: self.order + 1] for values, older in new], *known[count:])

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
