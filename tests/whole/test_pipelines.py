"""Every pipeline class of diffusers that drives a UNet: three calls in turn, equal to the oracle to the bit."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import deepcache_fx
from tests import small
from tests.families import family, thorough
from tests.oracles import TO_THE_BIT, specified
from tests.pipelines import CASES, NO_CHECKER, PROMPT, REPRESENTATIVES, Case, Run, attentive, like_sd

INTERVAL = 3


def full_calls(run: Run) -> set[int]:
    """UNet calls that must be full."""
    return {call for call in range(run.calls) if call // run.per_step % INTERVAL == 0} | run.forced


def trace(run: Run) -> str:
    return "".join("F" if call in full_calls(run) else "s" for call in range(run.calls))


def expected(case: Case, run: Run) -> torch.Tensor:
    own = case.pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        """A UNet takes an adapter's features out of the list that it is given; the oracle may call it twice."""
        return own(*args, **{name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()})

    case.pipe.unet.forward = forward  # which `specified` takes off again
    with specified(case.pipe, full_calls(run), branch=0, per_step=run.per_step):
        return case(run)


@pytest.mark.parametrize("name", family(CASES, *REPRESENTATIVES))
def test_three_calls_in_turn_give_what_the_oracle_gives_with_the_calls_that_are_due(name: str) -> None:
    case = CASES[name]()
    oracle = [expected(case, run) for run in case.runs]
    assert not any(map(torch.equal, oracle, oracle[1:])), "the three calls must differ"
    with deepcache_fx.optimized(case.pipe, INTERVAL, **TO_THE_BIT):
        for run, wanted in zip(case.runs, oracle, strict=True):
            latents = case(run)
            assert deepcache_fx.report(case.pipe).last_run == trace(run)
            assert torch.equal(latents, wanted)
        report = deepcache_fx.report(case.pipe)
    assert report.captures == case.captures
    assert (report.shallow_calls, report.original_calls) == (sum(trace(run).count("s") for run in case.runs), 0)


@thorough
def test_a_base_that_stops_early_and_a_refiner_that_goes_on_are_two_runs() -> None:
    """SDXL with denoising_end and denoising_start: the first call of each part is full, at three shares in turn."""
    base, refiner = small.base(), small.refiner()

    def generate(share: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {**PROMPT, "num_inference_steps": 10, "generator": generator}
        latents = base(**call, **small.SIZE, denoising_end=share).images
        return refiner(**call, image=latents, denoising_start=share).images

    shares = (0.8, 0.5, 0.6)
    expected = []
    for share in shares:
        with specified(base, set(range(0, 10, 3)), 0), specified(refiner, set(range(0, 10, 3)), 0):
            expected.append(generate(share))
    for pipe in (base, refiner):
        deepcache_fx.optimize(pipe, 3, **TO_THE_BIT)
    for share, wanted in zip(shares, expected, strict=True):
        assert torch.equal(generate(share), wanted)
        calls = round(10 * share), 10 - round(10 * share)
        for pipe, count in zip((base, refiner), calls, strict=True):
            assert deepcache_fx.report(pipe).last_run == "".join("s" if i % 3 else "F" for i in range(count))
    assert deepcache_fx.report(base).captures == deepcache_fx.report(refiner).captures == 1


def test_the_oracle_is_not_the_model_itself() -> None:
    """Else all of the above would hold for a library that caches nothing."""
    case = CASES["text_to_image"]()
    assert not torch.equal(expected(case, case.runs[0]), case(case.runs[0]))


def test_self_attention_guidance_runs_uncached_because_its_processor_keeps_the_attention_maps() -> None:
    """A captured graph would leave the maps as they are: another image, without a word (see also test_side_effects)."""
    pipe = like_sd(diffusers.StableDiffusionSAGPipeline, attentive(), without=("image_encoder",), **NO_CHECKER)

    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**PROMPT, **small.SIZE, num_inference_steps=3, sag_scale=0.75, generator=generator).images

    expected = generate()
    deepcache_fx.optimize(pipe, INTERVAL, **TO_THE_BIT)
    with pytest.warns(UserWarning, match=r"runs uncached: layer mid_block\.attentions\.0 has a forward hook"):
        assert torch.equal(generate(), expected)
    assert torch.equal(generate(), expected)
    assert deepcache_fx.report(pipe).original_calls == 12
