"""Which denoising step a UNet call belongs to, and where one run ends and the next begins.

Evidence, strongest first: what the caller says (`deepcache_fx.begin`, `step`), which decides alone; what a pipeline's
scheduler announces (`set_timesteps` begins a run, `step` ends a step); a timestep that is a view into the tensor of all
timesteps, by its offset (no value is read, so nothing waits for a device); the timestep's value. In doubt a run begins
anew, which costs one full step. What no evidence can tell apart: unrelated calls, without a scheduler, whose bare
timesteps happen to fall like those of one run (see `api.reset`).
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch

MAX_CALLS_PER_STEP = 16
"""More UNet calls than any guidance method makes in one step: beyond, the timestep is taken to tell nothing."""

MAX_VIEWS_PER_STEP = 256
"""The same, where the scheduler makes a step after each of them, as it does for the views of a panorama."""

_JUMP = 3.0
"""A value-only timestep that moves this many times further than the last move did begins a new run."""


class Position(NamedTuple):
    """A timestep's place in its sequence. Only positions with equal `source` compare."""

    source: object
    """The storage the timestep is a view of; None for a bare value."""
    at: float
    """Offset in that storage, or the value."""
    remaining: int | None = None
    """How many timesteps there are from here on, where the storage tells."""


_position = functools.partial(tuple.__new__, Position)
"""Makes a Position of a tuple as `Position(...)` does, without a Python call: this runs at every UNet call."""


def position_of(timestep: torch.Tensor | None) -> Position | None:
    """The place of a timestep tensor; None where only a device synchronisation (or nothing) could tell."""
    if timestep is None:
        return None
    if timestep.numel() == 1 or (timestep.numel() > 1 and not any(timestep.stride())):
        storage = timestep.untyped_storage()
        count = int(storage.nbytes()) // timestep.element_size()
        if count > 1:
            offset = int(timestep.storage_offset())
            source = (storage.data_ptr(), timestep.device, timestep.dtype)
            return _position((source, offset, count - offset))
    if timestep.device.type == "cpu" and timestep.numel():
        return value_position(timestep)
    return None


def value_position(timestep: torch.Tensor) -> Position:
    """The place of a timestep by its (first) value; waits for the device where the tensor is on one."""
    return Position(None, float(timestep.reshape(-1)[0].item()))


class StepInfo(NamedTuple):
    """What a UNet call is: call number `call` of step `step` of the current run."""

    step: int
    call: int
    num_steps: int | None
    new_run: bool = False
    doubt: str | None = None
    """Why this call must be full whatever the schedule says."""


_tick = functools.partial(tuple.__new__, StepInfo)


