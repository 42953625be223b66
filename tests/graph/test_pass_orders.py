"""Exact passes in any order, any number of times: the function stays, whatever the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import deepcache_fx
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.pass_order import DEFAULT_PASSES, POST_SPLIT_PASSES, default_names
from deepcache_fx.graph.signature import CallReader
from passes import FuseGroupNorm, Pass, SplitOverCat, pass_name, run_passes
from tests import models, small
from tests.compvis import CompVisUNet
from tests.families import examples, family
from tests.graphs import check_metadata, error, unet_call
from tests.oracles import REPEATING, CatOracle

EXACT: tuple[Pass, ...] = (*DEFAULT_PASSES, *POST_SPLIT_PASSES, FuseGroupNorm(cat=False), SplitOverCat())
"""All but `ChooseAttention` have something to do on a CPU."""

PAIRS = list(itertools.combinations(EXACT, 2))

TOLERANCE = 1e-5

Captured = tuple[fx.GraphModule, list[torch.Tensor], tuple[torch.Tensor, ...]]


def capture_of(model: torch.nn.Module, *args: Any) -> Captured:
    """The graph as it is captured, the tensors of the call, and what the model itself answers."""
    torch.manual_seed(1)
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.05 * torch.randn_like(parameter)  # norms would have weights of one and biases of zero
    with torch.no_grad():
        answer = model(*args)
    reader = CallReader(type(model).forward)
    call = reader.read(model, args, {})
    expected = answer if isinstance(answer, torch.Tensor) else answer[0]
    return capture(model, call, reader).graph, list(call.tensors), (expected,)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same weights."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def check_order(captured: Captured, order: tuple[Pass, ...]) -> list[bool]:
    """Fail where the passes in this order change the function; returns which of them changed the graph."""
    whole, inputs, expected = captured
    gm, records = run_passes(copy_of(whole), order)
    gm.graph.lint()
    assert error(gm(*inputs), expected) <= TOLERANCE, [pass_name(item) for item in order]
    check_metadata(gm, inputs)
    return [record.modified for record in records]


@cache
def unet_graph() -> Captured:
    unet = models.sd_unet(**small.ATTENTION_ON_TOP)
    return capture_of(unet, *unet_call())


@pytest.mark.parametrize("item", EXACT, ids=pass_name)
def test_a_pass_alone_keeps_the_function(item: Pass) -> None:
    [modified] = check_order(unet_graph(), (item,))
    assert modified == (pass_name(item) != "choose_attention"), "a pass that finds nothing is no test of an order"


@pytest.mark.parametrize(
    "pair", family([(pair,) for pair in PAIRS], *PAIRS[::3]), ids=lambda pair: "-".join(map(pass_name, pair))
)
def test_both_orders_of_a_pair_keep_the_function(pair: tuple[Pass, Pass]) -> None:
    check_order(unet_graph(), pair)
    check_order(unet_graph(), pair[::-1])


def test_a_pass_that_changes_the_function_would_be_found_out() -> None:
    def drop_a_bias(gm: fx.GraphModule) -> fx.GraphModule:
        node = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.group_norm.default)[-1]
        node.args = (*node.args[:3], None, *node.args[4:])
        return gm

    with pytest.raises(AssertionError, match="drop_a_bias"):
        check_order(unet_graph(), (*DEFAULT_PASSES, drop_a_bias))


ORDERS = st.lists(st.lists(st.sampled_from(range(len(EXACT))), max_size=6), min_size=3, max_size=3)
"""By number: a failing example is then short to read."""


def check_orders(captured: Captured, orders: list[list[int]]) -> None:
    for order in orders:
        check_order(captured, tuple(EXACT[number] for number in order))


@examples(2, 12)
@given(
    width=st.integers(1, 3),
    mult=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    blocks=st.integers(1, 2),
    attends=st.booleans(),
    orders=ORDERS,
)
def test_passes_in_random_order_keep_the_function_of_a_random_unet(
    width: int, mult: list[int], blocks: int, attends: bool, orders: list[list[int]]
) -> None:
    """Written outside diffusers. Its norms have four groups, which straddle where the widths do not add up."""
    model = CompVisUNet(channels=4 * width, mult=tuple(mult), blocks=blocks)
    if not attends:
        del model.middle_block[1]
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 6, generator=generator)
    check_orders(capture_of(model, x, torch.full((2,), 7), context), orders)


@examples(2, 16)
@given(
    groups=st.sampled_from([1, 2, 4]),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layers=st.integers(1, 2),
    attends=st.tuples(st.booleans(), st.booleans()),
    middle=st.sampled_from([None, "UNetMidBlock2D"]),
    orders=ORDERS,
)
def test_passes_in_random_order_keep_the_function_of_a_random_diffusers_unet(
    groups: int,
    widths: tuple[int, int],
    layers: int,
    attends: tuple[bool, bool],
    middle: str | None,
    orders: list[list[int]],
) -> None:
    model = models.sd_unet(
        block_out_channels=[4 * groups * width for width in widths],
        layers_per_block=layers,
        norm_num_groups=groups,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        mid_block_type=middle,
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
    )
    check_orders(capture_of(model, *unet_call()), orders)


@torch.no_grad()
def loop(call: Callable[..., torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 6, generator=generator)
    for step, t in enumerate((900, 700, 500)):
        x = x - 0.3 * call(step, x, torch.full((2,), t), context)
    return x


@examples(2, 12)
@given(disable=st.sets(st.sampled_from(default_names())), branch=st.integers(0, 3))
def test_caching_is_exact_whichever_defaults_are_left_out(disable: set[str], branch: int) -> None:
    unet = CompVisUNet().requires_grad_(False)
    oracle = CatOracle(unet.forward, branch)
    expected = loop(lambda step, *args: oracle(step % 2 == 0, *args))
    options: dict[str, Any] = {**REPEATING, "interval": 2, "branch": branch, "disable": sorted(disable)}
    with deepcache_fx.optimized(unet, **options):
        actual = loop(lambda step, *args: unet(*args))
        report = deepcache_fx.report(unet)
    assert report.last_run == "FsF"
    assert {record.name for record in report.signatures[0].passes}.isdisjoint(disable)
    assert error((actual,), (expected,)) <= TOLERANCE
