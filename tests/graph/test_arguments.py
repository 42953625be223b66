"""A U-Net called as ComfyUI calls its own is captured as it is, patched or not, and a patch that changes counts."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.errors import OptionError
from tests.comfy import ComfyUNet, Scaled, options
from tests.families import family, thorough
from tests.oracles import TO_THE_BIT, CatOracle

CONTEXT = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.arange(900, 0, -100)


@torch.no_grad()
def denoise(unet: Callable[..., Any], given: Callable[[int], Any], steps: int = 7) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate(TIMESTEPS[:steps]):
        x = x - 0.1 * unet(x, t.expand(2), context=CONTEXT, transformer_options=given(step))
    return x


def shifting(amount: float) -> Any:
    def patch(context: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return context + amount * extra["n_heads"]

    return patch


def doubling(inner: Any, given: Any) -> Any:
    return 2 * inner({**given, "wrapped": True})


PATCHED = Scaled(0.9)
PATCHES: dict[str, Callable[[int], Any]] = {
    "unpatched": lambda step: options(),
    "functions made anew": lambda step: options(attention=[shifting(0.5)]),
    "all": lambda step: options(PATCHED, attention=[shifting(0.5)], wrappers=[doubling]),
}


@pytest.mark.parametrize("given", PATCHES.values(), ids=PATCHES)
def test_a_patched_unet_is_its_own_forward_without_caching_and_published_deepcache_with_it(given: Any) -> None:
    unet = ComfyUNet()
    expected = denoise(unet, given)
    oracle = CatOracle(unet.forward, branch=0)
    steps = iter(range(7))
    cached = denoise(lambda *args, **kwargs: oracle(next(steps) % 3 == 0, *args, **kwargs), given)

    deepcache_fx.optimize(unet, interval=1, **TO_THE_BIT)
    assert torch.equal(denoise(unet, given), expected)
    assert deepcache_fx.report(unet).captures == 1
    deepcache_fx.optimize(unet, interval=3, **TO_THE_BIT)
    assert torch.equal(denoise(unet, given), cached)
    report = deepcache_fx.report(unet)
    assert (report.captures, report.last_run, report.original_calls) == (1, "FssFssF", 0)


def changing_cell() -> Any:
    amount = 0.5

    def patch(context: torch.Tensor, extra: Any) -> torch.Tensor:
        return context + amount

    def given(step: int) -> Any:
        nonlocal amount
        amount = 0.5 if step < 4 else 0.75
        return options(attention=[patch])

    return given


def changing_layer() -> Any:
    layer = torch.nn.Linear(6, 6).requires_grad_(False)
    torch.nn.init.constant_(layer.weight, 0.1)
    torch.nn.init.constant_(layer.bias, 0.1)

    def given(step: int) -> Any:
        if step == 4:
            layer.weight.mul_(2)
        return options(attention=[lambda context, extra: layer(context)])

    return given


@pytest.mark.parametrize("change", family([changing_cell, changing_layer], changing_layer))
def test_a_patch_that_changes_within_a_run_makes_that_step_full(change: Any) -> None:
    unet = ComfyUNet()
    oracle = CatOracle(unet.forward, branch=0)
    steps = iter(range(7))
    expected = denoise(lambda *args, **kwargs: oracle(next(steps) in (0, 3, 4, 6), *args, **kwargs), change())
    deepcache_fx.optimize(unet, interval=3, **TO_THE_BIT)
    assert torch.equal(denoise(unet, change()), expected)
    report = deepcache_fx.report(unet)
    assert (report.captures, report.last_run) == (2, "FssFFsF")


def test_the_callers_dictionaries_are_left_as_they_were() -> None:
    unet = deepcache_fx.optimize(ComfyUNet(), interval=2, backend="eager")
    given = options(Scaled(0.9))
    control = {"output": [None, None, torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)]}
    before, residuals = copy.copy(given), list(control["output"])
    with torch.no_grad():
        for t in TIMESTEPS[:3]:
            unet(torch.randn(2, 4, 8, 8), t.expand(2), CONTEXT, None, control, given)
    assert given.keys() == before.keys()
    assert all(given[name] is before[name] for name in before)
    assert all(a is b for a, b in zip(control["output"], residuals, strict=True))
    assert deepcache_fx.report(unet).last_run == "FsF"


@thorough
def test_other_conditions_are_another_capture_unless_they_are_ignored() -> None:
    def given(step: int) -> Any:
        return {**options(), "uuids": [uuid.uuid4()], "sigmas": torch.tensor([float(step)])}

    unet = deepcache_fx.optimize(ComfyUNet(), interval=3, **TO_THE_BIT)
    denoise(unet, given, steps=3)
    assert deepcache_fx.report(unet).captures == 3
    deepcache_fx.restore(unet)
    expected = denoise(unet, given, steps=3)
    deepcache_fx.optimize(unet, interval=1, ignore="transformer_options.uuids", **TO_THE_BIT)
    assert torch.equal(denoise(unet, given, steps=3), expected)
    assert deepcache_fx.report(unet).captures == 1


def test_optimizing_with_another_ignore_captures_anew() -> None:
    unet = deepcache_fx.optimize(ComfyUNet(), backend="eager", ignore=("transformer_options.uuids",))
    denoise(unet, lambda step: options(), steps=2)
    deepcache_fx.optimize(unet, interval=2, backend="eager", ignore=["transformer_options.uuids"])
    assert deepcache_fx.report(unet).captures == 1
    deepcache_fx.optimize(unet, backend="eager")
    assert deepcache_fx.report(unet).captures == 0


def test_an_ignored_path_that_leads_into_no_dictionary_is_an_error_at_the_call() -> None:
    unet = deepcache_fx.optimize(ComfyUNet(), backend="eager", ignore=["context.tokens"])
    with pytest.raises(
        OptionError, match=r"'context\.tokens', but context is no dictionary in this call: it is a Tens"
    ):
        denoise(unet, lambda step: {})


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (3, "ignore must be names of arguments, or dotted paths into them, got 3"),
        ([3], "ignore takes names .*, got 3"),
        ("", "ignore takes names .*, got ''"),
        (["transformer_options."], r"got 'transformer_options\.'"),
        (["transformer_options..uuids"], r"got 'transformer_options\.\.uuids'"),
    ],
)
def test_what_cannot_be_ignored_is_refused_with_the_value(ignore: Any, message: str) -> None:
    unet = ComfyUNet()
    with pytest.raises(OptionError, match=message) as caught:
        deepcache_fx.optimize(unet, ignore=ignore)
    assert isinstance(caught.value, DeepCacheError)
    assert type(unet) is ComfyUNet


def test_an_argument_that_forward_does_not_have_is_refused_with_those_it_has() -> None:
    class Plain(ComfyUNet):
        def forward(self, x: Any, timesteps: Any, options: Any = None) -> Any:  # type: ignore[override]
            raise NotImplementedError

    unet = Plain()
    with pytest.raises(
        DeepCacheError, match=r"'uuids', but .*Plain.forward has no argument uuids: it has x, timesteps, options"
    ):
        deepcache_fx.optimize(unet, ignore=["uuids"])
    assert type(unet) is Plain
    deepcache_fx.restore(deepcache_fx.optimize(unet, ignore=["options.uuids"]))
    deepcache_fx.restore(deepcache_fx.optimize(ComfyUNet(), ignore=["anything"]))  # its forward takes **kwargs


@thorough
def test_a_model_that_leaves_a_tensor_in_its_arguments_runs_uncached() -> None:
    class Leaves(ComfyUNet):
        def forward(self, x: Any, timesteps: Any, context: Any, transformer_options: Any) -> Any:  # type: ignore[override]
            result = super().forward(x, timesteps, context, transformer_options=transformer_options)
            transformer_options.setdefault("kept", []).append(result)
            return result

    unet, given = Leaves(), options()
    deepcache_fx.optimize(unet, backend="eager")
    with pytest.warns(UserWarning, match=r"leaves a tensor in its argument \(transformer_options\.kept\)"):
        denoise(unet, lambda step: {**options(), "kept": []}, steps=3)
    assert deepcache_fx.report(unet).original_calls == 3
    denoise(unet, lambda step: given, steps=2)
    assert [type(item) for item in given["kept"]] == [torch.Tensor, torch.Tensor]
