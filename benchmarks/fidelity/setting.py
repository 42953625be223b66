"""What an arm of the fidelity benchmark is, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fidelity.cases import Case
from benchmarks.fidelity.models import Model, UNetCost


@dataclass(frozen=True)
class Setting:
    """A case and what an arm needs to know to set itself up."""

    model: Model
    case: Case
    cost: UNetCost
    work: Path = Path("build/fidelity/calibrated")
    """Where an interrupted calibration goes on from."""


@dataclass(frozen=True)
class Arm:
    """One way to make images."""

    name: str
    about: str
    applied: Callable[[Setting], AbstractContextManager[Any]]
    """The model made to work this way, for the length of a with block."""
    cached: bool = True
    """True where `deepcache_fx.report` tells the calls and their MACs."""
    timed: bool = True
    """False where the time is not that of the method."""
    intervals: bool = True
    """False where there is one row for all intervals."""
    steps: Callable[[Setting], int] = lambda setting: setting.case.steps
    usual: bool = True
    """False where it is run by name alone."""
    order: int | None = None
    """Of the forecast, where all cases of that order can do with the same programs: only their schedules differ."""
    calls: Callable[[Setting, str], str] = lambda setting, calls: calls
    """(setting, the calls made, all full) -> those that count; for arms that are not `cached`."""


def uniform_calls(steps: int, interval: int) -> str:
    """The UNet calls of a uniform 1:N run, F full and s shallow."""
    return "".join("s" if step % interval else "F" for step in range(steps))
