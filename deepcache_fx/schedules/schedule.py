"""What a schedule is, and the one that `calibrate` finds: its file, its model, what it achieves. No tensors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from deepcache_fx.errors import ScheduleError
from deepcache_fx.files.reading import is_natural, is_number, read_json
from deepcache_fx.files.writing import write_json
from deepcache_fx.schedules.branch import Branch, check_branch
from deepcache_fx.schedules.made_for import MadeFor, plain

FORMAT = "deepcache_fx calibrated schedule 1"
"""First entry of the file. Another number: the meaning of an entry has changed."""


class Schedule(ABC):
    """Says of every step of a run whether it is full (refreshes the cache) or shallow (reads it)."""

    needs_num_steps: ClassVar[bool] = False
    """True where the answer depends on how many steps the run has."""

    @abstractmethod
    def is_full(self, step: int, num_steps: int | None) -> bool:
        """True where `step` (0 is the first of the run) must run the whole UNet; `num_steps` is None where unknown."""

    def branch_at(self, step: int, num_steps: int | None) -> Branch | None:
        """The skip connection that a shallow step is cut at: one of `branches`, or None for that of `optimize`."""
        return None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The skip connections that `branch_at` may name; each must be deeper than that of `optimize`."""
        return ()

    def full_steps(self, num_steps: int) -> list[int]:
        """The full steps of a run of `num_steps` steps, in order. Step 0 is always one of them."""
        return [step for step in range(num_steps) if step == 0 or self.is_full(step, num_steps)]

    def check(self, unet: Any, scheduler: Any = None) -> None:  # noqa: B027 - most have nothing to check
        """Raise a ScheduleError where the schedule was made for another UNet or scheduler; `optimize` asks."""

    @staticmethod
    def load(path: str | Path) -> Calibrated:
        """The schedule in a JSON file that `deepcache_fx.calibrate` or `Calibrated.save` wrote.

        Raises:
            ScheduleError: naming what is wrong with the file, or that its search has not been finished.
        """
        return _load(Path(path))


@dataclass(frozen=True)
class Achieved:
    """What a calibrated schedule was measured to do, on the images it was calibrated with: others gain less."""

    metric: str
    """What was compared: "latents" or "images"."""
    error: float
    """Relative L2 distance to the uncached run of the same seeds, mean over the images."""
    uniform_error: float
    """Of equally spaced refreshes, as many, with the same forecast."""
    cost: float
    """Multiply-accumulates of all steps, a share of those of the uncached run."""
    images: int
    trials: int
    """How many schedules were tried."""
    plain_error: float | None = None
    """Of the best schedule found without deeper steps; None where there is no deeper skip connection."""


