"""The command line: what it writes, and that every mistake is one line on stderr and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from deepcache_fx.cli import compare as cli_compare
from deepcache_fx.cli import options
from deepcache_fx.cli import plan as cli_plan
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files import writing as files
from tests import command, small
from tests.command import run
from tests.families import thorough

QUICK = ("--steps", "4", "--height", "16", "--width", "16", "--repeats", "1", "--no-warmup", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    small.pipeline().save_pretrained(path)
    (path / "prompts.json").write_text('["a cat", "a dog", "a cow"]', encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default output.png lands in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refused(arguments: Sequence[str], message: str, tmp_path: Path) -> None:
    """With one line on stderr, and nothing is written."""
    command.refused(arguments, message)
    assert list(tmp_path.iterdir()) == []


def test_compare_writes_the_picture_the_numbers_and_a_table(model: str, tmp_path: Path) -> None:
    numbers = ("--json", "numbers.json")
    code, output, error = run("compare", "--model", model, "--interval", "2", *numbers, *QUICK)
    assert (code, error) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "output.png"]
    values = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert values["prompts"] == ["a cat", "a dog", "a cow"]
    assert (values["full_calls"], values["shallow_calls"]) == ([2], [2])
    assert (values["width"], values["height"], values["dtype"]) == (16, 16, "float32")
    assert values["psnr"] > 20
    assert values["forecast"] == "auto"
    assert "forecast auto" in " ".join(output.split())
    for expected in ("speed-up", "bound", f"{values['psnr']:.1f} dB", "2 full + 2 shallow", "picture: output.png"):
        assert expected in output
    with Image.open(tmp_path / "output.png") as picture:
        # Three columns of 16 pixels enlarged 24 times, two rows.
        assert picture.width > 3 * 384
        assert picture.height > 2 * 384


@pytest.mark.parametrize(
    ("baseline", "shown"),
    [
        ((4.2, 4.0, 4.0), "2.00x (2.00 to 2.10)"),
        ((4.0, 40.0, 4.0), "not measured"),
        ((32.0, 32.0, 32.0), "not measured"),
    ],
)
def test_a_speedup_that_the_times_do_not_bear_out_is_not_told(
    baseline: tuple[float, ...], shown: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(1, 3, 16, 16)
    told = types.SimpleNamespace(backend="eager", precision=None, forced_full={}, original_reasons={})
    found = small.comparison(
        image, image, baseline_seconds=baseline, optimized_seconds=(2.0, 2.0, 2.0), reports=(told,)
    )
    monkeypatch.setattr(cli_compare, "compare", lambda *_, **__: found)
    code, output, _ = run("compare", "--model", model, *QUICK)
    assert code == 0
    assert shown in output
    assert ("note: no speed-up is told: " in output) == (shown == "not measured")
    assert "16.00x" not in output


@thorough
def test_a_run_of_its_own_with_interval_one_finds_no_difference_to_speak_of(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepcache_fx.cli", "compare", "--model", model, "--prompt", "a cat"]
    command += ["--interval", "1", "--scheduler", "euler", "--out", "one.png", "--json", "one.json", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr == ""  # nothing of the libraries that diffusers imports where they are installed, either
    assert done.returncode == 0
    assert "the shallow variant never ran" in done.stdout
    assert "EulerDiscreteScheduler" in done.stdout
    values = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert values["prompts"] == ["a cat"]
    assert values["identical"] or values["psnr"] > 80  # sums in another order
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"


def test_ctrl_c_while_sampling_is_130_and_leaves_no_file(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers.DDIMScheduler.step", interrupt)
    code, output, error = run("compare", "--model", model, "--json", "a.json", *QUICK)
    assert (code, output, error) == (130, "", "deepcache-fx: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_leaves_no_file(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(*_: object, **__: object) -> object:
        image = torch.zeros(1, 3, 16, 16)
        return small.comparison(
            image, image, reports=(types.SimpleNamespace(backend="eager", precision=None, forced_full={}),)
        )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_compare, "compare", finished)
    monkeypatch.setattr(files.Path, "replace", interrupt)
    code, _, _ = run("compare", "--model", model, *QUICK)
    assert code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model"),
        (("--model", "{model}", "--colour", "red"), "--colour"),
        (("--model", "no/such/place"), "there is no directory 'no/such/place'"),
        (("--model", "."), "no model_index.json"),
        (("--model", "someone/something"), "cannot load 'someone/something'"),
        (("--model", "{model}", "--refiner", "./nowhere"), "there is no directory './nowhere'"),
        (("--model", "{model}", "--interval", "0"), "--interval"),
        (("--model", "{model}", "--branch", "top"), "'top'"),
        (("--model", "{model}", "--branch", "-1"), "'-1'"),
        (("--model", "{model}", "--branch", "1,2,3"), "'1,2,3'"),
        (("--model", "{model}", "--schedule", "random"), "--schedule"),
        (("--model", "{model}", "--schedule", "power", "--power", "0.5"), "got 0.5"),
        (("--model", "{model}", "--scheduler", "dmi"), "'dmi' is unknown: use one of ddim"),
        (("--model", "{model}", "--steps", "many"), "--steps"),
        (("--model", "{model}", "--dtype", "int8"), "int8"),
        (("--model", "{model}", "--device", "toaster"), "'toaster' cannot be used"),
        (("--model", "{model}", "--out", "picture.txt"), "'.txt'"),
        (("--model", "{model}", "--out", "no/a.png"), "there is no directory no"),
        (("--model", "{model}", "--json", "no/a.json"), "there is no directory no"),
        (("--model", "{model}", "--refiner", "{model}"), "does not take denoising_end"),
        (("--model", "{model}", "--scheduler", "lcm", "--steps", "60"), "50 x 1.0 is smaller"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    model: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused(["compare", *(text.format(model=model) for text in arguments)], message, tmp_path)


def test_a_branch_that_the_model_lacks_is_one_line_and_exit_code_2(model: str, tmp_path: Path) -> None:
    refused(["compare", "--model", model, "--branch", "99"], "branch 99 is out of range", tmp_path)


@pytest.mark.parametrize(("given", "expected"), [((), "auto"), (("--forecast", "0"), 0), (("--forecast", "2"), 2)])
def test_the_forecast_is_left_to_the_sampler_unless_asked_otherwise(
    model: str, given: tuple[str, ...], expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | str] = []

    def compare(*_: object, optimize_arguments: dict[str, int | str], **options: object) -> object:
        asked.append(optimize_arguments["forecast"])
        raise DeepCacheError("enough")

    monkeypatch.setattr(cli_compare, "compare", compare)
    run("compare", "--model", model, *given)
    assert asked == [expected]


def test_a_branch_is_a_number_or_a_pair() -> None:
    assert options.read_branch("3") == 3
    assert options.read_branch("1,2") == (1, 2)


def test_plan_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(cli_plan, "print_plan", lambda model, **options: asked.update(options, model=model))
    code, _, error = run("plan", "--model", "sd15", "--height", "512", "--batch", "2", "--json", "plan.json")
    assert (code, error) == (0, "")
    expected = dict(height=512, width=None, batch=2, dtype="float16", json=Path("plan.json"))
    assert asked == {"model": "sd15", **expected}


def test_an_error_of_plan_is_one_line_however_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def print_plan(*_: object, **__: object) -> object:
        raise DeepCacheError("no such\n  model")

    monkeypatch.setattr(cli_plan, "print_plan", print_plan)
    refused(["plan", "--model", "x"], "no such model", tmp_path)


def test_help_names_both_commands() -> None:
    code, output, _ = run("--help")
    assert code == 0
    assert "compare" in output
    assert "plan" in output
