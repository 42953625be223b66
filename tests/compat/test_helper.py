"""`DeepCacheSDHelper` in place of the published one: the same latents, and no call that raises where that does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepcache_fx
from deepcache_fx.compat import DeepCacheSDHelper
from deepcache_fx.compat.published import helper_branch
from deepcache_fx.runtime.attach import runtime_of
from tests import models, oracles, small
from tests.families import examples, family, thorough
from tests.pipelines import NO_CHECKER, like_sd, picture

SCHEDULERS = {
    "ddim": lambda config: diffusers.DDIMScheduler.from_config(config),
    "pndm": lambda config: diffusers.PNDMScheduler.from_config(config, skip_prk_steps=True),
    "heun": lambda config: diffusers.HeunDiscreteScheduler.from_config(config),
    "euler": lambda config: diffusers.EulerDiscreteScheduler.from_config(config),
    "dpm++": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config),
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-5 * expected.norm())


@contextmanager
def ours(pipe: Any, interval: int, branch: int) -> Iterator[DeepCacheSDHelper]:
    helper = DeepCacheSDHelper(pipe=pipe, backend="eager")
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield helper
    finally:
        helper.disable()


def generate(pipe: Any, **arguments: Any) -> torch.Tensor:
    return models.generate(pipe, **{"steps": 9, **small.SIZE, **arguments})


@pytest.mark.parametrize("name", family(SCHEDULERS, "pndm"))
def test_every_interval_gives_the_published_latents_with_every_scheduler(name: str) -> None:
    """Also where the published code takes a repeated timestep for the step before."""
    pipe = small.pipeline()
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    helper = DeepCacheSDHelper(pipe=pipe, backend="eager")
    for interval in (1, 2, 3, 5):
        helper.disable()
        with oracles.published(pipe, interval, 0):
            expected = generate(pipe)
        helper.set_params(cache_interval=interval)
        helper.enable()
        assert close(generate(pipe), expected)
    assert deepcache_fx.report(pipe).captures == 1
    helper.disable()


@thorough
@pytest.mark.parametrize("layers", family((1, 2, 3), 1))
def test_every_branch_gives_the_published_latents_beyond_the_last_too(layers: int) -> None:
    pipe = models.sd_pipeline(models.sd_unet(**{**small.LEVELS, "layers_per_block": layers}))
    for branch in range(8):
        with oracles.published(pipe, 3, branch):
            expected = generate(pipe, steps=5)
        with ours(pipe, 3, branch):
            assert close(generate(pipe, steps=5), expected), branch


@thorough
def test_pndm_from_an_image_gives_the_published_latents_at_every_strength() -> None:
    pipe = like_sd(diffusers.StableDiffusionImg2ImgPipeline, **NO_CHECKER)
    pipe.scheduler = SCHEDULERS["pndm"](pipe.scheduler.config)
    call = dict(steps=10, image=picture(), height=None, width=None)
    del call["height"], call["width"]
    for strength in (0.5, 0.8, 1.0):
        with oracles.published(pipe, 2, 0):
            expected = models.generate(pipe, strength=strength, **call)
        with ours(pipe, 2, 0):
            assert close(models.generate(pipe, strength=strength, **call), expected), strength


@examples(6)
@given(st.lists(st.sampled_from(["enable", "disable", "generate", "params 2", "params 3", "again"]), max_size=7))
def test_calls_in_any_order_never_raise_and_each_run_is_as_with_a_fresh_helper(order: list[str]) -> None:
    pipe = PIPE
    helper, interval, is_on = DeepCacheSDHelper(pipe=pipe, backend="eager"), 1, False
    try:
        for action in order:
            if action == "enable":
                helper.enable()
                is_on = True
            elif action == "disable":
                helper.disable()
                is_on = False
            elif action == "again":
                helper.enable(pipe)
                is_on = True
            elif action.startswith("params"):
                interval = int(action[-1])
                helper.set_params(cache_interval=interval)
            else:
                assert close(generate(pipe, steps=4), EXPECTED[interval if is_on else 1])
    finally:
        helper.disable()
    assert runtime_of(pipe.unet) is None


PIPE = small.pipeline()
EXPECTED = {}
for _interval in (1, 2, 3):
    with oracles.published(PIPE, _interval, 0):
        EXPECTED[_interval] = generate(PIPE, steps=4)


def test_enabling_again_captures_nothing_anew_and_params_count_at_once() -> None:
    pipe = small.pipeline()
    helper = DeepCacheSDHelper(pipe, backend="eager")
    helper.set_params(cache_interval=3)
    for interval in (3, 2, 3):
        helper.enable()
        helper.set_params(cache_interval=interval)
        generate(pipe)
        report = deepcache_fx.report(pipe)
        assert report.captures == 1 or interval != 3
        assert report.last_run == "".join("s" if i % interval else "F" for i in range(9))
        helper.disable()
        assert runtime_of(pipe.unet) is None


@thorough
def test_what_optimize_had_attached_comes_back() -> None:
    pipe = deepcache_fx.optimize(small.pipeline(), interval=7, backend="eager")
    with ours(pipe, 3, 0):
        generate(pipe)
    generate(pipe)
    assert deepcache_fx.report(pipe).last_run == "FssssssFs"


def test_a_copy_of_a_helper_and_another_pipeline_are_independent() -> None:
    first, second = small.pipeline(), small.pipeline()
    with ours(first, 3, 0) as helper:
        other = copy.deepcopy(first)
        assert runtime_of(other.unet) is None
        helper.enable(second)
        assert runtime_of(first.unet) is None
        assert runtime_of(second.unet) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(cache_interval=0), "interval must be at least 1 .*got 0"),
        (dict(cache_branch_id=-1), "cache_branch_id must be an integer of at least 0, got -1"),
        (dict(skip_mode="quad"), "skip_mode must be 'uniform', got 'quad'"),
    ],
)
def test_bad_params_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepCacheSDHelper().set_params(**arguments)


def test_without_a_pipeline_it_says_so_and_disable_does_nothing() -> None:
    helper = DeepCacheSDHelper()
    helper.disable()
    with pytest.raises(deepcache_fx.DeepCacheError, match="there is no pipeline"):
        helper.enable()


def test_branches_are_three_to_a_block() -> None:
    unet = models.sd_unet()
    assert [helper_branch(unet, number) for number in (0, 2, 3, 8, 11)] == [(0, 0), (0, 2), (1, 0), (2, 2), (2, 2)]
