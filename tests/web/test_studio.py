"""One pipeline for all visitors: each gets the picture that a pipeline of one's own makes, whoever came before."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import deepcache_fx
from deepcache_fx.comparing.loading import use_scheduler
from deepcache_fx.files.png_metadata import read_settings
from deepcache_fx.web.settings import Settings
from deepcache_fx.web.studio import CACHED, PREPARING, UNCACHED, Studio
from tests import small
from tests.families import thorough

ASKED = Settings(
    prompt="a cat",
    negative_prompt="",
    seed=3,
    steps=6,
    scheduler="ddim",
    size="16x16",
    guidance_scale=4.0,
    schedule="uniform",
    interval=3,
    power=1.4,
    center=3,
    deeper=1,
    deeper_interval=2,
    full_steps="0, 2",
    branch=0,
    forecast="auto",
)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(small.pipeline(), name="tiny", backend="eager")


def make(studio: Studio, settings: Settings, *, compare: bool = False) -> Any:
    return studio.make(settings, compare=compare, watch=lambda stage, done, total: None)


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)))


def by_hand(settings: Settings, *, cached: bool = True) -> Any:
    pipe = small.pipeline()
    use_scheduler(pipe, settings.scheduler)
    if cached:
        arguments = {"schedule": settings.timetable(), "branch": settings.branch, "forecast": settings.order}
        deepcache_fx.optimize(pipe, backend="eager", **arguments)  # type: ignore[arg-type]
    image = pipe(
        [settings.prompt],
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(settings.seed)],
        output_type="pt",
    ).images[0]
    return np.asarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)).squeeze()


@thorough
def test_visitors_in_turn_each_get_the_picture_of_a_pipeline_of_their_own(studio: Studio) -> None:
    wanted = [
        ASKED,
        replace(ASKED, schedule="nested", interval=6),
        replace(ASKED, seed=4, scheduler="heun", interval=2),
        replace(ASKED, branch=1, forecast="0"),
        ASKED,
    ]
    for settings in wanted:
        assert np.array_equal(pixels(make(studio, settings).cached.png), by_hand(settings)), settings


@thorough
def test_a_comparison_has_both_pictures_times_and_likeness(studio: Studio) -> None:
    found = make(studio, ASKED, compare=True)
    assert np.array_equal(pixels(found.uncached.png), by_hand(ASKED, cached=False))
    assert np.array_equal(pixels(found.cached.png), by_hand(ASKED))
    assert found.letters == "FssFss"
    assert len(found.cached.step_seconds) == len(found.uncached.step_seconds) == 6
    assert sum(found.cached.step_seconds) < found.cached.seconds
    assert found.speedup == found.uncached.seconds / found.cached.seconds
    assert 1 < found.bound < 3
    assert found.psnr > 10
    assert "6 calls: 2 full, 4 shallow" in found.report


def test_the_report_is_of_the_visitors_own_run(studio: Studio) -> None:
    for _ in range(2):
        assert "6 calls: 2 full, 4 shallow" in make(studio, ASKED).report


def test_a_picture_carries_its_settings(studio: Studio) -> None:
    found = read_settings(io.BytesIO(make(studio, ASKED).cached.png))
    assert (found["prompt"], found["seed"], found["interval"], found["width"]) == ("a cat", 3, 3, 16)
    assert found["model"] == "tiny"


def test_a_stopped_run_spoils_no_later_one(studio: Studio) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == CACHED and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.make(ASKED, compare=True, watch=stop)
    assert np.array_equal(pixels(make(studio, ASKED).cached.png), by_hand(ASKED))


@thorough
def test_every_step_of_every_stage_is_told(studio: Studio) -> None:
    told: list[tuple[str, int, int]] = []
    settings = replace(ASKED, forecast="2")  # nothing is prepared for these yet
    studio.make(settings, compare=True, watch=lambda *step: told.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == [PREPARING, UNCACHED, CACHED]
    for stage in (UNCACHED, CACHED):
        assert [(done, total) for name, done, total in told if name == stage] == [(n, 6) for n in range(7)]


@thorough
@pytest.mark.parametrize(
    "settings",
    [
        ASKED,
        replace(ASKED, scheduler="heun", interval=2),
        replace(ASKED, schedule="nested", interval=6),
        replace(ASKED, schedule="steps", full_steps="2, 3"),
    ],
    ids=lambda settings: f"{settings.scheduler}-{settings.schedule}",
)
def test_a_preview_is_what_the_run_then_does(studio: Studio, settings: Settings) -> None:
    foreseen, found = studio.preview(settings), make(studio, settings)
    assert foreseen.letters == found.letters
    assert foreseen.bound == pytest.approx(found.bound, rel=0.05)


def test_what_the_sampler_refuses_is_told_in_words(studio: Studio) -> None:
    with pytest.raises(deepcache_fx.DeepCacheError, match=r"50 x 1\.0 is smaller"):
        make(studio, replace(ASKED, scheduler="lcm", steps=60))
