"""The benchmark suite measures what it says: through the real runner, on a tiny model, and on hand-made numbers."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import benchmarks.speed.arms
import benchmarks.speed.runner
import benchmarks.speed.setup
import benchmarks.speed.subjects
from benchmarks import settings_check
from benchmarks.environment import environment
from benchmarks.speed.__main__ import expand, latent_size, numbers, run_cases, select_arms
from benchmarks.speed.__main__ import main as speed_main
from benchmarks.speed.arms import Arm, Prepared, all_arms
from benchmarks.speed.call_profile import _union, profile_call
from benchmarks.speed.cases import Case, Derived, Measured, Quantiles, Result, Work, derive, over
from benchmarks.speed.measure import StepTimer, plainly
from benchmarks.speed.pipelines import Stage
from benchmarks.speed.profile import category, profile_step
from benchmarks.speed.profiles import profiles_section, read_profiles
from benchmarks.speed.report import BEGIN, END, is_results, replace_section
from benchmarks.speed.report import main as report_main
from benchmarks.speed.roofline import Rates, contractions
from benchmarks.speed.runner import Group, describe, equal_macs_steps
from benchmarks.speed.setup import Settings
from benchmarks.speed.store import ResultsFile, read_results
from benchmarks.speed.subjects import KINDS, Subject
from benchmarks.speed.targets import TARGETS, targets_table
from deepcache_fx.execution import openvino
from deepcache_fx.graph import pass_order
from deepcache_fx.planning.presets import PRESETS, Preset
from deepcache_fx.runtime.attach import runtime_of
from tests.families import family, thorough

CASE = Case("tiny", 8, 8, 1, "fp32", "cpu", 4, 1, 0, "eager")
QUICK = Settings(rounds=1, pipeline_rounds=1, end_to_end_rounds=0, details=False)
FACTS = {"commit": "abc", "device_name": "a test", "date": "2026-01-01", "command": "pytest"}
WORK = Work(1000, 100, 80, 10, 0.5, 0.05, 2e3, 1e9)


def case(arm: str, interval: int = 1, **changes: object) -> Case:
    return dataclasses.replace(CASE, arm=arm, interval=interval, **changes)  # type: ignore[arg-type]


def quantiles(median: float) -> Quantiles:
    return Quantiles(median, median * 0.9, median * 1.1, 3)


# Through the real runner.


@pytest.fixture(scope="module")
def arms() -> dict[str, Arm]:
    """All of them but for the passes to leave out, of which one will do."""
    every = all_arms(backend="eager")  # Dynamo's: what Inductor generates is not at stake here
    without = [name for name in every if "-without-" in name]
    return {name: arm for name, arm in every.items() if name not in without[1:]}


@pytest.fixture
def known_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not matter how much work a model is, nobody counts it."""
    monkeypatch.setattr(benchmarks.speed.runner, "count_work", lambda *arguments: WORK)
    monkeypatch.setattr(benchmarks.speed.runner, "measure_rates", lambda *arguments: None)


