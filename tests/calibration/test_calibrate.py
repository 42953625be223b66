"""calibrate(): what it finds, what it costs to ask again, and that the pipeline comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers import UNet2DModel as DDPMUNet

import deepcache_fx
from deepcache_fx import DeepCacheError, Schedule, ScheduleError
from deepcache_fx.calibration.calibrate import full_steps_for
from deepcache_fx.calibration.runs import Measured, Runs
from deepcache_fx.calibration.search import Candidate, uniform
from deepcache_fx.schedules.schedule import Calibrated
from tests import small
from tests.families import thorough

PROMPTS = ["a cat", "a dog"]
STEPS, BUDGET, TRIALS = 7, 3, 10
QUICK = dict(disable="all")  # captured in half the time
SETTINGS: dict[str, Any] = dict(
    budget=BUDGET, steps=STEPS, trials=TRIALS, seed=5, forecast=(0, 1), optimize_arguments=QUICK, **small.SIZE
)


def calibrate(pipe: Any = None, prompts: Any = PROMPTS, **changes: Any) -> Calibrated:
    settings = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not ...}
    return deepcache_fx.calibrate(pipe or small.pipeline(), prompts, **settings)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    """What the search of `found` told its progress function."""
    return []


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrated") / "schedule.json"


@pytest.fixture(scope="module")
def found(file: Path, told: list[tuple[str, int, int]]) -> Calibrated:
    return calibrate(out=file, progress=lambda *words: told.append(words))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """Every candidate that is run from here on."""
    asked: list[Candidate] = []
    run = Runs.error

    def error(self: Runs, candidate: Candidate, limit: float) -> tuple[float, int]:
        asked.append(candidate)
        return run(self, candidate, limit)

    monkeypatch.setattr(Runs, "error", error)
    return asked


def evaluations(file: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(file.read_text())["search"]["evaluations"]
    return listed


def generate(pipe: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(5 + index) for index in range(len(PROMPTS))]
    call = dict(num_inference_steps=STEPS, generator=generators, output_type="latent", **small.SIZE)
    images: torch.Tensor = pipe(PROMPTS, **call).images
    return images


def test_meets_the_budget_and_is_at_least_as_good_as_uniform_in_every_order(found: Calibrated, file: Path) -> None:
    assert len(found.steps) == BUDGET
    assert (found.num_steps, found.branch) == (STEPS, 0)
    assert found.achieved.error <= found.achieved.uniform_error
    even = "".join("F" if step in uniform(STEPS, BUDGET) else "s" for step in range(STEPS))
    errors = {e["forecast"]: e["error"] for e in evaluations(file) if e["steps"] == even}
    assert errors.keys() == {0, 1}
    assert found.achieved.error <= min(errors.values())
    assert found.achieved.uniform_error == errors[found.forecast]
    assert found.achieved.error == min(e["error"] for e in evaluations(file))


def test_the_figures_are_those_of_plain_runs(found: Calibrated) -> None:
    uncached = generate(small.pipeline())
    assert found.options == dict(schedule=found, branch=found.branch, forecast=found.forecast)
    pipe = deepcache_fx.optimize(small.pipeline(), **found.options, **QUICK)
    cached = generate(pipe)
    report = deepcache_fx.report(pipe)
    assert report.last_run == "".join("F" if step in found.steps else "s" for step in range(STEPS))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(cached, uncached, strict=True)]
    assert found.achieved.error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    [signature] = report.signatures
    share = (BUDGET * signature.full_macs + (STEPS - BUDGET) * signature.shallow_macs) / STEPS / signature.full_macs
    assert found.achieved.cost == pytest.approx(share)
    assert (found.achieved.images, found.achieved.metric, found.library) == (2, "latents", deepcache_fx.__version__)


def test_the_file_is_the_schedule(found: Calibrated, file: Path) -> None:
    assert Schedule.load(file) == found


def test_progress_is_told_of_every_trial(found: Calibrated, told: list[tuple[str, int, int]]) -> None:
    assert told[0] == ("capturing", 0, TRIALS)
    assert [done for _, done, _ in told[1:]] == list(range(1, found.achieved.trials + 1))
    assert all(total == TRIALS for _, _, total in told)
    assert told[-1][0].startswith("error 0.")
    assert f"with {BUDGET} of {STEPS} steps full" in told[-1][0]


def test_a_finished_search_runs_nothing_again(
    found: Calibrated, file: Path, judged: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = small.pipeline()
    monkeypatch.setattr(type(pipe), "__call__", property(lambda _: pytest.fail("the pipeline was called")))
    monkeypatch.setattr("deepcache_fx.calibration.runs.Job.check", lambda _: None)
    before = file.read_text()
    assert calibrate(pipe, out=file) == found
    assert file.read_text() == before
    fewer = calibrate(pipe, out=file, trials=4)
    assert fewer.achieved.trials == 4
    assert calibrate(pipe, out=file) == found
    assert judged == []


def test_is_deterministic_and_goes_on_where_it_was_interrupted(
    found: Calibrated, tmp_path: Path, judged: list[Candidate]
) -> None:
    out = tmp_path / "schedule.json"
    pipe = deepcache_fx.optimize(small.pipeline(), interval=4, **QUICK)
    pipe.set_progress_bar_config(disable=True, colour="red")
    expected = generate(pipe)
    scheduler = type(pipe.scheduler)

    def interrupt(stage: str, done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, out=out, progress=interrupt)
    assert len(evaluations(out)) == 5
    with pytest.raises(ScheduleError, match="unfinished"):
        Schedule.load(out)

    # The pipeline is as it was: its settings, its captures, its own progress bar.
    assert pipe._progress_bar_config == {"disable": True, "colour": "red"}
    assert "interval=4" in deepcache_fx.report(pipe).schedule
    assert torch.equal(generate(pipe), expected)
    assert deepcache_fx.report(pipe).captures == 1
    assert type(pipe.scheduler).__name__ == scheduler.__name__
    deepcache_fx.restore(pipe)
    assert type(pipe.unet) is UNet2DConditionModel

    judged.clear()
    assert calibrate(out=out) == found
    assert len(judged) == found.achieved.trials - 5
    assert Schedule.load(out) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 9}, "steps is 7 there and 9 here"),
        ({"budget": 4}, "budget is 3 there and 4 here"),
        ({"budget": ..., "target_error": 0.5}, r"budget is 3 there and None here; target_error is None there and 0\.5"),
        ({"seed": 6}, "seed is 5 there and 6 here"),
        ({"forecast": 1}, r"forecast is \[0, 1\] there and \[1\] here"),
        ({"branch": 1}, "branch is 0 there and 1 here"),
        ({"metric": "images"}, "metric is 'latents' there and 'images' here"),
        ({"prompts": ["a cow"]}, r"prompts is \['a cat', 'a dog'\] there and \['a cow'\] here"),
        ({"guidance_scale": 2.0}, r"call_arguments is .*16} there and .*'guidance_scale': 2\.0.* here"),
        ({"optimize_arguments": {}}, "optimize_arguments is {'disable': 'all'} there and {} here"),
    ],
)
def test_a_file_from_other_settings_is_refused_with_both(
    found: Calibrated, file: Path, changes: dict[str, Any], message: str
) -> None:
    before = file.read_text()
    with pytest.raises(DeepCacheError, match=rf"schedule\.json comes from other settings: .*{message}.*delete this"):
        calibrate(out=file, **changes)
    assert file.read_text() == before


def test_a_file_from_other_weights_or_another_scheduler_is_refused(found: Calibrated, file: Path) -> None:
    tuned = small.pipeline()
    tuned.unet.conv_in.weight.data.add_(0.1)
    with pytest.raises(DeepCacheError, match=r"weights is '\w+' there and '\w+' here"):
        calibrate(tuned, out=file)
    euler = small.pipeline()
    euler.scheduler = EulerDiscreteScheduler.from_config(euler.scheduler.config)
    with pytest.raises(DeepCacheError, match="scheduler is 'DDIMScheduler' there and 'EulerDiscreteScheduler' here"):
        calibrate(euler, out=file)
    with pytest.raises(ScheduleError, match="EulerDiscreteScheduler, not DDIMScheduler"):
        found.check(euler.unet, euler.scheduler)
    found.check(tuned.unet, tuned.scheduler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format="x"), "holds no search to go on with"),
        (lambda s: s.pop("search"), "holds no search to go on with"),
        (lambda s: s["search"].pop("settings"), "holds no search to go on with"),
        (lambda s: s["search"].pop("measured"), "measured must hold num_steps, full_macs, shallow_macs, deeper_macs"),
        (lambda s: s["search"]["measured"].update(num_steps=-1), "each an integer of at least 0"),
        (lambda s: s["search"]["measured"].update(full_macs=0), "above 0"),
        (lambda s: s["search"].update(evaluations={}), "evaluations must be a list"),
        (lambda s: s["search"]["evaluations"].append(3), "an evaluation must hold steps .7 letters.* got 3"),
        (lambda s: s["search"]["evaluations"][0].update(steps="Fs"), "7 letters: F full, s shallow"),
        (lambda s: s["search"]["evaluations"][0].update(steps="sFsFsFs"), "an evaluation must hold"),
        (lambda s: s["search"]["evaluations"][0].update(steps="FsFsFs?"), "an evaluation must hold"),
        (lambda s: s["search"]["evaluations"][0].update(forecast=True), "an evaluation must hold"),
        (lambda s: s["search"]["evaluations"][0].update(error="low"), "an evaluation must hold"),
        (lambda s: s["search"]["evaluations"][0].pop("images"), "an evaluation must hold"),
    ],
)
def test_a_file_that_cannot_be_gone_on_with_is_refused(
    found: Calibrated, file: Path, tmp_path: Path, change: Any, message: str
) -> None:
    out = tmp_path / "broken.json"
    values = json.loads(file.read_text())
    change(values)
    out.write_text(json.dumps(values))
    with pytest.raises(DeepCacheError, match=message):
        calibrate(out=out)


def test_one_order_alone_is_all_that_is_tried_and_a_plain_pipeline_is_plain_again(judged: list[Candidate]) -> None:
    pipe = small.pipeline()
    del pipe._progress_bar_config
    classes = type(pipe.unet), type(pipe.scheduler)
    assert calibrate(pipe, forecast=(0,), trials=3).forecast == 0
    assert [candidate.forecast for candidate in judged] == [0, 0, 0]
    assert (type(pipe.unet), type(pipe.scheduler)) == classes
    assert "_progress_bar_config" not in vars(pipe)


def test_the_fewest_full_steps_for_an_error(found: Calibrated, judged: list[Candidate]) -> None:
    target = found.achieved.error * 1.001
    reached = calibrate(budget=..., target_error=target, forecast=(found.forecast,), trials=20)
    assert reached.achieved.error <= target
    assert len(reached.steps) <= BUDGET
    assert reached.achieved.cost <= found.achieved.cost


def test_a_share_of_the_arithmetic_pays_for_as_many_full_steps_as_fit() -> None:
    measured = Measured(num_steps=10, full_macs=100, shallow_macs=20)
    assert [full_steps_for(share, measured) for share in (0.28, 0.35, 0.36, 0.999)] == [1, 1, 2, 9]
    for full in range(1, 10):
        assert full_steps_for(measured.cost(full), measured) == full
    with pytest.raises(DeepCacheError, match=r"budget must be at least 0\.280, .* got 0\.2"):
        full_steps_for(0.2, measured)
    with pytest.raises(DeepCacheError, match="budget must be at most the 10 steps of a run, got 11"):
        full_steps_for(11, measured)


@thorough
def test_a_bad_schedule_is_not_run_to_the_end_and_the_choice_is_the_same(
    found: Calibrated, tmp_path: Path, judged: list[Candidate]
) -> None:
    out = tmp_path / "a.json"
    split = calibrate(batch_size=1, out=out)
    assert (split.steps, split.forecast) == (found.steps, found.forecast)
    assert split.achieved.error == pytest.approx(found.achieved.error, rel=1e-4)
    made = [entry["images"] for entry in evaluations(out)]
    assert set(made) == {1, 2}
    judged.clear()
    assert calibrate(batch_size=1, out=out) == split
    assert judged == []


@thorough
def test_a_scheduler_with_more_steps_than_asked_for_is_calibrated_for_those_it_makes() -> None:
    pipe = small.pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    found = calibrate(pipe, trials=2, forecast=0)
    assert found.num_steps == STEPS + 1
    generate(deepcache_fx.optimize(pipe, **found.options))
    assert deepcache_fx.report(pipe).last_run.count("F") == BUDGET


def test_an_optimised_pipeline_refuses_it_in_a_run_of_other_length(found: Calibrated) -> None:
    pipe = deepcache_fx.optimize(small.pipeline(), **found.options, **QUICK)
    with pytest.raises(ScheduleError, match=f"calibrated for {STEPS} steps, and the run has 5 steps"):
        pipe("a cat", num_inference_steps=5, output_type="latent", **small.SIZE)
    unet = deepcache_fx.optimize(small.pipeline().unet, **found.options, **QUICK)
    with pytest.raises(ScheduleError, match="needs the number of denoising steps"):
        with torch.no_grad():
            unet(torch.zeros(1, 4, 16, 16), 7, torch.zeros(1, 12, 16))


def unconditional() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = DDPMUNet(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    return DDPMPipeline(unet.eval(), DDPMScheduler())


@thorough
def test_a_pipeline_without_prompts_takes_the_number_of_images() -> None:
    sizes = dict(height=..., width=...)
    found = calibrate(unconditional(), 3, trials=3, forecast=1, batch_size=2, **sizes)
    assert found.achieved.images == 3
    assert 0 < found.achieved.error <= found.achieved.uniform_error
    with pytest.raises(DeepCacheError, match="DDPMPipeline does not take prompt; pass the number of images instead"):
        calibrate(unconditional(), **sizes)


@thorough
def test_decoded_images_can_be_compared(found: Calibrated, file: Path) -> None:
    images = calibrate(trials=1, metric="images", forecast=0)
    assert images.achieved.metric == "images"
    [latents] = [e["error"] for e in evaluations(file)[:1] if e["forecast"] == 0]
    assert images.achieved.error != pytest.approx(latents, rel=1e-2)


def test_weights_that_give_no_numbers_are_refused() -> None:
    pipe = small.pipeline()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(DeepCacheError, match="values that are not finite"):
        calibrate(pipe, trials=1, forecast=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": ...}, "either budget or target_error"),
        ({"target_error": 0.1}, "either budget or target_error"),
        ({"budget": 0}, "budget must be a number of full steps, or a share between 0 and 1, got 0"),
        ({"budget": 1.0}, r"got 1\.0"),
        ({"budget": 2.5}, r"got 2\.5"),
        ({"budget": True}, "got True"),
        ({"budget": "17"}, "got '17'"),
        ({"budget": ..., "target_error": 0}, "target_error must be a number above 0, got 0"),
        ({"budget": ..., "target_error": float("inf")}, "got inf"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, r"batch_size must be an integer of at least 1, got 1\.5"),
        ({"prompts": []}, "the number of prompts must be an integer of at least 1, got 0"),
        ({"prompts": "a cat"}, "prompts must be a list of prompts, got one: 'a cat'"),
        ({"forecast": ()}, "forecast must name at least one order"),
        ({"forecast": (0, 3)}, "forecast must be .* got 3"),
        ({"branch": -1}, "branch must be"),
        ({"metric": "fid"}, "metric must be one of latents, images, got 'fid'"),
        ({"hight": 16}, "StableDiffusionPipeline does not take hight"),
        ({"generator": torch.Generator()}, "calibrate sets generator itself"),
        ({"pipe": torch.nn.Linear(1, 1)}, r"takes a diffusers pipeline with a \.unet, got Linear"),
        ({"optimize_arguments": {"backend": 3}}, "backend must be"),
        ({"out": "no/such/place.json"}, "no directory no/such"),
    ],
)
def test_refuses_what_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeepCacheError, match=message):
        calibrate(**changes)


def test_deeper_steps_are_taken_where_they_help_within_the_budget(tmp_path: Path, judged: list[Candidate]) -> None:
    file = tmp_path / "deeper.json"
    settings = dict(deeper=2, trials=24, forecast=1, out=file)
    found = calibrate(**settings)
    assert found.achieved.plain_error is not None
    assert found.achieved.error <= found.achieved.plain_error <= found.achieved.uniform_error
    assert any(candidate.deeper for candidate in judged)
    measured = Measured(**json.loads(file.read_text())["search"]["measured"])
    assert measured.shallow_macs < measured.deeper_macs < measured.full_macs
    assert found.achieved.cost == measured.cost(len(found.steps), len(found.deeper)) <= measured.cost(BUDGET) + 1e-9
    assert {e["error"] for e in evaluations(file)} >= {found.achieved.error, found.achieved.plain_error}
    tried = len(judged)
    assert calibrate(**settings) == found == Schedule.load(file)
    assert len(judged) == tried  # gone on with: nothing is run again
    # The figure is that of a plain run.
    best = next(c for c in judged if (c.steps, c.deeper) == (found.steps, found.deeper))
    pipe = deepcache_fx.optimize(small.pipeline(), **found.options, **QUICK)
    cached, uncached = generate(pipe), generate(small.pipeline())
    assert deepcache_fx.report(pipe).last_run == best.letters(STEPS)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(cached, uncached, strict=True)]
    assert found.achieved.error == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"budget": ..., "target_error": 0.1}, "deeper needs a budget, and an order of the forecast above 0"),
        ({"forecast": 0}, "deeper needs a budget, and an order of the forecast above 0"),
        ({"deeper": -1}, "branch must be a number of at least 0"),
        ({"deeper": 0}, "must be deeper than optimize's branch 0"),
    ],
)
def test_a_deeper_branch_that_makes_no_sense_is_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(DeepCacheError, match=error):
        calibrate(**{"deeper": 2, **changes})
