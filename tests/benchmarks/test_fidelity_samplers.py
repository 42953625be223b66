"""Samplers that draw noise: the same noise for an image in every arm, and one capture for all of their cases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fidelity.arms import all_arms
from benchmarks.fidelity.cases import Case, Outcome, Row, RowsFile, Scores
from benchmarks.fidelity.class_conditional import ClassConditionalPipeline, load
from benchmarks.fidelity.judges import fashion_judge
from benchmarks.fidelity.models import Model, UNetCost
from benchmarks.fidelity.orders import each_kind, gain
from benchmarks.fidelity.report import grouped, write_report
from benchmarks.fidelity.samplers import SAMPLERS
from benchmarks.fidelity.sweep import Sweep
from deepcache_fx.comparing.loading import LoadError
from tests.families import thorough

CASE = Case("tiny", "0", "ddim", 6, 3, 0, 0, "float32", "cpu", "uncached", 1)
DRAWING = [name for name, sampler in SAMPLERS.items() if sampler.draws]


def case(arm: str, interval: int = 1, **changes: Any) -> Case:
    return dataclasses.replace(CASE, arm=arm, interval=interval, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
        norm_num_groups=4,
        add_attention=False,
    )
    path = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(unet, DDPMScheduler(clip_sample=True)).save_pretrained(path)
    pipe = load(path, dtype=torch.float32, device=torch.device("cpu"))
    return Model("tiny", pipe, ClassConditionalPipeline.prompts)


@pytest.fixture
def sweep(model: Model, tmp_path: Path) -> Sweep:
    judge = fashion_judge(model, real=torch.rand(40, 1, 28, 28))
    found = Sweep(model, judge, all_arms(), RowsFile(tmp_path / "rows.json"), {}, batch=2, work=tmp_path / "work")
    found._costs[0] = UNetCost(10.0, 1.0, 0, 0)
    return found


def cached(sampler: str, arm: str, *intervals: int) -> list[Case]:
    plain = dataclasses.replace(CASE, sampler=sampler, images=2)
    return [plain, *(dataclasses.replace(plain, arm=arm, interval=interval) for interval in intervals)]


class Draws(TorchDispatchMode):
    """Notices the operators that consume random numbers, whatever generator they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


# Noise.


def seen_drawing(model: Model) -> tuple[torch.Tensor, bool]:
    """Two images, and whether a step of the scheduler drew random numbers."""
    scheduler, draws = model.pipe.scheduler, Draws()
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        with draws:
            return original(*args, **kwargs)

    with mock.patch.object(scheduler, "step", step):
        return model.generate(range(2), steps=4, seed=4), draws.drawn


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_sampler_draws_is_of_the_images_seeds_and_not_of_the_process_nor_the_batch(
    sampler: str, model: Model
) -> None:
    model.use_sampler(sampler)
    torch.manual_seed(1)
    whole, draws = seen_drawing(model)
    assert draws == SAMPLERS[sampler].draws
    torch.manual_seed(2)
    assert torch.allclose(model.generate([1], steps=4, seed=4), whole[1:], atol=1e-3)


def test_a_cache_of_nothing_leaves_the_images_of_samplers_that_draw_noise_as_they_are(sweep: Sweep) -> None:
    cases = [cached(sampler, "repeat", 1) for sampler in DRAWING]
    sweep.run(*cases)
    for _, repeat in cases:
        scores = sweep.file.rows[repeat.key].scores
        assert scores.identical == 1.0 or (scores.psnr or 0.0) > 80.0, "to rounding: exact passes may reorder sums"


# Schedulers.


def test_a_sampler_keeps_the_noise_levels_and_the_prediction_of_the_pipelines_own_scheduler(model: Model) -> None:
    for name in SAMPLERS:
        model.use_sampler(name)
        config = model.pipe.scheduler.config
        assert (config.beta_start, config.beta_end, config.prediction_type) == (0.0001, 0.02, "epsilon")
        assert bool(config.get("use_karras_sigmas")) == (name == "dpm++-karras"), "whatever sampler was there before"
        assert config.get("algorithm_type", "") != "sde-dpmsolver++" or name == "dpm++-2m-sde"


