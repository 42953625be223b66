"""What `plan` promises: the numbers of the split that would run, from shapes alone, leaving the model as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import interpolate

import deepcache_fx
from deepcache_fx import BranchError, DeepCacheError
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.macs import Macs
from deepcache_fx.graph.pass_order import apply_passes
from deepcache_fx.graph.signature import CallReader
from deepcache_fx.graph.skips import find_skip_connections
from deepcache_fx.graph.split import split
from deepcache_fx.options import Options
from deepcache_fx.planning.example_inputs import example_inputs
from deepcache_fx.planning.plan import BranchPlan, Plan, giga, plan
from tests.models import sd_pipeline, sd_unet


class SmallUNet(torch.nn.Module):
    """Two levels, written outside diffusers; every convolution is 3x3 and counts 9 MACs a value and input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.into = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.down = torch.nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.lower = torch.nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.middle = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.upper = torch.nn.Conv2d(32, 16, 3, padding=1)
        self.out = torch.nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        first = self.into(sample) + timestep
        second = self.down(first)
        deepest = self.middle(self.lower(second))
        deep = self.upper(torch.cat([interpolate(deepest, scale_factor=2.0), second], 1))
        return self.out(torch.cat([interpolate(deep, scale_factor=2.0), first], 1))


INTO, OUT = 9 * 3 * 8 * 256, 9 * 24 * 3 * 256
DOWN, UPPER = 9 * 8 * 16 * 64, 9 * 32 * 16 * 64
LOWER, MIDDLE = 9 * 16 * 16 * 16, 9 * 16 * 16 * 16
INPUTS = {"sample": torch.zeros(1, 3, 16, 16), "timestep": torch.tensor(5)}


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(SmallUNet().eval(), example_inputs=INPUTS)


def attentive_unet() -> UNet2DConditionModel:
    """SD-shaped, with two levels."""
    return sd_unet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture(scope="module")
def sd() -> Plan:
    return plan(attentive_unet())


def test_counts_of_a_hand_written_unet_are_those_on_paper(small: Plan) -> None:
    assert small.full == Macs(dense=INTO + DOWN + LOWER + MIDDLE + UPPER + OUT)
    assert [branch.shallow for branch in small.branches] == [
        Macs(dense=INTO + OUT),
        Macs(dense=INTO + DOWN + UPPER + OUT),
    ]
    # What is kept is the deep operand: 16 channels at 16x16, then at 8x8, of 4 bytes.
    assert [branch.cache_bytes for branch in small.branches] == [16 * 256 * 4, 16 * 64 * 4]
    assert [(b.index, b.block, b.layer, b.full) for b in small.branches] == [
        (0, 0, 0, small.full),
        (1, 1, 0, small.full),
    ]


def test_every_branch_counts_what_splitting_there_gives(sd: Plan) -> None:
    unet = attentive_unet()
    reader = CallReader(type(unet).forward)
    inputs = example_inputs(unet)
    captured, _ = apply_passes(capture(unet, reader.read(unet, (), inputs), reader), Options())
    found = find_skip_connections(captured.graph.graph)
    assert len(sd.branches) == len(found) == 4
    for planned, connection in zip(sd.branches, found, strict=True):
        variants = split(captured, connection)
        assert (planned.index, planned.block, planned.layer) == (connection.index, connection.block, connection.layer)
        assert (planned.full, planned.shallow) == (variants.full.macs, variants.cuts[0].shallow.macs)
        assert planned.cache_bytes == variants.cuts[0].cost.cache_bytes


def test_deeper_branches_save_less(sd: Plan) -> None:
    shares = [branch.share for branch in sd.branches]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5
    assert shares[-1] < 1


def test_the_bound_is_the_ratio_of_a_period_without_and_with_caching() -> None:
    branch = BranchPlan(
        0, 0, 0, full=Macs(80, 20), shallow=Macs(5, 5), cache_bytes=1, hoisted=Macs(4, 5), hoisted_cache_bytes=2
    )
    assert branch.share == 0.1
    assert branch.speedup(1) == 1
    assert branch.speedup(2) == pytest.approx(200 / 110)
    assert branch.speedup(5) == pytest.approx(500 / 140)


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, "3"])
def test_an_interval_that_is_no_positive_integer_is_refused(small: Plan, interval: Any) -> None:
    with pytest.raises(DeepCacheError, match="interval must be an integer of at least 1"):
        small.branches[0].speedup(interval)
    with pytest.raises(DeepCacheError, match="interval must be an integer of at least 1"):
        plan(SmallUNet(), example_inputs=INPUTS, intervals=[2, interval])


def test_the_meta_device_gives_the_plan_of_a_model_with_weights(sd: Plan) -> None:
    with torch.device("meta"):
        unet = attentive_unet()
    assert plan(unet) == sd


