"""The parts of a captured UNet, as a picture shows them: the way down, the middle, the way up, and how often each runs.

A UNet is a ladder. Every skip connection is a rung; between one rung and the next lies a *cell* on either side:

    sample -> [down 0] ------ skip 0 ------> [up 0] -> output
                 |                              ^
              [down 1] ------ skip 1 ------> [up 1]
                 |                              ^
                 +------->  [middle]  ----------+

A cell is what its end point is computed from and no cell before it: dataflow alone, no names. Caching cuts the ladder
between two rungs, straight across.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepcache_fx.graph.split import Cost


@dataclass(frozen=True)
class RateMacs:
    """Multiply-accumulates, by how often they are done."""

    prompt: int = 0
    """Once per prompt."""
    refresh: int = 0
    """At full steps only."""
    step: int = 0
    """At every step."""

    @property
    def total(self) -> int:
        return self.prompt + self.refresh + self.step

    @property
    def parts(self) -> dict[str, int]:
        """By the name of the rate; without those at which nothing is done."""
        parts = {"prompt": self.prompt, "refresh": self.refresh, "step": self.step}
        return {rate: macs for rate, macs in parts.items() if macs}

    def __add__(self, other: RateMacs) -> RateMacs:
        return RateMacs(self.prompt + other.prompt, self.refresh + other.refresh, self.step + other.step)


@dataclass(frozen=True)
class Cell:
    """What is computed between two end points, and the modules it comes from, in their order.

    Only modules that multiply count, where there are such. Hand-written models may have none: then `modules` is empty
    and `operators` is all there is to say.
    """

    macs: RateMacs
    modules: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Rung:
    """A skip connection with the cell that makes it and the cell that reads it."""

    index: int
    """The branch: 0 is the shallowest."""
    down: Cell
    up: Cell
    skip_shape: tuple[int, ...]
    skip_bytes: int
    deep_bytes: int
    """What caching at this branch keeps, where the deep feature is kept as it is."""


@dataclass(frozen=True)
class Level:
    """Neighbouring rungs of one up block and resolution."""

    resolution: tuple[int, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Anatomy:
    """A UNet cut at a skip connection."""

    levels: tuple[Level, ...]
    """Shallowest first, as are their rungs."""
    middle: Cell
    middle_resolution: tuple[int, ...]
    shared: Cell
    """What does not depend on the sample and several cells read: the embedding of the timestep."""
    branch: int
    cost: Cost
    """Of the shallow step, as it is split."""
    plain: Cost
    """Of the shallow step, were the deep feature cached as it is and nothing done at prompt rate."""

    @property
    def rungs(self) -> tuple[Rung, ...]:
        return tuple(rung for level in self.levels for rung in level.rungs)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All of them, in the order of computation."""
        rungs = self.rungs
        return (self.shared, *(r.down for r in rungs), self.middle, *(r.up for r in reversed(rungs)))

    @property
    def macs(self) -> RateMacs:
        """Of one call of the whole UNet."""
        return sum((cell.macs for cell in self.cells), RateMacs())
