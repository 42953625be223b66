"""The caching of a MODEL against the stand-in for ComfyUI: right to the oracle, or uncached with the reason."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepcache_fx
from comfyui.caching import KEY, Caching, Settings
from deepcache_fx import Steps
from tests.comfy import Options, Scaled
from tests.comfyui.stand_in import (
    NEGATIVE,
    PROMPT,
    Condition,
    Executor,
    Model,
    Patcher,
    sample,
    sample_euler_ancestral,
)
from tests.families import family, thorough
from tests.oracles import CatOracle

REPEATING = Settings(forecast=0, backend="eager")
pytestmark = pytest.mark.filterwarnings("ignore:.*runs uncached.*")  # what a report tells is tested here


def cached(patcher: Patcher, settings: Settings = REPEATING) -> Patcher:
    result: Patcher = Caching(settings).attach(patcher)
    return result


def text(patcher: Patcher) -> str:
    found: str = patcher.attachments[KEY].text
    return found


def trace(patcher: Patcher) -> str:
    return next((line.split()[1] for line in text(patcher).splitlines() if line.startswith("trace: ")), "")


def specified(patcher: Patcher, interval: int = 3) -> Patcher:
    """A clone whose UNet runs its own forward with the deep operand replaced: a feature for each conditioning."""
    result = patcher.clone()
    number, oracles = -1, dict[Any, tuple[CatOracle, int]]()

    def predict_noise(executor: Executor, *args: Any) -> Any:
        nonlocal number
        number += 1
        return executor(*args)

    def diffusion_model(executor: Executor, *args: Any) -> Any:
        options = args[5]
        who = (tuple(options["uuids"]), args[4] is None)
        oracle, refresh = oracles.get(who, (CatOracle(lambda run: run(), 0), -1))
        is_full = number % interval == 0 or refresh != number // interval
        oracles[who] = (oracle, number // interval)
        control = args[4]

        def run() -> Any:  # the model takes residuals out of the lists, and the oracle runs it twice
            own = None if control is None else {name: list(values) for name, values in control.items()}
            return executor(*args[:4], own, options)

        return oracle(is_full, run)

    result.add_wrapper_with_key("predict_noise", "oracle", predict_noise)
    result.add_wrapper_with_key("diffusion_model", "oracle", diffusion_model)
    return result


def agrees(patcher: Patcher, **run: Any) -> bool:
    """Whether the cached model of a patcher gives what the oracle does, and not what the plain one does."""
    expected, plain = sample(specified(patcher), **run), sample(patcher, **run)
    found = sample(cached(patcher), **run)
    assert not torch.allclose(expected, plain, rtol=1e-4)
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


def test_a_run_is_right_to_the_oracle_and_says_what_it_did() -> None:
    patcher = Patcher(Model())
    assert agrees(patcher)
    model = cached(patcher)
    sample(model)
    assert text(model).startswith("6 evaluations: 2 calls full, 4 shallow, 0 uncached")
    assert trace(model) == "FssFss"
    assert "speed-up bound of this run" in text(model)


SPLIT: Callable[[int], Any] = lambda _: [[PROMPT], [NEGATIVE]]  # noqa: E731
ALTERNATELY: Callable[[int], Any] = lambda n: [[PROMPT], [NEGATIVE]] if n % 2 else [[NEGATIVE], [PROMPT]]  # noqa: E731
SWAPPED: Callable[[int], Any] = lambda n: [[PROMPT if n < 2 else Condition(3)], [NEGATIVE]]  # noqa: E731


@pytest.mark.parametrize("calls", family([SPLIT, ALTERNATELY, SWAPPED], ALTERNATELY))
def test_each_conditioning_reads_its_own_feature(calls: Any) -> None:
    assert agrees(Patcher(Model()), calls=calls)


@thorough
def test_the_first_and_the_second_run_of_a_hires_fix_are_runs_of_their_own() -> None:
    model = cached(Patcher(Model()))
    for size in (8, 16, 8):
        fresh = sample(cached(Patcher(model.model)), 5, size=size)
        assert torch.equal(sample(model, 5, size=size), fresh)
        assert trace(model) == "FssFs"


@thorough
def test_a_control_that_ends_within_the_run_is_a_full_step() -> None:
    residual = torch.randn(1, 16, 4, 4)
    control = lambda n: {"output": [residual]} if n < 2 else None  # noqa: E731 - new lists at every call
    patcher = Patcher(Model())
    assert agrees(patcher, control=control)
    model = cached(patcher)
    sample(model, control=control)
    assert trace(model) == "FsFFss"


@thorough
def test_patches_are_baked_in_and_their_change_is_noticed() -> None:
    patcher = Patcher(Model())
    patcher.options = {"patches": {"output_block_patch": [Scaled(1.3)]}}
    assert agrees(patcher)
    model = cached(patcher)
    before = sample(model)
    model.options = {"patches": {"output_block_patch": [Scaled(0.7)]}}
    assert not torch.allclose(sample(model), before)


def reads(name: str) -> Callable[..., Any]:
    def patch(h: torch.Tensor, skip: torch.Tensor, options: Options) -> Any:
        value = options[name]
        return h * (1.1 if value[0] is not None else 1), skip

    return patch


@thorough
def test_a_patch_that_reads_the_batch_is_cached() -> None:
    patcher = Patcher(Model())
    patcher.options = {"patches": {"output_block_patch": [reads("cond_or_uncond")]}}
    assert agrees(patcher)


@thorough
@pytest.mark.parametrize("name", ["uuids", "sample_sigmas"])
def test_a_patch_that_reads_what_changes_from_call_to_call_runs_uncached_and_says_why(name: str) -> None:
    patcher = Patcher(Model())
    patcher.options = {"patches": {"output_block_patch": [reads(name)]}}
    model = cached(patcher)
    assert torch.equal(sample(model), sample(patcher))
    assert "6 x UNetOfTensors could not be captured" in text(model)
    assert f"a patch reads transformer_options['{name}']" in text(model)


def test_what_cannot_be_captured_is_tried_once_and_not_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcache_fx.runtime import runtime

    tried, capture = [], runtime.capture
    monkeypatch.setattr(runtime, "capture", lambda *args, **more: (tried.append(args), capture(*args, **more))[1])
    patcher = Patcher(Model())
    patcher.options = {"patches": {"output_block_patch": [reads("uuids")]}}
    model = cached(patcher)
    for _ in range(3):
        assert torch.equal(sample(model), sample(patcher))
    assert len(tried) == 1


@thorough
def test_a_patch_that_keeps_what_it_saw_runs_uncached_and_keeps_it() -> None:
    seen: list[torch.Tensor] = []

    def keeps(h: torch.Tensor, skip: torch.Tensor, options: Options) -> Any:
        seen[:] = [h]
        return h, skip

    patcher = Patcher(Model())
    patcher.options = {"patches": {"output_block_patch": [keeps]}}
    model = cached(patcher)
    assert torch.equal(sample(model), sample(patcher))
    assert "keeps something of each call" in text(model)
    assert type(seen[0]) is torch.Tensor


@thorough
def test_options_that_change_from_call_to_call_are_no_reason_for_another_capture() -> None:
    model = cached(Patcher(Model()))
    for steps in (4, 6, 7):  # another length of sample_sigmas, another counter
        sample(model, steps, options={"counter": SimpleNamespace(steps=steps)})
        assert trace(model) == "FssFssF"[:steps]
    assert text(model).count("uncached") == 1


@thorough
def test_another_interval_keeps_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcache_fx.runtime import runtime

    patcher = Patcher(Model())
    sample(cached(patcher))
    gc.collect()
    monkeypatch.setattr(runtime, "capture", None)
    for interval in (2, 5):
        model = cached(patcher, Settings(interval=interval, forecast=0, backend="eager"))
        sample(model)
        assert trace(model) == {2: "FsFsFs", 5: "FssssF"}[interval]


def test_the_model_itself_is_never_touched() -> None:
    patcher = Patcher(Model())
    before = sample(patcher)
    unet = patcher.model.diffusion_model
    state = {name: weakref.ref(value) for name, value in unet.named_parameters()}
    model = cached(patcher)
    sample(model)
    assert type(unet).__name__ == "UNet"
    assert set(vars(unet)) == set(vars(Model().diffusion_model))
    assert all(state[name]() is value for name, value in unet.named_parameters())
    assert patcher.wrappers == {}
    assert torch.equal(sample(patcher), before)


@thorough
def test_the_second_of_two_nodes_counts() -> None:
    model = cached(cached(Patcher(Model()), Settings(interval=2)))
    sample(model)
    assert trace(model) == "FssFss"
    assert all(len(keys[KEY]) == 1 for keys in model.wrappers.values())


@thorough
def test_two_models_in_turn_are_right_each() -> None:
    """As where a workflow has two samplers, of clones with different nodes and of another checkpoint."""
    first, other = Patcher(Model()), Patcher(Model())
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.mul_(1.1)
    models = [cached(first), cached(first, Settings(interval=2, forecast=0, backend="eager")), cached(other)]
    alone = [sample(model) for model in models]
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(sample(model), expected)
    assert [trace(model) for model in models] == ["FssFss", "FsFsFs", "FssFss"]


@thorough
def test_a_run_within_a_run_leaves_both_right() -> None:
    patcher = Patcher(Model())
    expected = sample(cached(patcher))
    outer, inner = cached(patcher), cached(patcher, Settings(interval=2, forecast=0, backend="eager"))

    def nested(executor: Executor, *args: Any) -> Any:
        sample(inner, 3)
        return executor(*args)

    outer.add_wrapper_with_key("predict_noise", "nested", nested)
    uncached = sample(patcher)
    assert (sample(outer) - uncached).norm() <= 1e-5 * uncached.norm()  # in doubt every evaluation is full
    assert trace(inner) == "FsF"
    outer.remove_wrappers_with_key("predict_noise", "nested")
    assert torch.equal(sample(outer), expected)


@pytest.mark.parametrize("at", family([0, 1, 4], 4))
def test_an_interrupted_run_leaves_nothing(at: int) -> None:
    model = cached(Patcher(Model()))
    expected = sample(model)
    with pytest.raises(InterruptedError):
        sample(model, interrupted_at=at)
    assert torch.equal(sample(model), expected)


@thorough
def test_weights_that_were_patched_in_are_used() -> None:
    patcher = Patcher(Model())
    model = cached(patcher)
    sample(model)
    layer = patcher.model.diffusion_model.output_blocks[0][0].in_layers[2]
    original = layer.weight
    for factor in (1.5, 1.0):  # a LoRA comes, and goes
        layer.weight = torch.nn.Parameter(original.detach() * factor, requires_grad=False)
        expected = sample(specified(patcher))
        assert (sample(model) - expected).norm() <= 1e-5 * expected.norm()
        assert "uncached:" not in text(model)


def test_a_wrapper_inside_is_not_left_out() -> None:
    patcher, called = Patcher(Model()), []
    model = cached(patcher)

    def doubling(executor: Executor, *args: Any) -> Any:
        called.append(1)
        return 2 * executor(*args)

    model.add_wrapper_with_key("diffusion_model", "other", doubling)
    patcher.add_wrapper_with_key("diffusion_model", "other", doubling)
    assert torch.equal(sample(model), sample(patcher))
    assert "6 x another node wraps the UNet inside this one" in text(model)
    around = cached(patcher)  # outside it may stay
    assert torch.isfinite(sample(around)).all()
    assert "another node wraps" not in text(around) or around.wrappers["diffusion_model"]["other"]


def test_a_model_compiled_by_another_node_runs_as_that_has_it() -> None:
    patcher = Patcher(Model())
    patcher.options = {}
    model = cached(patcher)
    model.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *args: executor(*args))
    assert torch.equal(sample(model), sample(patcher))
    assert "6 x TorchCompileModel" in text(model)


def test_a_call_outside_of_a_run_is_plain() -> None:
    model = cached(Patcher(Model()))
    unet = model.model.diffusion_model
    x, t = torch.randn(1, 4, 8, 8), torch.ones(1)
    options: Options = {"wrappers": model.wrappers}
    with torch.inference_mode():
        assert torch.equal(
            unet(x, t, PROMPT.context, None, None, options), unet(x, t, PROMPT.context, None, None, {"wrappers": {}})
        )
    assert text(model) == "no run yet"


def test_weights_that_change_from_call_to_call_are_not_cached() -> None:
    patcher = Patcher(Model())
    model = cached(patcher)
    model.hook_patches = {"a LoRA": {"of one prompt": 1.0}}
    assert torch.equal(sample(model), sample(patcher))
    assert "6 x a conditioning has weights of its own" in text(model)


@thorough
def test_a_schedule_and_a_window_reach_the_run() -> None:
    for settings, expected in (
        (Settings(schedule=Steps([0, 4]), forecast=0, backend="eager"), "FsssFs"),
        (Settings(start=0.4, end=0.8, forecast=0, backend="eager"), "FFFssF"),
    ):
        model = cached(Patcher(Model()), settings)
        sample(model)
        assert trace(model) == expected


def test_a_schedule_for_another_number_of_steps_is_uncached_with_the_reason() -> None:
    class Refusing(Steps):
        def is_full(self, step: int, num_steps: int | None) -> bool:
            raise deepcache_fx.ScheduleError("calibrated for 20 steps")

    patcher = Patcher(Model())
    model = cached(patcher, Settings(schedule=Refusing([0]), backend="eager"))
    assert torch.equal(sample(model), sample(patcher))
    assert "6 x calibrated for 20 steps" in text(model)


@thorough
def test_a_branch_that_is_not_there_is_uncached_with_the_reason() -> None:
    patcher = Patcher(Model())
    model = cached(patcher, Settings(branch=14, backend="eager"))
    assert torch.equal(sample(model), sample(patcher))
    assert "branch" in text(model)


@thorough
def test_auto_repeats_where_noise_is_drawn_or_few_steps_are_uneven() -> None:
    model = cached(Patcher(Model()), Settings(backend="eager"))
    for run, degree in (
        ({}, "1"),
        ({"sampler": SimpleNamespace(sampler_function=sample_euler_ancestral, extra_options={})}, "0"),
        ({"sigmas": [10, 5, 2, 1, 0.5, 0.1, 0]}, "0"),
    ):
        sample(model, **run)
        assert f"forecast: {degree} (" in text(model)


@thorough
def test_several_evaluations_of_a_step_are_steps_of_their_own() -> None:
    model = cached(Patcher(Model()))
    sample(model, 3, evaluations_per_step=2)
    assert trace(model) == "FssFss"


@thorough
def test_an_unloaded_model_is_let_go() -> None:
    patcher = Patcher(Model())
    model = cached(patcher)
    sample(model)
    gone = weakref.ref(patcher.model)
    unet = weakref.ref(patcher.model.diffusion_model)
    del patcher, model
    gc.collect()
    assert gone() is None
    assert unet() is None
