"""A calibrated schedule: its file, and what it refuses to be used for."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from deepcache_fx import Schedule, ScheduleError, Steps
from deepcache_fx.schedules.made_for import MadeFor
from deepcache_fx.schedules.patterns import as_schedule
from deepcache_fx.schedules.schedule import FORMAT, Achieved, Calibrated, parse
from tests import compvis, models, small

MADE_FOR = MadeFor("UNet2DConditionModel", "0123456789abcdef", "DDIMScheduler", '{"beta_start": 0.1, "levels": [1, 2]}')
ACHIEVED = Achieved("latents", error=0.01, uniform_error=0.02, cost=0.5, images=4, trials=30)
FOUND = Calibrated((0, 2, 7), 10, 1, 0, MADE_FOR, ACHIEVED, "0.1.0")


def test_is_full_at_its_steps() -> None:
    assert FOUND.full_steps(10) == [0, 2, 7]
    assert FOUND.options == {"schedule": FOUND, "branch": 0, "forecast": 1}
    assert as_schedule(FOUND) is FOUND
    assert str(FOUND) == "Calibrated(3 of 10 steps full, branch 0, forecast 1, DDIMScheduler)"


def test_another_number_of_steps_is_refused_with_both_named() -> None:
    with pytest.raises(ScheduleError, match=r"calibrated for 10 steps, and the run has 20 steps.*Steps\(schedule"):
        FOUND.is_full(1, 20)
    with pytest.raises(ScheduleError, match=r"calibrated for 10 steps, and the run has an unknown number of steps"):
        FOUND.is_full(0, None)
    assert FOUND.needs_num_steps
    assert Steps(FOUND.steps).full_steps(20) == [0, 2, 7]  # the remedy


@pytest.mark.parametrize("branch", [3, (1, 0)])
def test_comes_back_from_its_file_as_it_was(branch: int | tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    written = Calibrated((0, 9), 10, 2, branch, MADE_FOR, ACHIEVED, "9.9")
    written.save(path)
    read = Schedule.load(path)
    assert read == written
    assert hash(read) == hash(written)
    assert Schedule.load(str(path)) == written
    assert json.loads(path.read_text())["made_for"]["scheduler_config"] == {"beta_start": 0.1, "levels": [1, 2]}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The values of a good file with one entry replaced, or removed where the value is `...`."""
    values = json.loads(json.dumps(FOUND.to_dict()))
    *outer, name = path.split(".")
    place = values
    for key in outer:
        place = place[key]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", ..., "format is missing"),
        ("format", "deepcache_fx calibrated schedule 2", f"format must be '{FORMAT}', got .* schedule 2"),
        ("library", 1, "library must be text, got 1"),
        ("library", "", "library must be text"),
        ("steps", ..., "steps is missing"),
        ("steps", "FssF", "steps must be rising step numbers"),
        ("steps", [], "steps must be rising step numbers, the first of them 0, got \\[\\]"),
        ("steps", [1, 2], "steps must be rising"),
        ("steps", [0, 5, 5], "steps must be rising"),
        ("steps", [0, 5, 2], "steps must be rising"),
        ("steps", [0, 1.5], "steps must be rising"),
        ("steps", [0, True], "steps must be rising"),
        ("steps", [0, 10], "steps must be below num_steps, which is 10, got 10"),
        ("num_steps", 0, "num_steps must be an integer of at least 1, got 0"),
        ("num_steps", "10", "num_steps must be an integer"),
        ("num_steps", True, "num_steps must be an integer"),
        ("forecast", 3, "forecast must be 0, 1 or 2, got 3"),
        ("forecast", None, "forecast must be"),
        ("branch", -1, "branch must be a number of at least 0 or"),
        ("branch", [1], "branch must be"),
        ("branch", [1, "0"], "branch must be"),
        ("made_for", [], "made_for must be an object"),
        ("made_for.model", ..., "made_for.model is missing"),
        ("made_for.model_config", 7, "made_for.model_config must be text"),
        ("made_for.scheduler", None, "made_for.scheduler must be text"),
        ("made_for.scheduler_config", "{}", "made_for.scheduler_config must be an object"),
        ("made_for.weights", "x", "made_for.weights is unknown"),
        ("achieved", None, "achieved must be an object"),
        ("achieved.metric", 1, "achieved.metric must be text"),
        ("achieved.error", "small", "achieved.error must be a number of at least 0, got 'small'"),
        ("achieved.error", -0.1, "achieved.error must be"),
        ("achieved.uniform_error", True, "achieved.uniform_error must be"),
        ("achieved.cost", ..., "achieved.cost is missing"),
        ("achieved.images", 0, "achieved.images must be an integer of at least 1"),
        ("achieved.trials", 1.5, "achieved.trials must be"),
        ("comment", "hello", "comment is unknown"),
    ],
)
def test_a_file_with_a_wrong_entry_is_refused_by_its_name(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ScheduleError, match=rf"schedule\.json is no calibrated schedule: .*{message}"):
        Schedule.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\x80\x04}.", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"format": NaN}', "is not JSON: NaN is no number"),
        (b'{"format": -Infinity}', "is not JSON: -Infinity is no number"),
        (b"[1, 2]", r"must hold a JSON object, got \[1, 2\]"),
        (b"null", "must hold a JSON object"),
        (b'{"search": {"complete": false}}', "unfinished: calibrate with the same settings to go on"),
    ],
)
def test_a_file_that_is_something_else_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(ScheduleError, match=message):
        Schedule.load(path)


