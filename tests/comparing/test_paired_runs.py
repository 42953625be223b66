"""compare(): what is counted, what is timed, and that the pipeline comes back as it was."""

from __future__ import annotations

import math
import statistics
import types
from collections.abc import Sequence

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

import deepcache_fx
from deepcache_fx.comparing.comparison import UNetCalls, describe_psnr, describe_ssim
from deepcache_fx.comparing.paired_runs import Comparison, compare
from tests import small

PROMPTS = ("a cat", "a dog")


@pytest.fixture(scope="module")
def stages() -> list[tuple[str, int, int]]:
    """What `compare` told its progress function in the run of `found`."""
    return []


@pytest.fixture(scope="module")
def found(stages: list[tuple[str, int, int]]) -> Comparison:
    return compare(
        small.pipeline(),
        prompts=PROMPTS,
        optimize_arguments={"interval": 2},
        steps=5,
        seed=7,
        guidance_scale=3.0,
        repeats=2,
        progress=lambda *told: stages.append(told),
        **small.SIZE,
    )


def by_hand(pipe: object, **changes: object) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    call = dict(num_inference_steps=5, guidance_scale=3.0, generator=generators, output_type="pt", **small.SIZE)
    return pipe(list(PROMPTS), **{**call, **changes}).images  # type: ignore[operator]


def test_counts_the_calls_of_one_run(found: Comparison) -> None:
    (calls,) = found.calls
    assert (calls.full, calls.shallow, calls.uncached) == (3, 2, 0)
    assert found.engaged
    assert found.remarks == ()


def test_the_bound_follows_from_the_counts_and_the_captured_arithmetic(found: Comparison) -> None:
    signature = found.reports[0].signatures[0]
    cached = 3 * signature.full_macs + 2 * signature.shallow_macs
    assert found.bound == pytest.approx(5 * signature.full_macs / cached)
    assert 1 < found.bound < 5 / 3


def test_every_repeat_is_timed_and_the_preparation_kept_apart(found: Comparison) -> None:
    assert len(found.baseline_seconds) == len(found.optimized_seconds) == 2
    captured = found.reports[0].capture_seconds
    assert found.preparation_seconds + statistics.median(found.optimized_seconds) >= captured
    assert min(found.optimized_seconds) < captured


def test_the_baseline_is_the_untouched_pipeline_on_seeds_counted_up_by_prompt(found: Comparison) -> None:
    assert torch.equal(found.baseline_images, by_hand(small.pipeline()))


def test_the_optimised_images_are_those_of_optimize(found: Comparison) -> None:
    expected = by_hand(deepcache_fx.optimize(small.pipeline(), interval=2))
    assert torch.equal(found.optimized_images, expected)
    assert not torch.equal(found.optimized_images, found.baseline_images)
    assert 20 < found.psnr < math.inf
    assert 0.5 < found.ssim < 1


def test_progress_is_told_of_every_step_of_every_stage(
    found: Comparison,
    stages: list[tuple[str, int, int]],
) -> None:
    names = ["capture", "warm-up", "baseline 1/2", "optimised 1/2", "baseline 2/2", "optimised 2/2"]
    assert stages == [(name, step, 5) for name in names for step in range(6)]


def test_interval_one_gives_equal_images_and_says_that_nothing_was_saved() -> None:
    found = compare(
        small.pipeline(),
        prompts=["a cat"],
        optimize_arguments={"interval": 1, "disable": "all"},
        steps=3,
        repeats=1,
        warmup=False,
        **small.SIZE,
    )
    assert torch.equal(found.baseline_images, found.optimized_images)
    assert found.psnr == math.inf
    assert found.bound == 1
    assert not found.engaged
    assert "never ran" in found.remarks[0]
    values = found.to_dict()
    assert (values["identical"], values["psnr"]) == (True, None)
    # Without a warm-up the capture is taken off the one time there is.
    assert found.preparation_seconds == pytest.approx(found.reports[0].capture_seconds)


def test_an_interrupted_comparison_leaves_the_pipeline_as_it_was() -> None:
    pipe = small.pipeline()
    scheduler = type(pipe.scheduler)

    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "baseline 1/1" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pipe, prompts=["a cat"], steps=3, repeats=1, warmup=False, progress=interrupt)
    assert type(pipe.unet) is UNet2DConditionModel
    assert type(pipe.scheduler) is scheduler