@dataclass(frozen=True)
class Calibrated(Schedule):
    """Full at the steps that `deepcache_fx.calibrate` found, for one model, scheduler and number of steps.

    Its refreshes are placed for one branch and one forecast order: `optimize(pipe, **schedule.options)` passes them on.

    Raises:
        ScheduleError: by `is_full`, in a run of another or an unknown number of steps.

    Example:
        >>> found = Schedule.load("schedule.json")
        >>> deepcache_fx.optimize(pipe, **found.options)
    """

    steps: tuple[int, ...]
    num_steps: int
    """UNet steps of a run. PNDM makes one more than `num_inference_steps` says, Heun about twice as many."""
    forecast: int
    branch: Branch
    made_for: MadeFor
    achieved: Achieved
    library: str
    """Version of deepcache_fx that made it."""
    deeper: tuple[int, ...] = ()
    """The steps that begin at `deeper_branch`."""
    deeper_branch: Branch | None = None
    needs_num_steps: ClassVar[bool] = True

    def is_full(self, step: int, num_steps: int | None) -> bool:
        if num_steps != self.num_steps:
            given = "an unknown number of steps" if num_steps is None else f"{num_steps} steps"
            raise ScheduleError(
                f"this schedule was calibrated for {self.num_steps} steps, and the run has {given}: calibrate for "
                "that, or use Steps(schedule.steps) to place the full steps regardless"
            )
        return step in self.steps

    def branch_at(self, step: int, num_steps: int | None) -> Branch | None:
        return self.deeper_branch if step in self.deeper else None

    @property
    def branches(self) -> tuple[Branch, ...]:
        return () if self.deeper_branch is None or not self.deeper else (self.deeper_branch,)

    @property
    def letters(self) -> str:
        """The steps of a run: F full, s shallow, t from the deeper skip connection on."""
        return letters(self.steps, self.deeper, self.num_steps)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `optimize` that the schedule was calibrated with."""
        return {"schedule": self, "branch": self.branch, "forecast": self.forecast}

    def check(self, unet: Any, scheduler: Any = None) -> None:
        """Raise a ScheduleError where a UNet, or a scheduler, is not what the schedule was calibrated for."""
        found = self.made_for.differences(unet, scheduler)
        if found:
            raise ScheduleError(
                f"this schedule was calibrated for something else: {'; '.join(found)}. Calibrate for that, or use "
                "Steps(schedule.steps) to place the full steps regardless"
            )

    def save(self, path: str | Path) -> None:
        """Write the JSON file that `Schedule.load` reads; whole or not at all."""
        write_json(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = asdict(self)
        made_for = {**values.pop("made_for"), "scheduler_config": json.loads(self.made_for.scheduler_config)}
        return {"format": FORMAT, **plain(values), "made_for": made_for}

    def __str__(self) -> str:
        full = f"{len(self.steps)} of {self.num_steps} steps full"
        if self.deeper:
            full += f", {len(self.deeper)} from branch {self.deeper_branch}"
        return f"Calibrated({full}, branch {self.branch}, forecast {self.forecast}, {self.made_for.scheduler})"


def letters(steps: Collection[int], deeper: Collection[int], num_steps: int) -> str:
    """The steps of a run: F full, s shallow, t from the deeper skip connection on."""
    kinds = {**dict.fromkeys(deeper, "t"), **dict.fromkeys(steps, "F")}
    return "".join(kinds.get(step, "s") for step in range(num_steps))


def parse(values: object) -> Calibrated:
    """The schedule that these plain values, as of `Calibrated.to_dict`, describe.

    Raises:
        ScheduleError: an entry is missing, unknown, or holds what it cannot; the message names it.
    """
    outer = _checked(values, _OUTER, "", ("search",))
    made_for = _checked(outer["made_for"], _MADE_FOR, "made_for.")
    achieved = _checked(outer["achieved"], _ACHIEVED, "achieved.")
    steps, num_steps, branch = outer["steps"], outer["num_steps"], outer["branch"]
    deeper, deeper_branch = outer["deeper"], outer["deeper_branch"]
    for name in ("steps", "deeper"):
        if (last := max(outer[name], default=0)) >= num_steps:
            raise ScheduleError(f"{name} must be below num_steps, which is {num_steps}, got {last}")
    if set(steps) & set(deeper):
        raise ScheduleError(f"deeper must name no full step, got {sorted(set(steps) & set(deeper))}")
    if deeper and deeper_branch is None:
        raise ScheduleError("deeper_branch must be a branch where there are deeper steps, got None")
    return Calibrated(
        steps=tuple(steps),
        num_steps=num_steps,
        forecast=outer["forecast"],
        branch=check_branch(branch),
        made_for=MadeFor(**{**made_for, "scheduler_config": json.dumps(made_for["scheduler_config"], sort_keys=True)}),
        achieved=Achieved(**achieved),
        library=outer["library"],
        deeper=tuple(deeper),
        deeper_branch=None if deeper_branch is None else check_branch(deeper_branch),
    )


def _load(path: Path) -> Calibrated:
    values = read_json(path)
    search = values.get("search") if isinstance(values, dict) else None
    if isinstance(search, dict) and search.get("complete") is not True:
        raise ScheduleError(
            f"the search that writes {path} is unfinished: calibrate with the same settings to go on, with a smaller "
            "trials= to take the best so far"
        )
    try:
        return parse(values)
    except ScheduleError as error:
        raise ScheduleError(f"{path} is no calibrated schedule: {error}") from error


# Entries: (what holds it, in words).

_Check = tuple[Callable[[Any], bool], str]


def _is_steps(value: Any) -> bool:
    return _is_rising(value) and value[:1] == [0]


def _is_rising(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_natural, value)) and all(a < b for a, b in pairwise(value))


def _is_branch(value: object) -> bool:
    return is_natural(value) or (isinstance(value, list) and len(value) == 2 and all(map(is_natural, value)))


_TEXT: _Check = (lambda value: isinstance(value, str) and bool(value), "text")
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_NUMBER: _Check = (is_number, "a number of at least 0")
_COUNT: _Check = (lambda value: is_natural(value) and value > 0, "an integer of at least 1")
_OUTER: Mapping[str, _Check] = {
    "format": (lambda value: value == FORMAT, repr(FORMAT)),
    "library": _TEXT,
    "steps": (_is_steps, "rising step numbers, the first of them 0"),
    "num_steps": _COUNT,
    "forecast": (lambda value: is_natural(value) and value <= 2, "0, 1 or 2"),
    "branch": (_is_branch, "a number of at least 0 or [block, layer]"),
    "deeper": (_is_rising, "rising step numbers"),
    "deeper_branch": (
        lambda value: value is None or _is_branch(value),
        "a number of at least 0, [block, layer] or null",
    ),
    "made_for": _OBJECT,
    "achieved": _OBJECT,
}
_MADE_FOR = {"model": _TEXT, "model_config": _TEXT, "scheduler": _TEXT, "scheduler_config": _OBJECT}
_ACHIEVED = {
    "metric": _TEXT,
    "error": _NUMBER,
    "uniform_error": _NUMBER,
    "cost": _NUMBER,
    "images": _COUNT,
    "trials": _COUNT,
    "plain_error": (lambda value: value is None or is_number(value), "a number of at least 0 or null"),
}


def _checked(
    values: object, checks: Mapping[str, _Check], where: str, optional: Sequence[str] = ()
) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ScheduleError(f"it must hold a JSON object, got {values!r:.80}")
    for name, (holds, wording) in checks.items():
        if name not in values:
            raise ScheduleError(f"{where}{name} is missing")
        if not holds(values[name]):
            raise ScheduleError(f"{where}{name} must be {wording}, got {values[name]!r:.80}")
    unknown = sorted(values.keys() - checks.keys() - set(optional))
    if unknown:
        raise ScheduleError(f"{where}{unknown[0]} is unknown")
    return values