def test_an_error_too_large_for_a_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(FOUND.to_dict()).replace("0.01", "1e999"))
    with pytest.raises(ScheduleError, match=r"achieved\.error must be a number"):
        Schedule.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot be read: No such file"):
        Schedule.load(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match="cannot be read: Is a directory"):
        Schedule.load(tmp_path)


def fit(unet: Any, scheduler: Any) -> Calibrated:
    return Calibrated((0, 2), 4, 0, 0, MadeFor.of(unet, scheduler), ACHIEVED, "0.1.0")


def test_another_model_or_scheduler_is_refused_by_what_differs(tmp_path: Path) -> None:
    unet, scheduler = small.pipeline().unet, models.scheduler()
    found = fit(unet, scheduler)
    found.save(tmp_path / "a.json")
    found = Schedule.load(tmp_path / "a.json")
    found.check(unet, scheduler)
    found.check(small.pipeline().unet, models.scheduler())
    found.check(unet)  # no scheduler is known
    with pytest.raises(ScheduleError, match="the scheduler is EulerDiscreteScheduler, not DDIMScheduler"):
        found.check(unet, EulerDiscreteScheduler.from_config(scheduler.config))
    with pytest.raises(ScheduleError, match=r"prediction_type of the DDIMScheduler is 'v_prediction', not 'epsilon'"):
        found.check(unet, DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction"))
    with pytest.raises(ScheduleError, match="this UNet2DConditionModel is configured otherwise"):
        found.check(models.sd_unet(), scheduler)
    with pytest.raises(ScheduleError, match="the model is CompVisUNet, not UNet2DConditionModel"):
        found.check(compvis.CompVisUNet(), scheduler)


def test_other_weights_and_entries_that_another_version_adds_are_no_difference() -> None:
    unet, scheduler = small.pipeline().unet, models.scheduler()
    found = fit(unet, scheduler)
    tuned = copy.deepcopy(unet)
    for parameter in tuned.parameters():
        parameter.data.add_(1)
    tuned.register_to_config(new_in_a_later_version=None, _private="x")
    later = models.scheduler()
    later.register_to_config(new_in_a_later_version=3)
    found.check(tuned, later)
    assert isinstance(tuned, UNet2DConditionModel)


def test_a_model_without_a_configuration_is_told_by_the_shapes_of_its_weights() -> None:
    scheduler = models.scheduler()
    found = fit(compvis.CompVisUNet(), scheduler)
    found.check(compvis.CompVisUNet(), scheduler)
    with pytest.raises(ScheduleError, match="this CompVisUNet is configured otherwise"):
        found.check(compvis.CompVisUNet(channels=16), scheduler)


def test_loading_a_schedule_imports_no_torch(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "a.json")
    code = (
        "import importlib.util, sys, types; pkg = types.ModuleType('deepcache_fx'); "
        "spec = importlib.util.find_spec('deepcache_fx'); pkg.__path__ = spec.submodule_search_locations; "
        "sys.modules['deepcache_fx'] = pkg; from deepcache_fx.schedules.schedule import Schedule; "
        "assert Schedule.load(sys.argv[1]).steps == (0, 2, 7); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], check=False).returncode == 0


DEEPER = replace(FOUND, deeper=(4, 9), deeper_branch=(1, 0), achieved=replace(ACHIEVED, plain_error=0.02))


def test_deeper_steps_are_kept_and_told(tmp_path: Path) -> None:
    DEEPER.save(tmp_path / "a.json")
    loaded = Schedule.load(tmp_path / "a.json")
    assert loaded == DEEPER
    assert loaded.letters == "FsFstssFst"
    assert [loaded.branch_at(step, 10) for step in (0, 4, 5, 9)] == [None, (1, 0), None, (1, 0)]
    assert loaded.branches == ((1, 0),)
    assert str(loaded).startswith("Calibrated(3 of 10 steps full, 2 from branch (1, 0), branch 0")
    assert FOUND.branches == ()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"deeper": [4, 10]}, "deeper must be below num_steps, which is 10, got 10"),
        ({"deeper": [9, 4]}, "deeper must be rising step numbers"),
        ({"deeper": [2, 4]}, "deeper must name no full step, got \\[2\\]"),
        ({"deeper_branch": None}, "deeper_branch must be a branch where there are deeper steps"),
        ({"deeper_branch": "1"}, "deeper_branch must be a number of at least 0, \\[block, layer\\] or null"),
    ],
)
def test_deeper_steps_that_make_no_sense_are_refused(changes: dict[str, object], error: str) -> None:
    with pytest.raises(ScheduleError, match=error):
        parse({**json.loads(json.dumps(DEEPER.to_dict())), **changes})
