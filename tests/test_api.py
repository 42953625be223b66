"""optimize, restore, report, reset, optimized: in place, idempotent, exactly undone."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import diffusers
import pytest
import torch
from DeepCache import DeepCacheSDHelper

import deepcache_fx
from deepcache_fx import BranchError, DeepCacheError
from tests import models
from tests.compvis import CompVisUNet, denoise
from tests.families import family, thorough

TIMESTEPS = torch.arange(900, 0, -100)
INPUTS: dict[str, Any] = {
    "x": torch.randn(2, 4, 8, 8),
    "timesteps": torch.tensor([1, 1]),
    "context": torch.randn(2, 3, 6),
}


def trace(unet: torch.nn.Module) -> dict[str, Any]:
    return {"class": type(unet), "dict": set(unet.__dict__), "keys": list(unet.state_dict())}


def test_optimize_returns_the_same_object_and_restore_leaves_no_trace() -> None:
    unet = models.sd_unet()
    before = trace(unet)
    assert deepcache_fx.optimize(unet) is unet
    assert isinstance(unet, diffusers.UNet2DConditionModel)
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert unet.config.in_channels == 4
    assert deepcache_fx.restore(unet) is unet
    assert trace(unet) == before
    deepcache_fx.restore(unet)
    assert trace(unet) == before


def test_a_pipelines_unet_and_scheduler_are_both_restored() -> None:
    pipe = models.sd_pipeline()
    scheduler = type(pipe.scheduler)
    deepcache_fx.optimize(pipe)
    assert type(pipe.scheduler) is not scheduler
    assert type(pipe.scheduler).__name__ == scheduler.__name__
    deepcache_fx.restore(pipe)
    assert type(pipe.scheduler) is scheduler
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


def test_optimizing_twice_changes_nothing_and_other_options_start_over() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    denoise(unet, TIMESTEPS)
    deepcache_fx.optimize(unet, backend="eager")
    assert deepcache_fx.report(unet).full_calls == 3
    deepcache_fx.optimize(unet, branch=1, backend="eager")
    assert deepcache_fx.report(unet).full_calls == 0
    denoise(unet, TIMESTEPS)
    assert deepcache_fx.report(unet).signatures[0].branch == 1
    assert type(deepcache_fx.restore(unet)) is CompVisUNet


def test_the_context_manager_brings_back_what_was_there() -> None:
    unet = CompVisUNet()
    with deepcache_fx.optimized(unet, interval=2) as inner:
        assert inner is unet
        assert deepcache_fx.report(unet).schedule == "Uniform(interval=2)"
    assert type(unet) is CompVisUNet
    deepcache_fx.optimize(unet, interval=5)
    with deepcache_fx.optimized(unet, interval=2):
        pass
    assert deepcache_fx.report(unet).schedule == "Uniform(interval=5)"
    with pytest.raises(KeyError), deepcache_fx.optimized(unet, interval=3):
        raise KeyError
    assert deepcache_fx.report(unet).schedule == "Uniform(interval=5)"


def test_what_is_not_optimised_has_no_report() -> None:
    with pytest.raises(DeepCacheError, match=r"CompVisUNet is not optimised: call deepcache_fx\.optimize"):
        deepcache_fx.report(CompVisUNet())
    with pytest.raises(DeepCacheError, match="not optimised"):
        deepcache_fx.reset(CompVisUNet())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "interval must be at least 1 .*got 0"),
        ({"interval": 2.5}, "interval must be an integer of at least 1, got 2.5"),
        ({"interval": True}, "interval must be an integer of at least 1, got True"),
        ({"branch": -1}, "branch must be a number of at least 0 .*got -1"),
        ({"branch": (1, 2, 3)}, r"branch must be .*\(block, layer\), got \(1, 2, 3\)"),
        ({"schedule": "often"}, "schedule must be Uniform"),
        ({"backend": 3}, "backend must be a name"),
        ({"mode": "max-autotune", "options": {"a": 1}}, "mode or options, not both"),
        ({"passes": ["canonicalize"]}, "passes takes PassBase objects"),
        ({"max_captures": 0}, "max_captures must be an integer of at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_with_value_and_remedy(arguments: dict[str, Any], message: str) -> None:
    unet = CompVisUNet()
    with pytest.raises(ValueError, match=message) as caught:
        deepcache_fx.optimize(unet, **arguments)
    assert isinstance(caught.value, DeepCacheError)
    assert type(unet) is CompVisUNet


@pytest.mark.parametrize("at_once", [True, False])
def test_a_branch_out_of_range_leaves_the_model_as_it_was(at_once: bool) -> None:
    unet = CompVisUNet()
    message = r"branch 99 is out of range: CompVisUNet has skip connections 0 \(shallowest\) to 3"
    if not at_once:
        deepcache_fx.optimize(unet, branch=99)
    with pytest.raises(BranchError, match=message), torch.no_grad():
        deepcache_fx.optimize(unet, branch=99, example_inputs=INPUTS) if at_once else unet(**INPUTS)
    assert type(unet) is CompVisUNet
    with torch.no_grad():
        assert torch.equal(unet(**INPUTS), CompVisUNet()(**INPUTS))


def test_a_network_without_skip_connections_is_refused() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    model = Plain()
    with pytest.raises(BranchError, match="Plain has no skip connection"):
        deepcache_fx.optimize(model, example_inputs=[torch.randn(1, 4, 8, 8), torch.tensor([1])])
    assert type(model) is Plain


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(DeepCacheError, match=r"backend 'nonsense' is unknown: use auto, eager or one of .*inductor"):
        deepcache_fx.optimize(CompVisUNet(), backend="nonsense", example_inputs=INPUTS)


@pytest.mark.parametrize("target", [None, "unet", 3, object()])
def test_other_targets_are_refused(target: object) -> None:
    with pytest.raises(DeepCacheError, match="optimize takes a UNet"):
        deepcache_fx.optimize(target)


def test_a_unet_that_something_else_has_patched_is_refused() -> None:
    pipe = models.sd_pipeline()
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    with pytest.raises(DeepCacheError, match=r"has been replaced by .*wrapped_forward.*helper.disable"):
        deepcache_fx.optimize(pipe)
    helper.disable()
    deepcache_fx.optimize(pipe)


def test_a_compiled_unet_is_refused() -> None:
    unet = CompVisUNet()
    with pytest.raises(DeepCacheError, match=r"already wrapped by torch\.compile"):
        deepcache_fx.optimize(torch.compile(unet))
    unet.compile()
    with pytest.raises(DeepCacheError, match=r"compile\(\) was called"):
        deepcache_fx.optimize(unet)


@thorough
def test_copies_and_pickles_are_plain_and_work() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    expected = denoise(CompVisUNet(), TIMESTEPS)
    denoise(unet, TIMESTEPS)
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(unet),
        pickle.loads(pickle.dumps(unet)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert type(other) is CompVisUNet
        assert torch.equal(denoise(other, TIMESTEPS), expected)
    assert b"deepcache_fx" not in pickle.dumps(unet)


@thorough
def test_saving_writes_the_plain_model(tmp_path: Any) -> None:
    pipe = deepcache_fx.optimize(models.sd_pipeline(), backend="eager")
    models.generate(pipe, 2)
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(again.unet) is diffusers.UNet2DConditionModel
    assert list(again.unet.state_dict()) == list(models.sd_unet().state_dict())
    for file in tmp_path.rglob("*.json"):
        assert "deepcache" not in file.read_text().lower()
    copied = copy.deepcopy(pipe.scheduler)
    assert type(copied) is diffusers.DDIMScheduler


@pytest.mark.parametrize("hook_first", family([True, False], True))
def test_accelerate_hooks_before_or_after_do_not_tear_it_off(hook_first: bool) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    unet = CompVisUNet()
    expected = denoise(deepcache_fx.optimize(CompVisUNet(), backend="eager"), TIMESTEPS)
    if hook_first:
        add_hook_to_module(unet, ModelHook())
        deepcache_fx.optimize(unet, backend="eager")
    else:
        deepcache_fx.optimize(unet, backend="eager")
        add_hook_to_module(unet, ModelHook())
    for call in range(3):
        assert torch.equal(denoise(unet, TIMESTEPS), expected)
        assert deepcache_fx.report(unet).shallow_calls == 6 * (call + 1)
        remove_hook_from_module(unet)  # as pipelines do between generations
        add_hook_to_module(unet, ModelHook())
    deepcache_fx.restore(unet)
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(CompVisUNet(), TIMESTEPS))
    remove_hook_from_module(unet)
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(CompVisUNet(), TIMESTEPS))


def test_the_class_of_an_optimised_model_makes_plain_ones() -> None:
    unet = deepcache_fx.optimize(models.sd_unet())
    other = type(unet).from_config(unet.config)
    assert type(other) is diffusers.UNet2DConditionModel
    pipe = deepcache_fx.optimize(models.sd_pipeline())
    assert type(type(pipe.scheduler).from_config(pipe.scheduler.config)) is diffusers.DDIMScheduler


def test_pipelines_that_share_unet_and_scheduler_are_both_followed() -> None:
    first = models.sd_pipeline()
    second = diffusers.StableDiffusionPipeline(**first.components, requires_safety_checker=False)
    scheduler = first.scheduler
    deepcache_fx.optimize(first, interval=3, backend="eager")
    deepcache_fx.optimize(second, interval=3, backend="eager")
    first.scheduler = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    generate = torch.no_grad()(first.unet)
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, models.TEXT))
    generate(*arguments)  # the watch of the first lets go of the scheduler they shared
    second.scheduler.set_timesteps(4)
    generate(*arguments)
    assert deepcache_fx.report(second).last_run == "F"
    second.scheduler.step(*(torch.randn(1, 4, 8, 8), second.scheduler.timesteps[0], torch.randn(1, 4, 8, 8)))
    generate(*arguments)
    assert deepcache_fx.report(second).last_run == "Fs"


def test_another_interval_on_the_unet_keeps_following_the_pipeline() -> None:
    pipe = deepcache_fx.optimize(models.sd_pipeline(), interval=3)
    deepcache_fx.optimize(pipe.unet, interval=5)
    assert type(pipe.scheduler) is not diffusers.DDIMScheduler
    deepcache_fx.restore(pipe)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


def test_inputs_that_do_not_fit_leave_what_was_there() -> None:
    unet = CompVisUNet()
    with pytest.raises(DeepCacheError, match="example_inputs do not fit CompVisUNet: missing a required argument"):
        deepcache_fx.optimize(unet, example_inputs={"x": INPUTS["x"]})
    assert type(unet) is CompVisUNet
    deepcache_fx.optimize(unet, interval=7)
    with pytest.raises(DeepCacheError, match="do not fit"):
        deepcache_fx.optimize(unet, interval=2, example_inputs={"x": INPUTS["x"]})
    assert deepcache_fx.report(unet).schedule == "Uniform(interval=7)"
    with pytest.raises(DeepCacheError, match="disable names no default pass: typo"):
        deepcache_fx.optimize(unet, disable="typo")
    assert deepcache_fx.report(unet).schedule == "Uniform(interval=7)"


@thorough
def test_a_replaced_scheduler_is_followed() -> None:
    pipe = deepcache_fx.optimize(models.sd_pipeline(), backend="eager")
    models.generate(pipe, 4)
    old = pipe.scheduler
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(old.config)
    models.generate(pipe, 5)
    assert deepcache_fx.report(pipe).last_run == "FssFs"
    assert type(old) is diffusers.DDIMScheduler


@thorough
def test_the_package_imports_no_slower_than_what_it_builds_on() -> None:
    def modules(statement: str) -> set[str]:
        code = f"import sys; {statement}; print(*sys.modules)"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        return set(output.split())

    added = modules("import torch, diffusers, deepcache_fx") - modules("import torch, diffusers")
    assert "deepcache_fx.api" in added
    assert {name.split(".")[0] for name in added if not name.startswith("torch")} <= {"deepcache_fx", "passes"}
    assert not any(name.startswith(("torch._inductor", "torch._dynamo")) for name in added)
