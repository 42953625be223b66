"""Which ControlNet is accompanied: as long as its pipeline is followed, and then it is as it was."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import ControlNetModel, MultiControlNetModel

import deepcache_fx
from deepcache_fx.execution import memory_format
from deepcache_fx.runtime.attach import attached_to, runtime_of
from deepcache_fx.runtime.report import ControlNetReport
from tests.controlnet.test_controlnet_runtime import controlnet_runtime, denoise
from tests.execution.test_memory_format import formats
from tests.families import family, thorough
from tests.oracles import TO_THE_BIT, specified
from tests.pipelines import NO_CHECKER, Case, controlnet, like_sd, one_controlnet, several_controlnets, unet


def latents(case: Case, run: int = 0) -> torch.Tensor:
    return case(case.runs[run])


def wanted(case: Case, run: int = 0) -> torch.Tensor:
    with specified(case.pipe, {0, 3, 6}, 0):
        return latents(case, run)


def is_plain(network: torch.nn.Module, cls: type = ControlNetModel) -> bool:
    return type(network) is cls and "forward" not in network.__dict__ and attached_to(network) is None


def test_restore_gives_a_pipeline_its_controlnet_back() -> None:
    case = one_controlnet()
    before = dict(case.pipe.controlnet.__dict__)
    expected = wanted(case)
    plain = latents(case)
    for _ in range(2):
        deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
        network = case.pipe.controlnet
        assert type(network) is not ControlNetModel
        assert isinstance(network, ControlNetModel)
        assert type(network).__name__ == "ControlNetModel"
        assert is_plain(copy.deepcopy(network))
        assert torch.equal(latents(case), expected)
        deepcache_fx.restore(case.pipe)
        assert is_plain(network)
        assert network.__dict__.keys() == before.keys()
        deepcache_fx.restore(case.pipe)
        assert torch.equal(latents(case), plain)


def test_several_controlnets_are_one_network() -> None:
    case = several_controlnets()
    with deepcache_fx.optimized(case.pipe, 3, **TO_THE_BIT):
        assert isinstance(case.pipe.controlnet, MultiControlNetModel)
        assert all(is_plain(net) for net in case.pipe.controlnet.nets)
        assert controlnet_runtime(case.pipe).model == "MultiControlNetModel"
    assert is_plain(case.pipe.controlnet, MultiControlNetModel)


def test_a_bare_unet_leaves_the_controlnet_alone() -> None:
    case = one_controlnet()
    expected = wanted(case)
    deepcache_fx.optimize(case.pipe.unet, 3, **TO_THE_BIT)
    assert torch.equal(latents(case), expected)
    assert is_plain(case.pipe.controlnet)
    assert deepcache_fx.report(case.pipe).companions == ()


def test_another_schedule_keeps_what_is_captured() -> None:
    case = one_controlnet()
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    latents(case)
    deepcache_fx.optimize(case.pipe, 2, **TO_THE_BIT)
    latents(case)
    assert controlnet_runtime(case.pipe).last_run == "FsFsFsF"
    assert controlnet_runtime(case.pipe).captures == 1
    with deepcache_fx.optimized(case.pipe, 3, **TO_THE_BIT):
        latents(case)
        assert controlnet_runtime(case.pipe).last_run == "FssFssF"
        assert controlnet_runtime(case.pipe).captures == 1
    latents(case)
    assert controlnet_runtime(case.pipe).last_run == "FsFsFsF"
    assert controlnet_runtime(case.pipe).captures == 1
    deepcache_fx.optimize(case.pipe, 2, backend="eager")
    assert controlnet_runtime(case.pipe).captures == 0


def test_a_replaced_controlnet_is_followed() -> None:
    case = one_controlnet()
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    first = latents(case)
    old, new = case.pipe.controlnet, controlnet(4)
    case.pipe.controlnet = new
    second, third = latents(case), latents(case)
    assert is_plain(old)
    assert controlnet_runtime(case.pipe).last_run == "FssFssF"
    deepcache_fx.restore(case.pipe)
    assert is_plain(new)
    expected = wanted(case)
    assert torch.equal(second, expected)
    assert torch.equal(third, expected)
    assert not torch.equal(first, expected)
    case.pipe.controlnet = None
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    assert deepcache_fx.report(case.pipe).companions == ()


@thorough
def test_a_controlnet_shared_by_two_pipelines_serves_the_unet_that_runs() -> None:
    """Two UNets, with unlike schedules, in turn; then one of them is restored."""
    first = one_controlnet()
    other = like_sd(
        diffusers.StableDiffusionControlNetPipeline,
        unet(mid_block_type="UNetMidBlock2DCrossAttn"),
        controlnet=first.pipe.controlnet,
        **NO_CHECKER,
    )
    second = Case(other, first.runs, common=first.common)
    with specified(first.pipe, {0, 3, 6}, 0), specified(other, {0, 2, 4, 6}, 0):
        expected = latents(first), latents(second)
    deepcache_fx.optimize(first.pipe, 3, **TO_THE_BIT)
    deepcache_fx.optimize(other, 2, **TO_THE_BIT)
    for _ in range(2):
        assert torch.equal(latents(first), expected[0])
        assert torch.equal(latents(second), expected[1])
    assert controlnet_runtime(first.pipe).last_run == "FssFssF"
    assert controlnet_runtime(other).last_run == "FsFsFsF"
    assert controlnet_runtime(first.pipe).completed_calls == controlnet_runtime(other).completed_calls == 0
    deepcache_fx.restore(first.pipe)
    assert torch.equal(latents(second), expected[1])
    assert controlnet_runtime(other).shallow_calls == 9
    latents(first)
    deepcache_fx.restore(other)
    assert is_plain(other.controlnet)


def two_of_one_controlnet() -> tuple[Any, Any]:
    first = one_controlnet()
    other = unet(mid_block_type="UNetMidBlock2DCrossAttn")
    second = like_sd(diffusers.StableDiffusionControlNetPipeline, other, controlnet=first.pipe.controlnet, **NO_CHECKER)
    return first.pipe, second


@thorough
@pytest.mark.parametrize("first_to_run", [0, 1])
def test_restoring_one_unet_within_a_run_of_another_keeps_the_shared_weights_formatted(
    first_to_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of the other were compiled for weights that lie as they do."""
    monkeypatch.setattr(memory_format, "DEVICE_TYPES", ("cpu",))
    pipes = two_of_one_controlnet()
    network = pipes[0].controlnet
    gone, left = pipes[first_to_run], pipes[1 - first_to_run]
    found: list[set[bool]] = []
    calls = itertools.count()

    def turn() -> None:
        if next(calls) == 3:
            deepcache_fx.restore(gone)
        found.append(formats(network))

    with torch.no_grad():
        for pipe in pipes:
            deepcache_fx.optimize(pipe, 3, backend="aot_eager", forecast=0)
        for pipe in (gone, left):
            denoise(pipe, steps=2)
        changed = denoise(left, turn=turn)
    assert found == [{True}] * 7
    assert controlnet_runtime(left).last_run == "FssFssF"
    assert controlnet_runtime(left).captures == 1
    deepcache_fx.restore(left)
    assert formats(network) == {False}
    assert is_plain(network)
    with specified(left, {0, 3, 6}, 0), torch.no_grad():
        expected = denoise(left)
    torch.testing.assert_close(changed, expected, atol=1e-3, rtol=0)


