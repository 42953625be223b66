"""A schedule that `calibrate` found, with what it was made for and what it achieves. No tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from deepcache_fx.branch import Branch
from deepcache_fx.errors import ScheduleError
from deepcache_fx.files import write_json
from deepcache_fx.made_for import MadeFor, plain
from deepcache_fx.schedule import Schedule
from deepcache_fx.schedule_search import Candidate

FORMAT = "deepcache_fx calibrated schedule 1"
"""First entry of the file. Another number: the meaning of an entry has changed."""


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
        return Candidate(self.steps, self.forecast, self.deeper).letters(self.num_steps)

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