@pytest.fixture(scope="module")
def measured(arms: dict[str, Arm], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """All arms of the tiny model in one run, and the file they are in."""
    path = tmp_path_factory.mktemp("results") / "speed-cpu.json"
    cases = list(expand(CASE, arms, [2]))
    settings = Settings(rounds=1, minutes=20, pipeline_rounds=1, end_to_end_rounds=0)
    rows = run_cases(cases, arms, settings, ResultsFile(path), FACTS)
    return path, {row.case.arm: row for row in rows}


@thorough
def test_every_arm_has_a_row_with_numbers_or_a_reason(
    measured: tuple[Path, dict[str, Result]], arms: dict[str, Arm]
) -> None:
    _, rows = measured
    assert set(rows) == set(arms)
    absent = {name: row.reason for name, row in rows.items() if row.status == "absent"}
    for name in ("ours-cuda-graphs", "ours-eager-cuda-graphs"):
        assert absent.pop(name) == "CUDA graphs need a CUDA device"
    assert absent.pop("ours-fuse-group-norm") == "Triton kernels need a CUDA device"
    if not openvino.is_available() or not openvino.has_bf16():
        absent = {name: reason for name, reason in absent.items() if "openvino" not in name}
    assert absent in ({}, {"pruna": "pruna is not installed"})
    for name, row in rows.items():
        if row.status != "absent":
            assert (row.status, row.reason) == ("measured", ""), name
            assert row.measured.loop is not None, name
            assert row.measured.pipeline is not None, name
            assert row.measured.kernels_full, name
            assert row.measured.peak_bytes, name


def test_what_cannot_run_says_why() -> None:
    known = all_arms()
    on_cuda, half = (dataclasses.replace(CASE, **change) for change in ({"device": "cuda"}, {"dtype": "bf16"}))
    for name in ("ours-openvino", "ours-openvino-bf16", "openvino"):
        assert known[name].refuse(on_cuda) == "OpenVINO is used on the CPU alone"
        assert known[name].refuse(CASE) == "openvino is not installed"  # as far as the tests can tell
    for name in ("eager-bf16", "helper-bf16"):
        assert known[name].refuse(half) == "the model is cast from fp32, and this one is bf16"
        assert known[name].refuse(CASE) is None
    assert known["compile-freezing"].refuse(on_cuda) == "freezing is measured on the CPU"


@thorough
def test_the_arms_of_openvino_and_bfloat16_run_and_are_as_exact_as_their_precision(
    auto_finds_openvino: None, known_work: None, tmp_path: Path
) -> None:
    names = ["eager", "openvino", "ours-openvino-bf16", "helper-bf16"]
    chosen = {name: arm for name, arm in all_arms().items() if name in names and arm.refuse(CASE) is None}
    cases = list(expand(CASE, chosen, [2]))
    rows = {row.case.arm: row for row in run_cases(cases, chosen, QUICK, ResultsFile(tmp_path / "rows.json"), FACTS)}
    assert {row.status for row in rows.values()} == {"measured"}, [row.reason for row in rows.values()]
    assert rows["openvino"].measured.error is not None
    assert rows["openvino"].measured.error < 1e-5
    assert rows["openvino"].measured.kinds == "FFFF"
    for name in names[2:]:
        if name in rows:
            assert rows[name].measured.error is not None
            assert 1e-4 < rows[name].measured.error < 0.5
            assert rows[name].measured.kinds == "FsFs"


def test_what_is_compared_with_the_published_code_repeats_the_cached_feature() -> None:
    stage = Stage(Subject(CASE), decode=False)
    arms = all_arms(backend="eager")
    orders = {}
    for name in ("ours-eager", "ours-compile", "ours-uncached", "ours-max-autotune", "ours-forecast"):
        runtime = runtime_of(arms[name].prepare(stage, 2).unet)
        assert runtime is not None
        orders[name] = runtime.options.forecast
    assert orders.pop("ours-forecast") == 1
    assert set(orders.values()) == {0}


@thorough
def test_a_cached_run_is_full_and_shallow_in_turn_and_as_exact_as_the_published_code(
    measured: tuple[Path, dict[str, Result]],
) -> None:
    _, rows = measured
    for name in ("ours-eager", "ours-compile", "helper", "helper-compile"):
        found = rows[name].measured
        assert found.kinds == "FsFs", name
        assert found.shallow_step is not None, name
        assert found.shallow_step.count == 2, name
        assert found.error is not None, name
        assert found.error > 1e-3, name
        assert found.error_helper is not None, name
        assert found.error_helper < 1e-6, name
        assert found.kernels_shallow is not None, name
        assert found.kernels_full is not None, name
        assert found.kernels_shallow < found.kernels_full / 2, name
    assert rows["compile"].measured.kinds == "FFFF"
    assert rows["compile"].measured.error is not None
    assert rows["compile"].measured.error < 1e-6


@thorough
def test_the_bare_loop_and_the_pipeline_make_the_same_call_so_that_one_capture_serves_both(
    measured: tuple[Path, dict[str, Result]],
) -> None:
    _, rows = measured
    assert rows["ours-eager"].measured.notes == ()  # a second capture would be noted


@thorough
def test_the_control_takes_as_many_steps_as_a_cached_run_pays_for(measured: tuple[Path, dict[str, Result]]) -> None:
    _, rows = measured
    control = rows["eager-fewer-steps"]
    assert control.work is not None
    assert control.measured.kinds == "F" * equal_macs_steps(4, 2, control.work)
    assert control.measured.error is not None
    assert control.measured.error > 0.01


@thorough
def test_a_resumed_run_measures_only_what_is_missing(
    measured: tuple[Path, dict[str, Result]], arms: dict[str, Arm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = measured
    kept = [row.to_dict() for row in rows.values() if row.case.arm != "eager-channels-last"]
    monkeypatch.setattr(benchmarks.speed.runner, "count_work", lambda *arguments: rows["eager"].work)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(kept))
    store = ResultsFile(copy)
    cases = list(expand(CASE, arms, [2]))
    prepared: list[str] = []
    original = benchmarks.speed.runner.set_up

    def set_up(arm: Arm, *rest: object) -> object:
        prepared.append(arm.name)
        return original(arm, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmarks.speed.runner, "set_up", set_up)
    again = {row.case.arm: row for row in run_cases(cases, arms, QUICK, store, FACTS)}
    assert prepared == ["eager", "eager-channels-last"]  # eager as what others are compared with
    assert again["eager-channels-last"].status == "measured"
    assert again["eager-channels-last"].derived.over_eager is not None
    assert again["eager"] == rows["eager"]
    prepared.clear()
    run_cases(cases, arms, QUICK, ResultsFile(copy), FACTS)
    assert prepared == []
    assert not ResultsFile(copy).done(case("eager"), "another commit")


@thorough
def test_a_warm_start_is_measured_in_a_new_process(tmp_path: Path) -> None:
    facts = benchmarks.speed.setup._in_a_new_process(
        case("ours-compile", 2), "ours-compile", 2, tmp_path / "cache", "eager"
    )
    assert set(facts) == {"warm_seconds"}
    assert facts["warm_seconds"] > 0


def test_a_warm_start_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nKeyError: 'x'\n")
    monkeypatch.setattr(benchmarks.speed.setup.subprocess, "run", lambda *arguments, **options: failed)
    facts = benchmarks.speed.setup._in_a_new_process(case("ours-compile", 2), "ours-compile", 2, tmp_path, "eager")
    assert facts == {"notes": ("no warm start: exit code 1, KeyError: 'x'",)}


@pytest.mark.usefixtures("known_work")
def test_what_a_control_runs_is_measured_along_without_a_row_of_its_own(tmp_path: Path) -> None:
    store = ResultsFile(tmp_path / "rows.json")
    rows = run_cases([case("eager-fewer-steps", 2)], all_arms(), QUICK, store, FACTS)
    assert [(row.case.arm, row.status, row.measured.kinds) for row in rows] == [
        ("eager-fewer-steps", "measured", "F" * equal_macs_steps(4, 2, WORK))
    ]
    assert len(store.rows) == 1
    assert rows[0].derived.over_eager is not None


@thorough
def test_the_report_is_made_of_the_rows_and_rewrites_only_its_section_of_the_page(
    measured: tuple[Path, dict[str, Result]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    path, rows = measured
    (tmp_path / "speed.json").write_text(path.read_text())
    (tmp_path / "other.json").write_text('{"not": "rows"}')
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    report_main(tmp_path, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "\nold\n" not in text
    speedup = rows["ours-eager"].derived.over_eager
    assert speedup is not None
    assert f"| {speedup:.2f} |" in next(line for line in text.splitlines() if line.startswith("| ours-eager |"))
    assert "ours-cuda-graphs 1:2: absent, CUDA graphs need a CUDA device" in text
    names = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.usefixtures("known_work")
def test_an_arm_that_raises_is_a_failed_row_and_the_others_are_measured(tmp_path: Path) -> None:
    def broken(stage: Stage, interval: int) -> Prepared:
        raise RuntimeError("no luck at /some/where/file.py\nsecond line")

    arms = {**select_arms("eager", all_arms()), "broken": Arm("broken", "raises", broken, compiles=True)}
    cases = [case("eager"), case("broken", 2)]
    rows = run_cases(cases, arms, QUICK, ResultsFile(tmp_path / "rows.json"), FACTS)
    assert [(row.case.arm, row.status) for row in rows] == [("eager", "measured"), ("broken", "failed")]
    assert rows[1].reason == "RuntimeError: no luck at file.py"
    assert rows[1].measured.loop is None


@pytest.mark.usefixtures("known_work")
def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    arms = select_arms("eager,helper", all_arms())
    settings = dataclasses.replace(QUICK, minutes=0, rounds=3)
    store = ResultsFile(tmp_path / "rows.json")
    rows = run_cases([case("eager"), case("helper", 2)], arms, settings, store, FACTS)
    assert rows[0].measured.rounds == 1
    assert (rows[1].status, rows[1].reason) == ("left out", "no time left of 0 minutes")
    assert not store.done(rows[1].case, "abc")


@pytest.mark.usefixtures("known_work")
def test_rows_are_in_the_file_before_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    store = ResultsFile(path)
    seen: list[list[str]] = []

    def put(rows: list[Result]) -> None:
        store.put(rows)
        seen.append([row.status for row in read_results(path)])

    Group(select_arms("eager", all_arms()), dataclasses.replace(QUICK, rounds=2), FACTS, put).run([case("eager")])
    assert seen == [["partial"], ["partial"], ["partial"], ["measured"]]


@pytest.mark.usefixtures("known_work")
def test_the_command_line_measures_and_resumes(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(speed_main)
    path = tmp_path / "rows.json"
    command = [
        "--model=tiny",
        "--arms=eager",
        "--steps=2",
        "--rounds=1",
        "--device=cpu",
        "--latent=8",
        f"--json={path}",
    ]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    rows = read_results(path)
    assert [(row.case.arm, row.status, row.case.steps) for row in rows] == [("eager", "measured", 2)]
    assert str(tmp_path) not in path.read_text()
    wrong = CliRunner().invoke(app, ["--model=tiny", "--arms=nonsense", "--device=cpu"])
    assert wrong.exit_code == 2
    assert "no such arm: nonsense" in wrong.output


@thorough
def test_a_profile_says_where_the_time_of_a_shallow_step_goes(tmp_path: Path) -> None:
    arms = all_arms()
    profile = profile_step(case("ours-eager", 2), arms["ours-eager"], "shallow")
    assert profile.calls.count > 10
    assert sum(seconds for _, seconds in profile.categories().values()) <= 1.01 * profile.calls.span
    assert profile.categories()["convolution"][0] >= 4
    (tmp_path / "profile-tiny.json").write_text(json.dumps(profile.to_dict()))
    section = profiles_section(read_profiles(tmp_path))
    assert section.startswith("### Shallow step of tiny 8x8, batch 1, fp32, ours-eager on ")
    count = profile.categories()["convolution"][0]
    assert f"| convolution | {count} |" in section
    with pytest.raises(ValueError, match="has no shallow step"):
        profile_step(case("eager", 2), arms["eager"], "shallow")


@thorough
@pytest.mark.usefixtures("auto_finds_openvino")
def test_a_profile_of_an_openvino_step_is_told_by_openvinos_own_counters() -> None:
    arms = all_arms()
    profile = profile_step(case("ours-openvino", 2), arms["ours-openvino"], "full")
    categories = profile.categories()
    assert {"attention", "convolution", "matrix product", "normalisation"} <= set(categories)
    assert sum(count for count, _ in categories.values()) == profile.calls.count
    assert 0 < profile.calls.busy <= profile.calls.span
    shallow = profile_step(case("ours-openvino", 2), arms["ours-openvino"], "shallow")
    assert 0 < shallow.categories()["convolution"][0] < categories["convolution"][0]


# Models and arms.

TINY_SDXL = dict(
    benchmarks.speed.subjects.TINY.config,
    cross_attention_dim=32,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
)
TINY_VIDEO = dict(
    _class_name="UNetSpatioTemporalConditionModel",
    in_channels=8,
    out_channels=4,
    num_frames=2,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    cross_attention_dim=16,
    num_attention_heads=2,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
)
TINY_DDPM = dict(
    _class_name="UNet2DModel",
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=8,
)


@pytest.mark.parametrize(
    ("model", "config"),
    family(
        [
            ("sdxl", dict(TINY_SDXL, projection_class_embeddings_input_dim=6 * 8 + 16)),
            ("sdxl-refiner", dict(TINY_SDXL, projection_class_embeddings_input_dim=5 * 8 + 32)),
            ("svd", TINY_VIDEO),
            ("ddpm-church", TINY_DDPM),
            ("ldm4-imagenet", dict(benchmarks.speed.subjects.TINY.config, in_channels=3, out_channels=3)),
        ],
        "sdxl-refiner",
        "ddpm-church",
    ),
)
def test_every_kind_of_model_runs_bare_and_through_its_own_pipeline(
    model: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        benchmarks.speed.subjects, "find_preset", lambda name: Preset(name, "none", config, 2, 8, 8, tokens=None)
    )
    subject = Subject(dataclasses.replace(CASE, model=model))
    stage = Stage(subject, decode=False)
    prepared = all_arms()["eager"].prepare(stage, 1)
    latents = subject.denoise(prepared.unet, prepared.scheduler, 2, plainly)
    assert latents.shape == subject.latents.shape
    assert bool(torch.isfinite(latents).all())
    assert (prepared.pipeline is None) == (model == "ldm4-imagenet")
    if prepared.pipeline is not None:
        assert type(prepared.pipeline).__name__ == KINDS[model].pipeline
        assert bool(torch.isfinite(stage.run(prepared.pipeline, 2)).all())


def test_there_is_a_kind_for_every_preset() -> None:
    assert set(KINDS) == {"tiny", *PRESETS}


def test_a_clone_shares_the_weights_until_it_is_converted() -> None:
    subject = Subject(CASE)
    clone = subject.clone()
    name = "conv_in.weight"
    assert clone.get_parameter(name).data_ptr() == subject.unet.get_parameter(name).data_ptr()
    clone.to(memory_format=torch.channels_last)
    assert clone.get_parameter(name).is_contiguous(memory_format=torch.channels_last)
    assert subject.unet.get_parameter(name).is_contiguous()


def test_a_new_default_pass_is_a_new_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def sharpen_pencils(gm: torch.fx.GraphModule) -> None: ...

    before = set(all_arms())
    assert {"ours-without-canonicalize", "ours-without-refresh-rate", "ours-without-prompt-rate"} <= before
    monkeypatch.setattr(pass_order, "DEFAULT_PASSES", (*pass_order.DEFAULT_PASSES, sharpen_pencils))
    assert set(all_arms()) - before == {"ours-without-sharpen-pencils"}


def test_an_arm_that_caches_nothing_is_measured_once_for_all_intervals() -> None:
    arms = select_arms("eager,helper,helper-c*", all_arms())
    cases = list(expand(CASE, arms, [2, 3]))
    assert [(c.arm, c.interval) for c in cases] == [("eager", 1), ("helper", 2), ("helper", 3), ("helper-compile", 3)]


@pytest.mark.parametrize(("text", "size"), [("32", (32, 32)), ("72x128", (72, 128)), ("published", (64, 64))])
def test_latent_sizes_are_read(text: str, size: tuple[int, int]) -> None:
    assert latent_size(text, "sd15") == size


@pytest.mark.parametrize("text", ["a", "1,", "0", "2,-1"])
def test_wrong_lists_of_numbers_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        numbers(text)


# Numbers.


def test_a_row_survives_the_way_through_its_file(tmp_path: Path) -> None:
    work = Work(800, 100, 80, 10, 0.8, 0.1, 1e3, 1e2)
    found = Measured(rounds=2, kinds="Fs", loop=quantiles(2.0), notes=("one", "two"), kernels_full=7, error=0.0)
    row = Result(case("helper", 2), "measured", "", found, work, Derived(bound=1.5), {"commit": "abc", "threads": 2})
    absent = Result(case("pruna", 2), "absent", "pruna is not installed", environment={"commit": "abc"})
    path = tmp_path / "rows.json"
    ResultsFile(path).put([row, absent])
    assert read_results(path) == [row, absent]
    assert is_results(path)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(item.to_dict()) + "\n" for item in (row, absent)))
    assert read_results(lines) == [row, absent]


def test_an_unfinished_row_does_not_replace_a_finished_one(tmp_path: Path) -> None:
    store = ResultsFile(tmp_path / "rows.json")
    facts = {"commit": "abc"}
    done = Result(CASE, "measured", measured=Measured(rounds=3), environment=facts)
    store.put([Result(CASE, "partial", environment=facts)])
    store.put([done])
    store.put([Result(CASE, "failed", "late", environment=facts)])
    assert ResultsFile(store.path).rows == {(CASE.key, "abc"): done}


def test_derived_numbers_of_a_hand_made_measurement() -> None:
    work = Work(1000, 100, 0, 0, floor_full=0.5, floor_shallow=0.05, macs_per_second=2e3, bytes_per_second=1e9)
    found = Measured(
        kinds="FssFss",
        loop=quantiles(4.0),
        pipeline=quantiles(5.0),
        eager_loop=quantiles(12.0),
        eager_pipeline=quantiles(12.5),
        full_step=quantiles(1.0),
        shallow_step=quantiles(0.25),
    )
    derived = derive(case("ours-eager", 3, steps=6), found, work)
    assert derived.bound == pytest.approx(6 / (2 + 4 * 0.1))
    assert derived.over_eager == pytest.approx(3.0)
    assert derived.pipeline_over_eager == pytest.approx(2.5)
    assert derived.end_to_end_over_eager is None
    assert derived.shallow_share == pytest.approx(0.25)
    assert derived.macs_share == pytest.approx(0.1)
    assert derived.over_itself == pytest.approx(6 * 1.0 / (2 * 1.0 + 4 * 0.25))
    assert derived.bound_reached == pytest.approx(2.0 / 2.5)
    assert derived.floor_distance == pytest.approx(5.0)


def test_derived_numbers_of_an_uncached_arm() -> None:
    work = Work(1000, 100, 0, 0, 0.5, 0.05, 2e3, 1e9)
    found = Measured(kinds="FFFF", loop=quantiles(4.0), eager_loop=quantiles(8.0), full_step=quantiles(1.0))
    derived = derive(case("compile"), found, work)
    assert (derived.bound, derived.over_itself, derived.shallow_share) == (1.0, 1.0, None)
    assert derived.over_eager == 2.0
    assert derived.floor_distance == 2.0


def test_what_was_not_measured_gives_no_number() -> None:
    assert derive(case("eager"), Measured(), None) == Derived()


def test_drift_between_runs_cancels_in_a_speedup_over_another_arm() -> None:
    def row(arm: str, seconds: float, eager_seconds: float) -> Result:
        found = Measured(kinds="FFFF", loop=quantiles(seconds), eager_loop=quantiles(eager_seconds))
        return Result(case(arm), "measured", "", found, None, derive(case(arm), found, None))

    ours, compiled = row("ours-compile", 2.0, 8.0), row("compile", 10.0, 20.0)  # the machine was slower by then
    assert over(ours, compiled) == pytest.approx(2.0)
    assert over(ours, None) is None


@pytest.mark.parametrize(("steps", "interval", "share", "expected"), [(50, 5, 0.1, 14), (6, 3, 0.5, 4), (2, 2, 0.0, 1)])
def test_equal_macs_steps(steps: int, interval: int, share: float, expected: int) -> None:
    work = Work(1000, int(1000 * share), 0, 0, 0.0, 0.0, 1.0, 1.0)
    assert equal_macs_steps(steps, interval, work) == expected


def test_quantiles_are_of_the_samples() -> None:
    assert Quantiles.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Quantiles(3.0, pytest.approx(1.8), pytest.approx(4.2), 5)
    assert Quantiles.of([]) is None


def test_the_floor_of_a_contraction_is_its_slower_half() -> None:
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = graph.call_function(torch.ops.aten.mm.default, (x, weight))
    relu = graph.call_function(torch.ops.aten.relu.default, (product,))
    for node, shape in ((x, (4, 8)), (weight, (8, 16)), (product, (4, 16)), (relu, (4, 16))):
        node.meta["val"] = torch.empty(shape, device="meta")
    (only,) = contractions(graph.nodes)
    assert (only.macs, only.bytes) == (4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16))
    assert only.floor(Rates(1.0, 1e9)) == 512.0
    assert only.floor(Rates(1e9, 1.0)) == 896.0


def test_overlapping_kernels_are_busy_once() -> None:
    assert _union([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 6.0)]) == 4.0
    assert _union([]) == 0.0


def test_a_profiled_call_counts_outermost_operators_and_what_they_allocate() -> None:
    linear = torch.nn.Linear(256, 512)
    x = torch.randn(64, 256)
    with torch.no_grad():
        result, seen = profile_call(lambda: linear(x).relu(), torch.device("cpu"))
    assert result.shape == (64, 512)
    assert seen.count == 2  # linear and relu; addmm and its like are called by linear
    assert seen.peak_bytes is not None
    assert 2 * 64 * 512 * 4 <= seen.peak_bytes < 4 * 64 * 512 * 4
    assert seen.busy <= seen.span


def test_a_step_timer_gives_one_time_per_call_in_order() -> None:
    timer = StepTimer(torch.device("cpu"))
    results = [timer(index, lambda count=count: sum(range(count))) for index, count in enumerate((1_000_000, 1))]
    assert results == [499999500000, 0]
    slow, fast = timer.seconds()
    assert slow > fast > 0


def test_categories_come_from_kernel_names() -> None:
    names = {
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolution",
        "flash_fwd_kernel": "attention",
        "nvjet_hsh_128x256": "matrix product",
        "triton_poi_fused_silu_3": "fused by Inductor",
        "aten::addmm": "matrix product",
        "void mystery()": "other",
    }
    assert {name: category(name) for name in names} == names


def test_targets_are_met_missed_or_not_measured_by_the_rows_alone() -> None:
    def row(arm: str, interval: int, loop: float) -> Result:
        found = Measured(1, "FssFss", loop=quantiles(loop), eager_loop=quantiles(6.0))
        own = case(arm, interval, model="sd15", height=32)
        return Result(own, "measured", "", found, None, derive(own, found, None), FACTS)

    rows = [row("eager", 1, 6.0), row("helper", 2, 2.0), row("ours-eager", 3, 2.0), row("ours-eager", 2, 2.5)]
    lines = targets_table([rows]).splitlines()[2:]
    assert len(lines) == len(TARGETS)
    on_cpu = [line for line in lines if line.startswith("| cpu | sd15 |")]
    assert on_cpu[0].endswith("| loop over eager | >= 2.3 | 3 | met |")
    assert on_cpu[1].endswith("| loop over DeepCacheSDHelper | >= 1 | 0.8 | **missed** |")
    assert on_cpu[2].endswith("| >= 1 |  | not measured |")
    assert all(line.endswith("|  | not measured |") for line in lines if line.startswith("| cuda |") or "64x64" in line)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no section between"):
        replace_section("# Title\n", "new")
    assert replace_section(f"a{BEGIN}b{END}c", "new") == f"a{BEGIN}\nnew\n{END}c"


def test_results_hold_no_host_name_and_no_directory() -> None:
    facts = environment("cpu")
    text = json.dumps({name: value for name, value in facts.items() if name != "device_name"})
    assert str(Path.cwd()) not in text
    assert str(Path.home()) + "/" not in text
    assert socket.gethostname() not in text
    assert {"commit", "command", "torch", "diffusers", "python", "threads"} <= set(facts)
    assert describe(ValueError("see /a/b/c.py:3")) == "ValueError: see c.py:3"


def test_every_look_at_a_models_settings_is_timed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "looks.json"
    monkeypatch.setattr("sys.argv", ["settings_check", "--model", "tiny", "--rounds", "5", "--json", str(path)])
    settings_check.main()
    written = json.loads(path.read_text())
    (row,) = written["models"]
    assert (row["model"], row["call"]["repeated"]["count"]) == ("tiny", 5)
    assert all(0 < row[look]["fastest"] <= row[look]["repeated"]["low"] for look in ("call", "run", "read"))
    assert row["call"]["fastest"] < row["run"]["fastest"] < row["read"]["fastest"]
    assert written["environment"]["device_name"]
    assert "tiny" in capsys.readouterr().out