def test_the_model_is_left_as_it_was() -> None:
    unet = SmallUNet().train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    parameters, attributes, state = list(unet.parameters()), dict(vars(unet)), torch.get_rng_state()
    plan(unet, example_inputs=INPUTS)
    assert type(unet) is SmallUNet
    assert vars(unet) == attributes
    assert all(now is then for now, then in zip(unet.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)


def test_an_optimised_model_is_planned_as_it_was_and_stays_optimised(small: Plan) -> None:
    unet = deepcache_fx.optimize(SmallUNet().eval(), interval=4)
    assert plan(unet, example_inputs=INPUTS) == small
    assert deepcache_fx.report(unet).captures == 0
    assert type(unet) is not SmallUNet


def test_inputs_by_position_and_a_timestep_as_a_number_are_the_same_call(small: Plan) -> None:
    assert plan(SmallUNet().eval(), example_inputs=(INPUTS["sample"], 5)) == small


def test_a_pipeline_stands_for_its_unet_and_twice_the_batch_for_twice_the_work(sd: Plan) -> None:
    found = plan(sd_pipeline(attentive_unet()), batch=4)
    assert found.full == Macs(2 * sd.full.dense, 2 * sd.full.attention)
    assert [branch.cache_bytes for branch in found.branches] == [2 * branch.cache_bytes for branch in sd.branches]
    assert "sample 4x4x8x8" in found.inputs


def test_half_precision_halves_the_cache_alone(small: Plan) -> None:
    inputs = {"sample": INPUTS["sample"].half(), "timestep": torch.tensor(5)}
    found = plan(SmallUNet().eval().half(), example_inputs=inputs)
    assert found.dtype == "float16"
    assert found.full == small.full
    assert [2 * branch.cache_bytes for branch in found.branches] == [branch.cache_bytes for branch in small.branches]


def test_the_dictionary_holds_both_counts_and_survives_json(sd: Plan) -> None:
    found = sd.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert (found["full_macs"], found["full_macs_without_attention"]) == (sd.full.total, sd.full.dense)
    assert sd.full.attention > 0
    first = found["branches"][0]
    assert (first["branch"], first["block"], first["layer"]) == (0, 0, 0)
    assert first["shallow_macs"] - first["shallow_macs_without_attention"] == sd.branches[0].shallow.attention > 0
    assert first["speedup_bound"] == {str(n): sd.branches[0].speedup(n) for n in (2, 3, 5, 10)}


def test_printing_gives_a_line_for_each_branch_and_both_counts(small: Plan) -> None:
    lines = str(small).splitlines()
    assert lines[0] == "SmallUNet in float32, one call: sample 1x3x16x16, timestep scalar"
    assert lines[1].split()[-4:] == ["N=2", "N=3", "N=5", "N=10"]
    shallow = INTO + OUT
    bound = 3 * small.full.total / (small.full.total + 2 * shallow)
    cells = lines[2].split()
    assert cells[:6] == ["0", "0/0", giga(small.full.total), giga(shallow), f"{small.branches[0].share:.1%}", "0.02"]
    hoisted = small.branches[0]
    assert cells[6:8] == [giga(hoisted.hoisted.total), f"{hoisted.hoisted_cache_bytes / 2**20:.2f}"]
    assert hoisted.hoisted.total < shallow
    assert cells[9] == f"{bound:.2f}"
    assert lines[3].split()[:2] == ["1", "1/0"]
    assert f"full {giga(small.full.dense)} GMAC" in lines[-1]


def test_giga_keeps_four_digits_and_no_more_than_a_place_of_large_numbers() -> None:
    assert [giga(n) for n in (6_761_236_398_080, 63_252_070_400, 494_010_368, 1_234_567)] == [
        "6761.2",
        "63.25",
        "0.4940",
        "0.001235",
    ]


def test_a_model_without_skip_connections_is_refused() -> None:
    with pytest.raises(BranchError, match="Conv2d has no skip connection"):
        plan(torch.nn.Conv2d(3, 3, 1), example_inputs=[torch.zeros(1, 3, 8, 8)])


def test_what_is_neither_a_unet_nor_a_pipeline_is_refused() -> None:
    with pytest.raises(DeepCacheError, match=r"plan takes a UNet or a diffusers pipeline with a \.unet, got str"):
        plan("sd15")


@pytest.mark.parametrize(
    "inputs",
    [{"sample": torch.zeros(1, 3, 16, 16)}, {"wrong": 1}, (torch.zeros(1, 3, 16, 16), 1, 2, 3), ([1], 2)],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any) -> None:
    with pytest.raises(DeepCacheError, match="example_inputs do not fit SmallUNet"):
        plan(SmallUNet(), example_inputs=inputs)


def test_a_model_that_tells_no_inputs_needs_them() -> None:
    with pytest.raises(DeepCacheError, match=r"SmallUNet has no configuration .* pass example_inputs="):
        plan(SmallUNet())
