"""What is checked before anything runs: the options of a node, and the file of a calibrated schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comfyui.caching import Settings
from comfyui.schedules import calibrated, check
from deepcache_fx import DeepCacheError, ScheduleError
from deepcache_fx.schedules.made_for import MadeFor
from deepcache_fx.schedules.schedule import Achieved, Calibrated


def write(folder: Path, **changes: Any) -> Calibrated:
    """A file as `calibrate` writes it, in this folder."""
    found = Calibrated(
        steps=(0, 3, 4),
        num_steps=6,
        forecast=1,
        branch=0,
        made_for=MadeFor("UNet2DConditionModel", "0", "DDIMScheduler", "{}"),
        achieved=Achieved("latents", 0.1, 0.2, 0.5, 16, 40),
        library="0.1.0",
    )
    found = replace(found, **changes)
    found.save(folder / "schedule.json")
    return found


def test_a_file_in_the_folder_is_a_schedule_for_runs_of_its_length(tmp_path: Path) -> None:
    found = write(tmp_path)
    schedule = calibrated("schedule.json", tmp_path)
    assert schedule.full_steps(found.num_steps) == list(found.steps)
    with pytest.raises(ScheduleError, match="was calibrated for"):
        schedule.full_steps(found.num_steps + 1)


@pytest.mark.parametrize("name", ["../schedule.json", "/etc/hostname", "other.json", ""])
def test_no_file_outside_of_the_folder_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "input").mkdir()
    write(tmp_path)
    with pytest.raises(ScheduleError, match="input folder"):
        calibrated(name, tmp_path / "input")


def test_a_schedule_with_deeper_steps_is_refused(tmp_path: Path) -> None:
    write(tmp_path, deeper=(1,), deeper_branch=3)
    with pytest.raises(ScheduleError, match="begin at branch 3"):
        calibrated("schedule.json", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(precision="bf16", backend="eager"),
        Settings(interval=0),
        Settings(start=0.5, end=0.5),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_the_node(settings: Settings) -> None:
    with pytest.raises(DeepCacheError):
        check(settings)
    check(Settings())