def test_an_optimised_pipeline_keeps_its_own_settings_and_captures() -> None:
    pipe = deepcache_fx.optimize(small.pipeline(), interval=3)
    expected = by_hand(pipe)

    def stop(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare(pipe, prompts=PROMPTS, optimize_arguments={"interval": 2}, progress=stop)
    assert "interval=3" in deepcache_fx.report(pipe).schedule
    assert torch.equal(by_hand(pipe), expected)
    assert deepcache_fx.report(pipe).captures == 1


def test_a_refiner_takes_over_and_is_cached_too() -> None:
    found = compare(
        small.base(),
        refiner=small.refiner(),
        prompts=["a cat"],
        optimize_arguments={"interval": 2},
        steps=10,
        repeats=1,
        warmup=False,
        **small.SIZE,
    )
    base, refiner = found.calls
    assert (base.full, base.shallow) == (4, 4)
    assert (refiner.full, refiner.shallow) == (1, 1)
    assert found.baseline_images.shape == (1, 3, 16, 16)
    assert 1 < found.bound < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"steps": 0}, "steps .* got 0"),
        ({"repeats": 0}, "repeats .* got 0"),
        ({"hight": 16}, "does not take hight"),
        ({"refiner": small.pipeline()}, "does not take denoising_end"),
        ({"optimize_arguments": {"interval": 0}}, "got 0"),
    ],
)
def test_refuses_what_makes_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(deepcache_fx.DeepCacheError, match=message):
        compare(small.pipeline(), **{"prompts": ["a cat"], **arguments})  # type: ignore[arg-type]


def test_refuses_a_pipeline_that_takes_no_prompt() -> None:
    unet = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    with pytest.raises(deepcache_fx.DeepCacheError, match="DDPMPipeline does not take prompt"):
        compare(DDPMPipeline(unet, DDPMScheduler()), prompts=["a cat"])


def timed(baseline: Sequence[float], optimized: Sequence[float], **changes: object) -> Comparison:
    """Of 4 full and 6 shallow steps that cost a tenth: bound 2.17."""
    image = torch.zeros(1, 1, 16, 16)
    return small.comparison(
        image, image, baseline_seconds=tuple(baseline), optimized_seconds=tuple(optimized), **changes
    )


def reports(*backends: str) -> tuple[object, ...]:
    return tuple(
        types.SimpleNamespace(backend=name, forced_full={}, original_reasons={}, to_dict=dict) for name in backends
    )


def test_the_speedup_is_the_median_of_ratios_of_neighbours_in_time() -> None:
    found = timed((4.0, 5.0, 9.0), (2.0, 2.0, 3.0))
    assert found.ratios == (2, 2.5, 3)
    assert found.speedup == 2.5
    assert found.speedup_range == (2, 3)


def test_a_machine_that_slows_down_for_both_is_no_speedup_and_no_doubt() -> None:
    found = timed((4.0, 12.0, 40.0), (2.0, 6.0, 20.0))
    assert found.speedup == 2
    assert found.doubts == ()


def test_pairs_that_disagree_are_a_doubt() -> None:
    assert timed((4.0, 4.0, 4.0), (2.0, 2.0, 2.9)).doubts == ()
    (doubt,) = timed((4.0, 4.0, 4.0), (2.0, 2.0, 3.1)).doubts
    assert "(1.29 to 2.00)" in doubt


def test_a_speedup_far_beyond_the_arithmetic_is_a_doubt_however_often_it_was_seen() -> None:
    assert timed((2.5, 2.5), (1.0, 1.0)).doubts == ()
    for count in (1, 3):
        (doubt,) = timed((16.0,) * count, (1.0,) * count).doubts
        assert "differ by 16, the arithmetic by no more than 2.17" in doubt


def test_a_compiled_backend_may_beat_the_arithmetic() -> None:
    assert timed((5.0, 5.0), (1.0, 1.0), reports=reports("inductor")).doubts == ()
    assert len(timed((5.0, 5.0), (1.0, 1.0), reports=reports("eager")).doubts) == 1


def test_the_numbers_carry_their_doubts() -> None:
    found = timed((40.0, 5.0), (2.0, 2.0))
    assert found.to_dict()["doubts"] == list(found.doubts)
    assert len(found.doubts) == 2


def test_the_bound_of_two_models_weighs_them_by_their_arithmetic() -> None:
    image = torch.zeros(1, 1, 16, 16)
    base = UNetCalls(full=4, shallow=4, uncached=0, full_macs=100, shallow_macs=0)
    refiner = UNetCalls(full=1, shallow=0, uncached=1, full_macs=50, shallow_macs=5)
    assert small.comparison(image, image, calls=(base, refiner)).bound == pytest.approx(900 / 500)


def test_similarity_of_known_images() -> None:
    black = torch.zeros(1, 1, 16, 16)
    found = small.comparison(black, black + 0.1)
    assert found.psnr == pytest.approx(20, abs=1e-3)
    assert found.ssim < 0.1
    tiny = black[..., :8, :8]
    assert math.isnan(small.comparison(tiny, tiny).ssim)
    assert small.comparison(tiny, tiny).to_dict()["ssim"] is None


@pytest.mark.parametrize(("value", "text"), [(31.24, "31.2 dB"), (math.inf, "identical"), (math.nan, "undefined")])
def test_psnr_for_people(value: float, text: str) -> None:
    assert describe_psnr(value) == text


def test_ssim_for_people() -> None:
    assert [describe_ssim(0.98349), describe_ssim(math.nan)] == ["0.983", "undefined"]
