"""What is checked before anything runs: the options of a node, and the file of a calibrated schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import deepcache_fx
from deepcache_fx import Calibrated, Schedule, ScheduleError

from .caching import Settings
from .unet import UNetOfTensors


@dataclass(frozen=True)
class OfLength(Schedule):
    """The steps of a calibrated schedule, for a UNet whose class and configuration diffusers would call otherwise."""

    found: Calibrated
    needs_num_steps: ClassVar[bool] = True

    def is_full(self, step: int, num_steps: int | None) -> bool:
        """As the file says.

        Raises:
            ScheduleError: the run has another number of steps.
        """
        return self.found.is_full(step, num_steps)


def calibrated(name: str, folder: Path) -> Schedule:
    """The schedule in a file of this folder.

    Raises:
        ScheduleError: there is no such file in it, or what is wrong with the file.
    """
    path = (folder / name).resolve()
    if folder.resolve() not in path.parents:
        raise ScheduleError(f"{name!r} is not in ComfyUI's input folder: put the file there, and give its name alone")
    if not path.is_file():
        raise ScheduleError(f"there is no {name!r} in ComfyUI's input folder: put the file there")
    found = Schedule.load(path)
    if found.deeper:
        raise ScheduleError(f"{name!r} has steps that begin at branch {found.deeper_branch}, which the node has not")
    return OfLength(found)


def check(settings: Settings) -> None:
    """Raise a DeepCacheError where options make no sense, or do not go together."""
    deepcache_fx.optimize(
        UNetOfTensors(torch.nn.Identity()),
        interval=settings.interval,
        branch=settings.branch,
        forecast=settings.forecast,
        backend=settings.backend,
        precision=settings.precision,
    )
    if settings.start >= settings.end:
        raise deepcache_fx.OptionError(
            f"start_percent must be less than end_percent, got {settings.start} and {settings.end}"
        )