@thorough
def test_one_that_comes_back_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds is as it left it, for the other's programs had kept it so."""
    monkeypatch.setattr(memory_format, "DEVICE_TYPES", ("cpu",))
    back, gone = two_of_one_controlnet()
    network = back.controlnet
    with torch.no_grad():
        for pipe in (back, gone):
            deepcache_fx.optimize(pipe, 3, backend="aot_eager", forecast=0)
            denoise(pipe, steps=2)
        with deepcache_fx.optimized(back, 3, backend="eager"):
            denoise(back, steps=2)
        denoise(back, steps=2)
        deepcache_fx.restore(gone)
        assert formats(network) == {True}
        assert controlnet_runtime(back).captures == 1
        deepcache_fx.restore(back)
        assert formats(network) == {False}


def test_the_last_unet_that_is_left_gives_the_controlnet_back() -> None:
    """Not one that is gone."""
    gone, left = two_of_one_controlnet()
    for pipe in (left, gone):
        deepcache_fx.optimize(pipe, 3, **TO_THE_BIT)
    held = weakref.ref(gone.unet)
    del gone, pipe
    gc.collect()
    assert held() is None
    deepcache_fx.restore(left)
    assert is_plain(left.controlnet)


@thorough
def test_two_pipelines_of_one_unet_have_a_controlnet_each() -> None:
    first = one_controlnet()
    parts = {**first.pipe.components, "controlnet": controlnet(4)}
    other = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    second = Case(other, first.runs, common=first.common)
    expected = wanted(first), wanted(second)
    deepcache_fx.optimize(first.pipe, 3, **TO_THE_BIT)
    deepcache_fx.optimize(other, 3, **TO_THE_BIT)
    for _ in range(2):
        assert torch.equal(latents(first), expected[0])
        assert torch.equal(latents(second), expected[1])
    reports = deepcache_fx.report(other).companions
    assert [(item.last_run, item.completed_calls) for item in reports] == [("FssFssF", 0)] * 2
    deepcache_fx.restore(other)
    assert is_plain(first.pipe.controlnet)
    assert is_plain(other.controlnet)


@pytest.mark.parametrize("offload_first", family([True, False], True))
def test_offload_hooks_do_not_tear_it_off(offload_first: bool) -> None:
    case = one_controlnet()
    expected = wanted(case)

    def hooked() -> list[Any]:
        return [cpu_offload_with_hook(network, "cpu")[1] for network in (case.pipe.unet, case.pipe.controlnet)]

    hooks = hooked() if offload_first else []
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    hooks = hooks or hooked()
    for _ in range(2):
        assert torch.equal(latents(case), expected)
        assert controlnet_runtime(case.pipe).last_run == "FssFssF"
        for hook in hooks:
            hook.remove()
        hooks = hooked()
    assert controlnet_runtime(case.pipe).completed_calls == 0


@thorough
def test_networks_are_freed_with_their_pipelines() -> None:
    first, kept = one_controlnet().pipe, one_controlnet().pipe
    network = first.controlnet
    kept.controlnet = network
    deepcache_fx.optimize(first, 3, **TO_THE_BIT)
    denoise(first, steps=2)
    held = weakref.ref(first.unet)
    del first
    gc.collect()
    assert held() is None
    with torch.no_grad():
        denoise(kept, steps=2)  # by its own forward: nobody is left to follow
    held_network = weakref.ref(network)
    del kept, network
    gc.collect()
    assert held_network() is None


def test_a_network_that_was_optimised_by_itself_stays_so() -> None:
    case = one_controlnet()
    deepcache_fx.optimize(case.pipe.controlnet, 3, **TO_THE_BIT)
    runtime = runtime_of(case.pipe.controlnet)
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    assert runtime_of(case.pipe.controlnet) is runtime is not None
    assert deepcache_fx.report(case.pipe).companions == (
        ControlNetReport(model="ControlNetModel", refused="optimize was called on it"),
    )
