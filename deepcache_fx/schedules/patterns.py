"""Which denoising steps run the whole UNet and which reuse the cached feature. No tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from deepcache_fx.errors import ScheduleError
from deepcache_fx.files.reading import is_natural
from deepcache_fx.schedules.branch import Branch, check_branch
from deepcache_fx.schedules.schedule import Schedule


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ScheduleError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ScheduleError(f"{name} must be at least 1 (1 caches nothing), got {value}")
    return value


@dataclass(frozen=True)
class Uniform(Schedule):
    """Full at every `interval`-th step: 0, N, 2N, ... (DeepCache, section 3.3, "1:N inference")."""

    interval: int

    def __post_init__(self) -> None:
        _positive_int("interval", self.interval)

    def is_full(self, step: int, num_steps: int | None) -> bool:
        return step % self.interval == 0


@dataclass(frozen=True)
class Power(Schedule):
    """The published non-uniform 1:N schedule: full steps are dense around step `center` and thin out away from it.

    As many full steps as `Uniform(interval)` has. `power` sets how fast they thin out; where it gives two of them the
    same index it is lowered by 0.02 until it does not, as in the published code (DeepCache, section 3.3 and appendix;
    `sample_from_quad_center`).

    Raises:
        ScheduleError: the number of steps is unknown, or no power above 1 gives that many distinct indices.
    """

    interval: int
    power: float = 1.4
    center: int = 15
    needs_num_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive_int("interval", self.interval)
        if isinstance(self.power, bool) or not isinstance(self.power, (int, float)) or not 1 < self.power < 100:
            raise ScheduleError(f"power must be a number above 1 (published values: 1.2 to 1.5), got {self.power!r}")
        if not is_natural(self.center):
            raise ScheduleError(f"center must be a step number of at least 0, got {self.center!r}")

    def is_full(self, step: int, num_steps: int | None) -> bool:
        if step == 0 or self.interval == 1:
            return True
        if num_steps is None:
            raise ScheduleError(
                f"{self} needs the number of denoising steps, which is unknown here: pass the pipeline instead of its "
                "UNet to optimize(), or use Uniform or Steps"
            )
        return step in _power_indices(num_steps, self.interval, self.power, self.center)


@lru_cache(maxsize=256)
def _power_indices(num_steps: int, interval: int, power: float, center: int) -> frozenset[int]:
    count = -(-num_steps // interval)
    exponent = power
    while exponent > 1:
        # Left of the center the base is negative: numpy's complex power takes the principal branch, as published.
        points = np.linspace((-center) ** (1 / exponent), (num_steps - center) ** (1 / exponent), count + 1)
        offsets = np.unique((points**exponent).real.astype(np.int32))[1:-1]
        indices = [0] + [int(offset) + center for offset in offsets]
        if len(indices) == count:
            return frozenset(indices)
        exponent -= 0.02
    raise ScheduleError(
        f"no power above 1 spreads {count} full steps over {num_steps} steps around center {center} (tried {power} "
        "downwards): choose a smaller center or another interval"
    )


@dataclass(frozen=True, init=False)
class Steps(Schedule):
    """Full at exactly these steps (and at step 0)."""

    steps: tuple[int, ...]

    def __init__(self, steps: Iterable[int]) -> None:
        values = tuple(steps)
        for value in values:
            if not is_natural(value):
                raise ScheduleError(f"Steps takes step numbers of at least 0, got {value!r}")
        object.__setattr__(self, "steps", tuple(sorted({0, *values})))

    def is_full(self, step: int, num_steps: int | None) -> bool:
        return step in self.steps


@dataclass(frozen=True)
class Window(Schedule):
    """Caches between two steps alone: every step before `start` is full, and every step from `end` on.

    In between `inner` is counted from `start`, which is full. A negative `end` counts from the end of the run, as in a
    slice: `Window(2, -1, Uniform(3))` makes the first two steps and the last one full.

    Raises:
        ScheduleError: `start` is negative, `end` lies before it, or a step count that is needed is unknown.
    """

    start: int = 0
    end: int | None = None
    inner: Schedule = Uniform(3)

    def __post_init__(self) -> None:
        if not is_natural(self.start):
            raise ScheduleError(f"start must be a step number of at least 0, got {self.start!r}")
        if self.end is not None and (isinstance(self.end, bool) or not isinstance(self.end, int)):
            raise ScheduleError(f"end must be a step number, negative from the end, or None, got {self.end!r}")
        if self.end is not None and 0 <= self.end < self.start:
            raise ScheduleError(f"end must not lie before start, got {self.start} and {self.end}")
        object.__setattr__(self, "inner", as_schedule(self.inner))

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return self.inner.needs_num_steps or (self.end is not None and self.end < 0)

    def is_full(self, step: int, num_steps: int | None) -> bool:
        end = self.end
        if end is not None and end < 0:
            if num_steps is None:
                raise ScheduleError(
                    f"{self} needs the number of denoising steps, which is unknown here: pass the pipeline instead of "
                    "its UNet to optimize(), or count end from the start"
                )
            end += num_steps
        if step <= self.start or (end is not None and step >= end):
            return True
        return self.inner.is_full(step - self.start, self._inner_steps(num_steps))

    def branch_at(self, step: int, num_steps: int | None) -> Branch | None:
        return self.inner.branch_at(step - self.start, self._inner_steps(num_steps))

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.inner.branches

    def check(self, unet: Any, scheduler: Any = None) -> None:
        self.inner.check(unet, scheduler)

    def _inner_steps(self, num_steps: int | None) -> int | None:
        """How many steps the inner schedule has; None where that is unknown."""
        end = self.end
        if end is None or (end < 0 and num_steps is not None):
            end = None if num_steps is None else num_steps + (end or 0)
        return None if end is None else end - self.start


@dataclass(frozen=True, init=False)
class Nested(Schedule):
    """Steps of several depths: some full, some from a deeper skip connection on, the others from that of `optimize`.

    `deeper` says, for skip connections by number or (block, layer), at which steps to begin there: at those that the
    schedule beside it, or 1:N where that is a number, would make full. Where several do, the last counts: name the
    shallowest first. `Nested(6, {3: 3})` makes steps 0, 6, 12, ... full, and steps 3, 9, 15, ... begin at branch 3. A
    schedule in `deeper` is asked only at steps that nothing else claims before it.

    Such a step computes less than a full one and more than the others. With a forecast it refreshes the caches of the
    skip connections above it too, so that these follow more steps than the full ones. Each skip connection has a cache
    and a program of its own.

    Raises:
        ScheduleError: `deeper` is no mapping, is empty, or names a skip connection twice.
        BranchError: it names none that there can be.
    """

    inner: Schedule
    deeper: tuple[tuple[Branch, Schedule], ...]

    def __init__(self, inner: object, deeper: Mapping[Branch, object] | Iterable[tuple[Branch, object]]) -> None:
        try:
            pairs = [(branch, one) for branch, one in (deeper.items() if isinstance(deeper, Mapping) else deeper)]
        except (TypeError, ValueError) as error:
            raise ScheduleError(
                f"deeper must map skip connections to schedules, as in {{3: 3}}, got {deeper!r}"
            ) from error
        if not pairs:
            raise ScheduleError("deeper must name at least one skip connection: use the inner schedule as it is")
        chosen = [(check_branch(branch), as_schedule(schedule)) for branch, schedule in pairs]
        if len({branch for branch, _ in chosen}) < len(chosen):
            raise ScheduleError(f"deeper names a skip connection twice, got {[branch for branch, _ in chosen]}")
        object.__setattr__(self, "inner", as_schedule(inner))
        object.__setattr__(self, "deeper", tuple(chosen))

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return any(schedule.needs_num_steps for schedule in (self.inner, *(one for _, one in self.deeper)))

    def is_full(self, step: int, num_steps: int | None) -> bool:
        return self.inner.is_full(step, num_steps)

    def branch_at(self, step: int, num_steps: int | None) -> Branch | None:
        for branch, schedule in reversed(self.deeper):
            if schedule.is_full(step, num_steps):
                return branch
        return self.inner.branch_at(step, num_steps)

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (*(branch for branch, _ in self.deeper), *self.inner.branches)

    def check(self, unet: Any, scheduler: Any = None) -> None:
        for schedule in (self.inner, *(one for _, one in self.deeper)):
            schedule.check(unet, scheduler)


@dataclass(frozen=True)
class Custom(Schedule):
    """A user's function: `function(step)` or `function(step, num_steps)` returns True where the step is full."""

    function: Callable[..., object]
    _takes_num_steps: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_takes_num_steps", _takes_num_steps(self.function))

    def is_full(self, step: int, num_steps: int | None) -> bool:
        return bool(self.function(step, num_steps) if self._takes_num_steps else self.function(step))


def _takes_num_steps(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind(0, None)
    except TypeError:
        return False
    return True


def as_schedule(value: object) -> Schedule:
    """A `Schedule` as it is, an integer as `Uniform`, a callable as `Custom`; anything else is a `ScheduleError`."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, int):
        return Uniform(value)
    if callable(value) and not isinstance(value, type):
        return Custom(value)
    raise ScheduleError(
        "schedule must be Uniform(n), Power(n), Steps([...]), Window(...), Nested(...), an integer or a function of "
        f"the step, got {value!r}"
    )
