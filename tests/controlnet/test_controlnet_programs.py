"""The programs of a ControlNet: all residuals, or some, over one prompt stage and one set of weights."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import fx

from deepcache_fx.controlnet.conditioning import ConditioningReader
from deepcache_fx.controlnet.controlnet_programs import ControlNetEntry, assemble_controlnet
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.pass_order import apply_passes
from deepcache_fx.graph.signature import Call, CallReader
from deepcache_fx.graph.skips import find_skip_connections, pick_branch
from deepcache_fx.graph.split import RATES, split
from deepcache_fx.options import Options
from deepcache_fx.planning.presets import preset
from deepcache_fx.runtime.pairing import PrecomputedInputs, pair
from tests.families import thorough
from tests.pipelines import controlnet

READER = ConditioningReader(ControlNetModel.forward)
OPTIONS = Options(backend="eager")


def inputs(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    values = dict(
        sample=torch.randn(2, 4, 16, 16, generator=generator),
        timestep=torch.tensor(7),
        encoder_hidden_states=torch.randn(2, 12, 16, generator=generator),
        controlnet_cond=torch.rand(2, 3, 16, 16, generator=generator),
        conditioning_scale=0.6,
        return_dict=False,
    )
    return {**values, **changes}


def made(network: ControlNetModel, options: Options = OPTIONS, **changes: Any) -> tuple[ControlNetEntry, Call]:
    call = READER.read(network, (), inputs(**changes))
    return assemble_controlnet(capture(network, call, READER), call, options, {}), call


@pytest.fixture(scope="module")
def network() -> ControlNetModel:
    return controlnet()


def flat(network: ControlNetModel, **changes: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        down, mid = network(**inputs(**changes))
    return [*down, mid]


@pytest.mark.parametrize("options", [OPTIONS, Options(backend="eager", disable=("all",))], ids=["default", "bit"])
def test_every_program_gives_the_networks_own_residuals(network: ControlNetModel, options: Options) -> None:
    entry, call = made(network, options)
    expected = flat(network)
    with torch.no_grad():
        prompt = entry.stage(call.tensors, None).values if entry.stage is not None else ()
        assert entry.count == len(expected) == 5
        for chosen in (range(5), [0], [1, 3], []):
            found = entry.step_for(frozenset(chosen))(call.tensors, prompt)
            for value, wanted in zip(found, [expected[i] for i in chosen], strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
                assert torch.equal(value, wanted) or options is OPTIONS
    assert (entry.stage is None) == (options is not OPTIONS)


def test_a_half_precision_strength_is_that_of_the_plain_network() -> None:
    network = controlnet().to(torch.bfloat16)
    half = {key: value.bfloat16() for key, value in inputs().items() if key in ("sample", "encoder_hidden_states")}
    half["controlnet_cond"] = inputs()["controlnet_cond"].bfloat16()
    entry, call = made(network, Options(backend="eager", disable=("all",)), **half)
    with torch.no_grad():
        found = entry.full(call.tensors, ())
    assert all(map(torch.equal, found, flat(network, **half)))


def test_fewer_residuals_are_less_work(network: ControlNetModel) -> None:
    entry, _ = made(network)
    costs = [entry.step_for(frozenset(range(count))).macs for count in range(6)]
    assert costs == sorted(costs)
    assert costs[0] == 0 < costs[1]
    assert costs[5] == entry.full.macs
    assert entry.prompt_macs > 0  # the picture's layers, and keys and values of the text


def test_a_choice_of_residuals_is_compiled_once(network: ControlNetModel) -> None:
    entry, _ = made(network)
    assert entry.step_for(frozenset({0})) is entry.step_for(frozenset({0}))
    assert entry.step_for(frozenset({0})) is not entry.step_for(frozenset({1}))


def test_the_users_passes_are_for_the_unet(network: ControlNetModel) -> None:
    def fail(graph: fx.GraphModule) -> None:
        raise AssertionError

    made(network, Options(backend="eager", passes=(fail,)))


def test_the_weights_are_the_networks_own(network: ControlNetModel) -> None:
    entry, _ = made(network)
    own = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in entry.staged.parameters()} <= own


@thorough
def test_a_shallow_step_of_the_sd15_controlnet_is_a_third_of_a_percent() -> None:
    """Stable Diffusion 1.5 at 512x512 with guidance, cut at branch 0: see docs/controlnet.md. On the meta device."""
    chosen = preset("sd15")
    unet = chosen.build()
    known = set(inspect.signature(ControlNetModel.__init__).parameters) - {"mid_block_type"}
    config = {key: value for key, value in unet.config.items() if key in known}  # as ControlNetModel.from_unet does
    with torch.device("meta"):
        network = ControlNetModel(**config).eval()
    given = {**chosen.inputs(unet), "return_dict": False}
    picture = torch.empty(2, 3, 512, 512, device="meta")
    call = READER.read_example(network, {**given, "controlnet_cond": picture})
    entry = assemble_controlnet(capture(network, call, READER), call, OPTIONS, {})
    residuals = [
        torch.empty(node.meta["val"].shape, device="meta") for node in entry.staged.graph.output_node().args[0]
    ]

    reader = CallReader(UNet2DConditionModel.forward)
    down = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    whole = reader.read_example(unet, {**given, **down})
    captured, _ = apply_passes(capture(unet, whole, reader), OPTIONS)
    branch = pick_branch(find_skip_connections(captured.graph.graph), 0, "")
    variants = split(captured, branch, rates=RATES, prompt_inputs=whole.prompt_inputs)
    pairing = pair(PrecomputedInputs(entry, tuple(residuals)), whole.tensors, whole.tensors, variants.cuts[0].reads())
    assert pairing is not None
    assert (pairing.read, len(residuals)) == ({0}, 13)
    shallow = entry.step_for(pairing.read).macs
    assert f"{shallow / 1e9:.2f} of {entry.plain_macs / 1e9:.1f}" == "0.93 of 283.3"
    assert f"{shallow / entry.plain_macs:.1%}" == "0.3%"
    assert f"{entry.prompt_macs / 1e9:.1f}" == "16.1"
    untouched = variants.full.macs.total + 2 * variants.cuts[0].shallow.macs.total + 3 * entry.plain_macs
    followed = variants.full.macs.total + 2 * variants.cuts[0].shallow.macs.total + entry.full.macs + 2 * shallow
    assert f"{untouched / followed:.2f}" == "1.49"
