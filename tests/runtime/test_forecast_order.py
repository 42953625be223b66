"""Which order of the forecast a run takes by itself."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import deepcache_fx
from deepcache_fx.options import Options
from deepcache_fx.runtime.forecast_order import NoiseDetector, has_uneven_steps, order_of
from tests import small
from tests.compvis import TIMESTEPS, CompVisUNet, denoise
from tests.families import family, thorough


def scheduler(name: str, **config: Any) -> Any:
    found = getattr(diffusers, name)(**config)
    found.set_timesteps(8)
    return found


def latents(pipe: Any, steps: int = 7, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    result: torch.Tensor = pipe(
        "a", num_inference_steps=steps, output_type="latent", generator=generator, **small.SIZE, **arguments
    ).images
    return result


@pytest.mark.parametrize(
    ("name", "config", "degree"),
    family(
        [
            ("DDIMScheduler", {}, 1),
            ("DPMSolverMultistepScheduler", {}, 1),
            ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0),
            ("EulerAncestralDiscreteScheduler", {}, 0),
            ("KDPM2AncestralDiscreteScheduler", {}, 0),
            ("DDPMScheduler", {}, 0),
            ("LCMScheduler", {}, 0),
        ],
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
        "LCMScheduler",
    ),
)
def test_a_scheduler_that_draws_noise_is_not_forecast(name: str, config: dict[str, Any], degree: int) -> None:
    pipe = small.pipeline()
    pipe.scheduler = getattr(diffusers, name)(**config)
    deepcache_fx.optimize(pipe, interval=2, backend="eager")
    found = latents(pipe)
    report = deepcache_fx.report(pipe)
    assert report.last_forecast.startswith(str(degree))
    assert ("draws noise" in report.last_forecast) == (degree == 0)
    assert report.last_forecast in str(report)
    deepcache_fx.optimize(pipe, interval=2, backend="eager", forecast=degree)
    torch.testing.assert_close(latents(pipe), found, rtol=1e-5, atol=1e-6)


@thorough
def test_noise_by_an_argument_of_the_call_counts_and_is_forgotten_by_the_next_run() -> None:
    pipe = small.pipeline()
    pipe.scheduler = diffusers.DDIMScheduler()
    deepcache_fx.optimize(pipe, interval=2, backend="eager")
    for eta, degree in ((0.0, "1"), (1.0, "0"), (0.0, "1")):
        latents(pipe, eta=eta)
        assert deepcache_fx.report(pipe).last_forecast[0] == degree
    assert deepcache_fx.report(pipe).captures == 1


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_order_given_by_the_user_is_obeyed(order: int) -> None:
    pipe = small.pipeline()
    pipe.scheduler = diffusers.LCMScheduler()
    deepcache_fx.optimize(pipe, interval=2, backend="eager", forecast=order)
    latents(pipe)
    assert deepcache_fx.report(pipe).last_forecast == f"{order} (as asked for)"


@thorough
def test_a_bare_unet_is_forecast_for_nobody_tells() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    found = denoise(unet, TIMESTEPS)
    assert deepcache_fx.report(unet).last_forecast == "1 (no scheduler tells whether noise is drawn)"
    assert torch.equal(found, denoise(deepcache_fx.optimize(CompVisUNet(), backend="eager", forecast=1), TIMESTEPS))


def test_few_uneven_steps_are_not_forecast() -> None:
    even, karras = (scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=karras) for karras in (False, True))
    assert not has_uneven_steps(even)
    assert has_uneven_steps(karras)
    assert order_of(Options(), 8, True).degree == 0
    assert order_of(Options(), 9, True).degree == 1
    assert order_of(Options(), 8, False).degree == 1


def test_timesteps_of_ones_own_are_looked_at() -> None:
    own = scheduler("DDIMScheduler")
    own.timesteps = torch.tensor([999, 890, 746, 549, 299, 90, 12, 0])
    assert has_uneven_steps(own)
    assert not has_uneven_steps(scheduler("HeunDiscreteScheduler"))
    assert not has_uneven_steps(object())


@pytest.mark.parametrize("draw", [torch.randn, torch.rand, lambda n: torch.empty(n).normal_(), torch.randperm])
def test_random_numbers_are_seen_whoever_draws_them(draw: Any) -> None:
    with NoiseDetector() as watch:
        torch.ones(3).sum()
    assert not watch.seen
    with NoiseDetector() as watch:
        draw(3)
    assert watch.seen
