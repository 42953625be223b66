"""The published rules: which steps are full, and which skip connection a setting names."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from deepcache_fx.errors import BranchError, OptionError
from deepcache_fx.schedules.branch import Branch
from deepcache_fx.schedules.patterns import Power, Steps, Uniform
from deepcache_fx.schedules.schedule import Schedule


@dataclass(frozen=True)
class ByTimestep(Schedule):
    """`DeepCacheSDHelper`'s rule: a step's number is where its timestep first stands in the scheduler's list.

    With schedulers that repeat a timestep (PNDM, Heun, KDPM2) that is not the step it is: with PNDM at 1:2 its repeated
    second step is shallow, and with Heun at 1:2 only the first step is full. Elsewhere it is `Uniform(interval)`.
    """

    interval: int
    pipe: weakref.ref[Any]
    _read: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    """The timesteps read last, as a tensor and as numbers: once a run, for a device is waited for."""

    def __post_init__(self) -> None:
        Uniform(self.interval)  # which checks it

    def is_full(self, step: int, num_steps: int | None) -> bool:
        pipe = self.pipe()
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or self.interval == 1:
            return step % self.interval == 0
        values = (
            timesteps.tolist()
        )  # the answer is kept for the step: what lies on a device is waited for, as published
        if len(set(values)) == len(values):
            return step % self.interval == 0
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:  # image-to-image with PNDM, which cannot say where it begins
            begin = max(0, len(values) - getattr(pipe, "num_timesteps", len(values)))
        position = begin + step
        if position >= len(values):
            return step % self.interval == 0
        return bool((values.index(values[position]) - values.index(values[begin])) % self.interval == 0)

    def _numbers(self, timesteps: Any) -> list[float]:
        if not self._read or self._read[0][0] is not timesteps:
            self._read[:] = [(timesteps, timesteps.tolist())]
        numbers: list[float] = self._read[0][1]
        return numbers

    def __str__(self) -> str:
        return f"Uniform(interval={self.interval}), steps told by timestep"


def interval_steps(num_steps: int, interval: int, *, uniform: bool, power: float | None, center: int | None) -> Steps:
    """The full steps of the published pipelines, of a run that is told to have `num_steps` steps.

    A run may have more (PNDM makes one more, Heun nearly twice as many): those are shallow, as published.

    Raises:
        ScheduleError: the interval, power or center makes no sense.
    """
    if uniform or interval == 1:
        return Steps(Uniform(interval).full_steps(num_steps))
    given = {"power": power, "center": center}
    schedule = Power(interval, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    return Steps(schedule.full_steps(num_steps))


def helper_branch(unet: Any, cache_branch_id: int) -> Branch:
    """The skip connection that `DeepCacheSDHelper` cuts at: three to a block, the deepest where there are none more.

    Raises:
        BranchError: the number is no integer of at least 0.
    """
    if isinstance(cache_branch_id, bool) or not isinstance(cache_branch_id, int) or cache_branch_id < 0:
        raise BranchError(f"cache_branch_id must be an integer of at least 0, got {cache_branch_id!r}")
    layers = _up_layers(unet)
    if not layers:
        return cache_branch_id
    block, layer = divmod(cache_branch_id, 3)
    if block >= len(layers):
        return len(layers) - 1, layers[-1] - 1
    return block, min(layer, layers[block] - 1)


def pipeline_branch(unet: Any, down_block: int, module: int) -> Branch | None:
    """The skip connection that the published pipelines cut at; None where they cache nothing.

    Shallow steps run the down blocks up to module `module` of block `down_block`: a block's modules are its layers,
    then its downsampler. So (0, 0) is the second skip connection from the output, and the first has no name.

    Raises:
        BranchError: there is no such down block, or no such module in it.
    """
    blocks = unet.down_blocks
    for name, value, count in (("down block", down_block, len(blocks)), ("module", module, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BranchError(f"the {name} must be an integer of at least 0, got {value!r}")
        if count is not None and value >= count:
            raise BranchError(f"there is no {name} {value}: this {type(unet).__name__} has {count}")
    last = len(blocks[down_block].resnets)
    if module > last:
        raise BranchError(f"down block {down_block} has modules 0 to {last}, the last its downsampler, got {module}")
    block, layer = (down_block + 1, 0) if module == last else (down_block, module + 1)
    return (block, layer) if block < len(unet.up_blocks) else None


def both_or_none(cache_layer_id: int | None, cache_block_id: int | None) -> tuple[int, int] | None:
    """Block and module of the published pipelines, whose `cache_layer_id` is the block.

    Raises:
        OptionError: one of them is missing.
    """
    if cache_layer_id is None and cache_block_id is None:
        return None
    if cache_layer_id is None or cache_block_id is None:
        raise OptionError(
            f"cache_layer_id and cache_block_id go together, got {cache_layer_id!r} and {cache_block_id!r}: "
            "give both (0 and 0 are the published setting)"
        )
    return cache_layer_id, cache_block_id


def _up_layers(unet: Any) -> list[int]:
    """Layers of each up block, from the output; empty where it is no UNet of diffusers."""
    blocks = list(getattr(unet, "up_blocks", ()))
    layers = [len(getattr(block, "resnets", ())) for block in reversed(blocks)]
    return layers if all(layers) else []
