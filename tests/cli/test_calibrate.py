"""The `calibrate` command: the schedule it writes, what it prints, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepcache_fx import Schedule
from deepcache_fx.cli import calibrate as cli_calibrate
from tests import command, small

QUICK = ("--steps", "5", "--height", "16", "--width", "16", "--trials", "3", "--forecast", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    small.pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments: str) -> tuple[int, str, str]:
    return command.run("calibrate", *arguments)


def refused(arguments: Sequence[str], message: str) -> None:
    command.refused(["calibrate", *arguments], message)


def test_writes_the_schedule_and_goes_on_from_it(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--model", model, "--prompt", "a cat", "--prompt", "a dog", "--scheduler", "euler", "--budget", "2"]
    command += ["--guidance-scale", "3", "--seed", "4", "--out", "schedule.json", *QUICK]
    code, output, error = run(*command)
    assert (code, error) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]
    found = Schedule.load("schedule.json")
    assert (len(found.steps), found.num_steps, found.forecast) == (2, 5, 1)
    assert (found.made_for.scheduler, found.achieved.images) == ("EulerDiscreteScheduler", 2)
    letters = "".join("F" if step in found.steps else "s" for step in range(5))
    cost = f"{found.achieved.cost:.1%}"
    for expected in (letters, "2 of 5", "1 (linear)", cost, f"{found.achieved.error:.3g}", "schedule: schedule.json"):
        assert expected in output
    settings = json.loads(Path("schedule.json").read_text())["search"]["settings"]
    assert settings["call_arguments"] == {"guidance_scale": 3.0, "height": 16, "width": 16}
    assert (settings["budget"], settings["seed"], settings["prompts"]) == (2, 4, ["a cat", "a dog"])

    def fail(*_: Any) -> None:
        pytest.fail("a schedule was run again")

    monkeypatch.setattr("deepcache_fx.calibration.runs.Runs.error", fail)
    assert run(*command) == (0, output, "")
    refused([*command, "--steps", "6"], "steps is 5 there and 6 here")


def test_ctrl_c_is_130_and_leaves_what_was_tried(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcache_fx.calibration.runs import Runs

    judge, asked = Runs.error, []

    def interrupt(self: Runs, *arguments: Any) -> tuple[float, int]:
        asked.append(arguments)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return judge(self, *arguments)

    monkeypatch.setattr(Runs, "error", interrupt)
    command = ["--model", model, "--prompt", "a cat", "--budget", "0.7", "--out", "a.json", *QUICK]
    assert run(*command) == (130, "", "deepcache-fx: interrupted\n")
    search = json.loads((tmp_path / "a.json").read_text())["search"]
    assert (search["complete"], len(search["evaluations"])) == (False, 2)
    assert run(*command)[0] == 0
    assert Schedule.load("a.json").achieved.trials == 3
    assert len(asked) == 4


def test_the_models_own_prompts_are_used_where_none_are_given(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def calibrate(pipe: Any, prompts: Sequence[str], **settings: Any) -> None:
        asked.update(settings, prompts=prompts)
        raise ValueError("height must be\n a multiple")

    monkeypatch.setattr(cli_calibrate, "calibrate", calibrate)
    monkeypatch.setattr("deepcache_fx.comparing.loading.read_prompts", lambda _: ("a cow",))
    command = ["--model", model, "--target-error", "0.1", "--out", "a.json", "--forecast", "0,2", "--branch", "1,0"]
    refused(
        [*command, "--metric", "images", "--batch-size", "4", "--backend", "openvino", "--precision", "fp32"],
        "height must be a multiple",
    )
    expected = dict(budget=None, target_error=0.1, forecast=(0, 2), branch=(1, 0), metric="images", trials=100)
    expected |= dict(
        batch_size=4,
        steps=50,
        seed=0,
        prompts=("a cow",),
        optimize_arguments={"backend": "openvino", "precision": "fp32"},
    )
    assert {name: asked[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model"),
        (("--model", "{model}"), "--out"),
        (("--model", "{model}", "--out", "a.json"), "either --budget or --target-error"),
        (("--model", "{model}", "--out", "a.json", "--budget", "2", "--target-error", "1"), "either --budget"),
        (("--model", "{model}", "--out", "a.json", "--budget", "much"), "'much' is no number"),
        (("--model", "{model}", "--out", "a.json", "--budget", "2", "--forecast", "x"), "'x' lists no numbers"),
        (("--model", "{model}", "--out", "a.json", "--budget", "2", "--metric", "fid"), "--metric"),
        (("--model", "{model}", "--out", "a.json", "--budget", "2", "--branch", "-1"), "'-1'"),
        (("--model", "{model}", "--out", "a.json", "--budget", "2", "--scheduler", "dmi"), "'dmi' is unknown"),
        (("--model", "{model}", "--out", "no/a.json", "--budget", "2"), "there is no directory no"),
        (("--model", "no/such/place", "--out", "a.json", "--budget", "2"), "there is no directory 'no/such/place'"),
        (("--model", "{model}", "--out", "a.json", "--budget", "2"), "suggests no prompts of its own"),
        (("--model", "{model}", "--out", "a.json", "--budget", "0", "--prompt", "x"), "got 0"),
        (("--model", "{model}", "--out", "a.json", "--budget", "nan", "--prompt", "x"), "got nan"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    model: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused([text.format(model=model) for text in arguments], message)
    assert list(tmp_path.iterdir()) == []


def test_a_deeper_skip_connection_is_named_as_the_branch_is(model: str) -> None:
    command = ["--model", model, "--prompt", "a cat", "--budget", "2", "--out", "a.json", *QUICK, "--trials", "8"]
    code, output, error = run(*command, "--deeper", "1,0")
    assert (code, error) == (0, "")
    assert "without deeper steps" in output
    assert Schedule.load("a.json").letters in output
    settings = json.loads(Path("a.json").read_text())["search"]["settings"]
    assert settings["deeper"] == [1, 0]
    refused([*command, "--deeper", "x"], "--deeper: 'x' is neither a number of at least 0 nor block,layer")
