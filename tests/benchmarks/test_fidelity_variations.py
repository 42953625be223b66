"""The arms that compare the library with what it does not do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

import deepcache_fx
from benchmarks.fidelity.arms import all_arms
from benchmarks.fidelity.cases import Case
from benchmarks.fidelity.models import Model, UNetCost, load_model
from benchmarks.fidelity.setting import Setting
from benchmarks.fidelity.variations import Drift, _closest, positions
from tests.families import thorough

CASE = Case("t2i", "0", "ddim", 9, 1, 0, 0, "float32", "cpu", "", 3)


@pytest.fixture(scope="module")
def model() -> Model:
    found = load_model("t2i", device="cpu")
    found.use_sampler("ddim")
    return found


def images(model: Model, arm: str, **changes: object) -> torch.Tensor:
    case = dataclasses.replace(CASE, arm=arm, **changes)  # type: ignore[arg-type]
    with all_arms()[arm].applied(Setting(model, case, UNetCost(1.0, 0.1, 0, 0))):
        return model.generate(range(case.images), steps=case.steps, seed=case.seed)


def test_the_log_snr_is_that_of_the_noise_a_scheduler_adds() -> None:
    scheduler = DDIMScheduler()
    places = positions(scheduler, "log-snr", 10)
    scheduler.set_timesteps(10)
    for place, timestep in zip(places, scheduler.timesteps, strict=True):
        signal = scheduler.add_noise(torch.ones(1), torch.zeros(1), timestep)
        noise = scheduler.add_noise(torch.zeros(1), torch.ones(1), timestep)
        assert place == pytest.approx(2 * math.log(float(signal) / float(noise)), abs=1e-3)


def test_the_sigmas_are_those_of_the_scheduler_that_has_them() -> None:
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    assert positions(scheduler, "sigma", 10) == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-2)


def test_positions_leave_the_scheduler_as_it_is() -> None:
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(20)
    before = scheduler.timesteps.clone()
    assert len(positions(scheduler, "log-snr", 7)) == 8  # PLMS takes one step more
    assert torch.equal(scheduler.timesteps, before)


@thorough
def test_over_evenly_spaced_timesteps_the_abscissa_makes_no_difference_and_over_sigma_it_does(model: Model) -> None:
    by_step = images(model, "forecast-1")
    assert torch.allclose(images(model, "forecast-1-over-timestep"), by_step, atol=1e-5)
    assert not torch.allclose(images(model, "forecast-1-over-sigma"), by_step, atol=1e-3)


@thorough
def test_forecasting_features_is_another_approximation(model: Model) -> None:
    sums, features = images(model, "forecast-1"), images(model, "forecast-1-of-features")
    assert not torch.equal(sums, features)
    assert torch.allclose(sums, features, atol=0.2)


@thorough
def test_the_adaptive_arm_makes_about_as_many_full_steps_as_uniform(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.fidelity.variations.ADAPTIVE_IMAGES", 1)
    case = dataclasses.replace(CASE, arm="adaptive")
    with all_arms()["adaptive"].applied(Setting(model, case, UNetCost(1.0, 0.1, 0, 0))):
        model.generate([0], steps=9, seed=1)
        assert abs(deepcache_fx.report(model.pipe).last_run.count("F") - 3) <= 1


def test_a_drift_is_summed_up_from_the_last_full_step_of_this_run() -> None:
    drift = Drift(0.25)

    def see(value: float) -> None:
        drift.see(torch.nn.Identity(), (), (torch.full((2,), value),))

    see(1.0)
    assert not drift(1)
    see(1.2)
    assert not drift(2)
    see(1.32)
    assert drift(3)  # 0.2 + 0.1
    see(1.4)
    assert not drift(4)
    see(-5.0)  # the first step of another run
    assert not drift(1)


def counts(at_zero: int) -> Callable[[float], int]:
    return lambda threshold: max(1, round(at_zero / (1 + 10 * threshold)))


@pytest.mark.parametrize("wanted", [1, 2, 5, 10])
def test_the_threshold_is_found_by_halving(wanted: int) -> None:
    assert abs(counts(50)(_closest(counts(50), wanted)) - wanted) <= 1