class StepTracker:
    """Follows one thread's calls of one UNet. Pure bookkeeping."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the run: the next call begins one."""
        self._active = False
        self._told = False
        self._announced: int | None = None
        self._pending_run = False
        self._stepped = False
        self._position = self._timestep = self._sample = None

    def run_announced(self, num_steps: int | None, *, by_caller: bool = False) -> None:
        """The scheduler's `set_timesteps` was called, or a caller began a run whose every step it is going to end."""
        self._pending_run = True
        self._told = by_caller
        self._announced = num_steps
        self._stepped = False

    def step_ended(self) -> None:
        """The scheduler's `step` was called, or the caller's step is over."""
        self._stepped = True

    @property
    def step(self) -> int:
        """The step of the last call; 0 before the first."""
        return self._step if self._active and not self._pending_run else 0

    @property
    def is_hooked(self) -> bool:
        """True in a run that a scheduler, or the caller, announced."""
        return self._active and self._hooked

    def needs_value(self, position: Position | None, timestep: torch.Tensor | None = None) -> bool:
        """True where neither the scheduler nor the timestep tensor tells the step, so that its value must be read."""
        if timestep is not None and not timestep.numel():
            return False
        return position is None and not (self._pending_run or (self._active and self._hooked))

    def peek(self, position: Position | None, sample: object) -> tuple[StepInfo, bool]:
        """What a call made now would be, and whether a scheduler tells it. Nothing changes by asking."""
        tracker = copy.copy(self)
        info = tracker.observe(position, None, sample)
        return info, tracker._hooked

    def observe(self, position: Position | None, timestep: object, sample: object) -> StepInfo:
        """Place a UNet call. `timestep` and `sample` are kept alive so that their identity cannot be reused."""
        last = self._position
        if (
            self._active
            and not self._pending_run
            and not self._told
            and last is not None
            and position is not None
            and position.source is not None
            and position.source == last.source
            and position.at - last.at == self._direction * self._stride
        ):
            info = self._next_step()  # what `_place` would say: the next place of the same tensor
        else:
            info = self._place(position, sample)
        self._position, self._timestep, self._sample = position, timestep, sample
        self._stepped = False
        return info

    def _place(self, position: Position | None, sample: object) -> StepInfo:
        if self._pending_run or not self._active:
            return self._begin(position, hooked=self._pending_run)
        if self._told:
            return self._as_told(position)
        last = self._position
        if position is None or last is None:
            if position is not last or not self._hooked:
                return self._begin(position, reason="the timestep tells nothing about the step")
            return self._next_step() if self._stepped else self._next_call(sample)
        if position.source != last.source:
            return self._begin(position)
        move = (position.at - last.at) * self._direction
        if move > 0:
            if position.source is None and not self._hooked and abs(move) > _JUMP * self._stride + 1:
                return self._begin(position)
            if position.source is not None and abs(move) != self._stride:  # elsewhere in the same tensor
                return self._begin(position, direction=self._direction, stride=abs(move))
            self._stride = abs(move)
            return self._next_step()
        if move == 0:
            # Schedulers that repeat a timestep have it twice in their tensor: the same place of it, after a step of the
            # scheduler, is another view of the same denoising step.
            repeated = position.source is None and self._announced != 1
            return self._next_step() if repeated and self._hooked and self._stepped else self._next_call(sample)
        # Backwards (or NaN). A sequence that only ever goes backwards turns the sense of direction around.
        direction = -self._direction if self._step == 0 and not math.isnan(move) else None
        # The scheduler's `step` was heard since the last call: it still tells the steps, and how many there are.
        return self._begin(position, hooked=self._hooked and self._stepped, direction=direction)

    def _begin(
        self,
        position: Position | None,
        *,
        hooked: bool = False,
        direction: int | None = None,
        stride: float = 1.0,
        reason: str = "first call of a run",
    ) -> StepInfo:
        by_value = position is not None and position.source is None
        self._active, self._hooked, self._pending_run = True, hooked, False
        self._step, self._call = 0, 0
        self._direction = direction or (-1 if by_value else 1)  # values fall, offsets grow
        self._stride = math.inf if by_value else stride
        self._unsure, self._calls_before, self._distinct = False, 0, False
        known = position.remaining if position is not None else None
        if position is not None and known is not None:
            left = position.at + 1 if self._direction < 0 else known
            known = math.ceil(left / self._stride)
        if hooked and self._announced is not None:
            known = self._announced if known is None or self._told else min(known, self._announced)
        elif self._told:
            known = None  # a place in some tensor says nothing of the caller's steps
        self._num_steps = known
        self._doubt: str | None = None
        return StepInfo(0, 0, self._num_steps, new_run=True, doubt=reason)

    def _as_told(self, position: Position | None) -> StepInfo:
        """A step is what lies between two that the caller ended, whatever the timestep is."""
        if not self._stepped:
            self._call += 1
            return StepInfo(self._step, self._call, self._num_steps)
        if self._num_steps is not None and self._step + 1 >= self._num_steps:
            self._told = False
            return self._begin(position, reason="more steps than the caller had announced")
        return self._next_step()

    def _next_step(self) -> StepInfo:
        calls = self._call + 1
        # A repeated timestep may have been a new run that an abandoned one cannot be told from: settle it here.
        settled = not self._unsure or calls == self._calls_before
        self._doubt = None if settled else "a repeated timestep may have begun a new run"
        self._step, self._call = self._step + 1, 0
        self._calls_before, self._unsure = calls, False
        return _tick((self._step, 0, self._num_steps, False, self._doubt))

    def _next_call(self, sample: object) -> StepInfo:
        self._call += 1
        if self._call >= (MAX_VIEWS_PER_STEP if self._hooked and self._stepped else MAX_CALLS_PER_STEP):
            info = self._begin(
                self._position, hooked=self._hooked, reason="the timestep does not change from call to call"
            )
            self._unsure = True  # the next step's calls are not numbered as these are
            return info
        if not self._hooked and sample is not self._sample:
            if self._step > 0 and not self._distinct:  # in this run the calls of a step shared their sample
                return self._begin(self._position)
            self._unsure = self._distinct = True
        return StepInfo(self._step, self._call, self._num_steps, doubt=self._doubt)

    # Set by _begin and observe; declared for readers and type checkers.
    _position: Position | None
    _timestep: Any
    _sample: Any
    _hooked: bool
    _step: int
    _call: int
    _direction: int
    _stride: float
    _unsure: bool
    _calls_before: int
    _distinct: bool
    """Whether the calls of step 0 had a sample each."""
    _num_steps: int | None
