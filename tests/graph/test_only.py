"""Passes for one kind of step."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepcache_fx
from deepcache_fx import DeepCacheError, MergeTokens, Only
from passes import FuseGroupNorm
from tests.compvis import CompVisUNet, denoise
from tests.families import family
from tests.oracles import REPEATING, specified
from tests.whole.test_stacking import FULL, check_cached, make_unet
from tests.whole.test_stacking import denoise as denoise_pixels

TIMESTEPS = torch.arange(950, -1, -50)


def double_output(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    output = gm.graph.output_node()
    first, *rest = output.args[0]
    with gm.graph.inserting_before(output):
        doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (first, 2.0))
    output.args = ((doubled, *rest),)
    return gm


@pytest.mark.parametrize("variant", family(["full", "shallow"], "full"))
def test_a_pass_runs_on_one_kind_of_step_alone(variant: Any) -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager", passes=[Only(variant, double_output)])
    plain = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        for step, t in enumerate(TIMESTEPS[:6]):
            arguments = torch.randn(2, 4, 8, 8), t.expand(2), torch.ones(2, 3, 6)
            factor = 2.0 if (step % 3 == 0) == (variant == "full") else 1.0
            torch.testing.assert_close(unet(*arguments), factor * plain(*arguments))
    names = [record.name for record in deepcache_fx.report(unet).signatures[0].passes]
    assert f"double_output ({variant})" in names


@pytest.mark.parametrize("variant", family(["full", "shallow"], "shallow"))
def test_tokens_merged_in_one_kind_of_step_equal_tomesd_switched_per_step(variant: Any) -> None:
    tomesd = pytest.importorskip("tomesd")
    unet = make_unet()
    merged = copy.deepcopy(unet)
    tomesd.apply_patch(merged, ratio=0.5, use_rand=False)
    twin = SimpleNamespace(unet=merged)
    number = -1
    with specified(twin, FULL, 0):
        forward = twin.unet.forward

        def switched(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            merged._tome_info["args"]["ratio"] = 0.5 if (number in FULL) == (variant == "full") else 0.0
            return forward(*args, **kwargs)

        twin.unet.forward = switched
        expected = denoise_pixels(twin.unet)
    with deepcache_fx.optimized(unet, interval=3, **REPEATING, passes=[Only(variant, MergeTokens(0.5))]):
        check_cached(unet, expected)


def test_another_variant_or_no_pass_is_refused_and_a_pass_that_fails_is_named_with_its_variant() -> None:
    with pytest.raises(DeepCacheError, match='a variant is "full" or "shallow", got \'both\''):
        Only("both", double_output)  # type: ignore[arg-type]
    with pytest.raises(DeepCacheError, match="Only takes a PassBase object or a function of a GraphModule, got 3"):
        Only("full", 3)  # type: ignore[arg-type]

    def broken(gm: torch.fx.GraphModule) -> None:
        raise ValueError("no luck")

    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager", passes=[Only("shallow", broken)])
    with pytest.raises(DeepCacheError, match="shallow variant: pass 'broken' failed: ValueError: no luck"):
        denoise(unet, TIMESTEPS[:1])


def test_fused_norms_cost_the_shallow_step_none_of_what_the_split_saves() -> None:
    """The split takes norms over the concatenation apart; an operator fused before it stayed whole."""
    arguments = torch.randn(2, 4, 8, 8), TIMESTEPS[:1].expand(2), torch.ones(2, 3, 6)
    macs = []
    for passes in ([], [FuseGroupNorm(cat=False)], [FuseGroupNorm()]):
        unet = deepcache_fx.optimize(CompVisUNet(), backend="eager", passes=passes)
        with torch.no_grad():
            unet(*arguments)
        [signature] = deepcache_fx.report(unet).signatures
        macs.append((signature.full_macs, signature.shallow_macs))
        if passes:
            fused = {record.name for record in signature.passes if record.modified}
            assert {"fuse_group_norm (full)", "fuse_group_norm (shallow)"} <= fused
    assert macs[0] == macs[1] == macs[2]