def test_a_sampler_whose_package_is_missing_is_absent_with_the_reason_and_the_others_are_measured(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        @classmethod
        def from_config(cls, *args: Any, **kwargs: Any) -> None:
            raise ImportError("DPMSolverSDEScheduler requires the torchsde library")

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", Missing)
    sweep.run(cached("dpm++-sde", "fewer-steps", 2), cached("lcm", "fewer-steps", 2))
    rows = sweep.file.rows.values()
    assert {(row.case.sampler, row.status) for row in rows} == {("dpm++-sde", "absent"), ("lcm", "measured")}
    absent = "sampler 'dpm++-sde' cannot be used: DPMSolverSDEScheduler requires the torchsde library"
    assert all(absent in row.reason for row in rows if row.status == "absent")
    with pytest.raises(LoadError, match="scheduler 'none' is unknown"):
        sweep.model.use_sampler("none")


# One capture.


@pytest.fixture
def captures() -> Iterator[list[int]]:
    counted: list[int] = []
    export = torch.export.export

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return export(*args, **kwargs)

    with mock.patch.object(torch.export, "export", counting):
        yield counted


@thorough
def test_cases_that_differ_in_their_schedules_alone_share_one_capture(sweep: Sweep, captures: list[int]) -> None:
    sweep.run(cached("ddpm", "repeat", 2, 3), cached("lcm", "repeat", 2), cached("lcm", "power", 3))
    assert len(captures) == 1
    assert not hasattr(type(sweep.model.pipe.unet), "_deepcache_fx"), "nothing stays attached"
    together = {key: (row.outcome.calls, row.scores.psnr) for key, row in sweep.file.rows.items() if row.outcome}
    for cases in (cached("ddpm", "repeat", 2, 3), cached("lcm", "repeat", 2)):
        for each in cases[1:]:
            sweep.file.forget([each])
            sweep.run([each])
    apart = {key: (row.outcome.calls, row.scores.psnr) for key, row in sweep.file.rows.items() if row.outcome}
    assert len(captures) == 4
    for key, (calls, value) in together.items():
        assert apart[key] == (calls, value if value is None else pytest.approx(value, abs=1e-3))


@thorough
def test_every_order_of_the_forecast_is_captured_for_itself(sweep: Sweep, captures: list[int]) -> None:
    sweep.run(cached("ddpm", "repeat", 2), cached("ddpm", "forecast-1", 2, 3), cached("ddpm", "forecast-2", 2))
    assert len(captures) == 3
    assert [row.case.arm for row in sweep.file.rows.values()] == [
        "uncached", "repeat", "forecast-1", "forecast-1", "forecast-2",
    ]  # fmt: skip


# Which order.


def row(sampler: str, arm: str, psnr: float, **changes: Any) -> Row:
    outcome = Outcome("FsFsFs", 1.0, 0.5, Scores(psnr=psnr, identical=0.0))
    return Row(case(arm, 2, sampler=sampler, **changes), "measured", outcome=outcome)


ROWS = [
    row("ddim", "repeat", 30.0), row("ddim", "forecast-1", 33.0), row("ddim", "forecast-2", 34.5),
    row("euler", "repeat", 30.0), row("euler", "forecast-1", 31.0), row("euler", "forecast-2", 30.5),
    row("ddpm", "repeat", 20.0), row("ddpm", "forecast-1", 19.0),
    row("dpm++-karras", "repeat", 30.0), row("dpm++-karras", "forecast-1", 28.0),
    row("lcm", "repeat", 15.0), row("lcm", "forecast-1", 15.01), row("lcm", "forecast-2", 14.0),
]  # fmt: skip


def test_a_sampler_that_was_measured_twice_counts_once_with_the_most_images() -> None:
    more = [row("ddpm", "repeat", 20.0, images=9), row("ddpm", "forecast-1", 22.0, images=9)]
    _, lines = each_kind(grouped([*ROWS, *more]))
    assert lines[-1][:3] == ("draws noise", "6", "**+2.0**, - (1 of 1)")


def test_the_report_says_which_order_is_closest(tmp_path: Path) -> None:
    file = RowsFile(tmp_path / "results" / "fidelity-tiny.json")
    for each in ROWS:
        file.put(each)
    write_report(tmp_path / "results", tmp_path / "docs")
    text = (tmp_path / "docs" / "fidelity.md").read_text().split("## Which order")[1]
    assert "| draws noise | 6 | -1.0, - (0 of 1) |" in text


def test_a_kind_of_sampler_is_judged_by_the_median_of_its_groups_and_the_closest_order_is_bold() -> None:
    _, lines = each_kind(grouped(ROWS))
    assert [(line[0], line[1], line[2]) for line in lines] == [
        ("consistency", "6", "+0.0, -1.0 (1 of 1)"),
        ("deterministic", "6", "+2.0, **+2.5** (2 of 2)"),
        ("deterministic, uneven steps", "6", "-2.0, - (0 of 1)"),
        ("draws noise", "6", "-1.0, - (0 of 1)"),
    ]
    assert gain(ROWS[:3], 2, 2) == 4.5
    assert gain(ROWS[:3], 1, 3) is None
