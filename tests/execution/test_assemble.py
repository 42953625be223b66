"""One signature's programs: which passes run, in which order, and what an error says."""

from __future__ import annotations

import pytest
import torch

import deepcache_fx
from deepcache_fx import DeepCacheError
from tests.compvis import INPUTS, TIMESTEPS, CompVisUNet, denoise
from tests.oracles import REPEATING, TO_THE_BIT, agree


def test_disable_leaves_default_passes_out_and_refuses_unknown_names() -> None:
    unet = CompVisUNet()
    expected = denoise(deepcache_fx.optimize(CompVisUNet(), **REPEATING), TIMESTEPS)
    deepcache_fx.optimize(unet, **TO_THE_BIT)
    assert agree(denoise(unet, TIMESTEPS), expected, REPEATING)
    assert deepcache_fx.report(unet).signatures[0].passes == ()
    with pytest.raises(DeepCacheError, match=r"disable names no default pass: nonsense; there are: canonicalize"):
        deepcache_fx.optimize(CompVisUNet(), disable=["nonsense"], example_inputs=INPUTS)


def test_a_users_pass_runs_before_the_split_and_is_named_in_errors() -> None:
    def scale_output(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], 2.0))
        output.args = ((doubled,),)
        return gm

    plain, unet = CompVisUNet(), deepcache_fx.optimize(CompVisUNet(), passes=[scale_output], **TO_THE_BIT)
    with torch.no_grad():
        assert torch.equal(unet(**INPUTS), 2 * plain(**INPUTS))

    def broken(gm: torch.fx.GraphModule) -> None:
        raise ValueError("no luck")

    failing = CompVisUNet()
    with pytest.raises(DeepCacheError, match="pass 'broken' failed: ValueError: no luck"):
        deepcache_fx.optimize(failing, passes=[broken], example_inputs=INPUTS)
    assert type(failing) is CompVisUNet
