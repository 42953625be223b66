"""Token merging: which attention it finds and which it leaves alone, and the authors' tomesd as the reference."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import deepcache_fx
from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.macs import total_macs
from deepcache_fx.graph.skips import find_skip_connections
from deepcache_fx.graph.split import split
from passes import run_passes
from passes.approximate import MergeTokens
from tests import models
from tests.families import examples
from tests.graphs import GraphBuilder, captured, check, check_metadata, error, targets, unet_call

aten = torch.ops.aten

BATCH, CHANNELS, HEADS = 2, 8, 2
ADDED = 42
"""Nodes of one merged attention: two buffers, the matching, the merged tokens, the result for every pixel."""
ANY = 10.0  # a tolerance, where values are compared elsewhere


def pixels(b: GraphBuilder, height: int = 8, width: int = 8) -> fx.Node:
    """The pixels of the graph's first input as tokens."""
    flat = b.op(aten.reshape.default, b.input(BATCH, CHANNELS, height, width), [BATCH, CHANNELS, height * width])
    return b.op(aten.transpose.int, flat, 1, 2)


def normed(b: GraphBuilder, tokens: fx.Node) -> fx.Node:
    return b.op(aten.layer_norm.default, tokens, [CHANNELS], b.parameter(CHANNELS), b.parameter(CHANNELS))


def projected(b: GraphBuilder, x: fx.Node) -> fx.Node:
    return b.op(aten.linear.default, x, b.parameter(CHANNELS, CHANNELS))


def attend(b: GraphBuilder, q: fx.Node, k: fx.Node, v: fx.Node, count: int = -1, **options: Any) -> fx.Node:
    """Attention of two heads, and a layer after it."""
    parts = []
    for part in (q, k, v):
        several = b.op(aten.view.default, part, [BATCH, count if part is q else -1, HEADS, CHANNELS // HEADS])
        parts.append(b.op(aten.transpose.int, several, 1, 2))
    mixed = b.op(aten.transpose.int, b.op(aten.scaled_dot_product_attention.default, *parts, **options), 1, 2)
    flat = b.op(aten.reshape.default, mixed, [BATCH, count, CHANNELS])
    return b.op(aten.linear.default, flat, b.parameter(CHANNELS, CHANNELS), b.parameter(CHANNELS))


def self_attention(b: GraphBuilder, x: fx.Node, count: int = -1, **options: Any) -> fx.Node:
    return attend(b, projected(b, x), projected(b, x), projected(b, x), count, **options)


def block(b: GraphBuilder, tokens: fx.Node, count: int = -1) -> fx.Node:
    """Norm and self-attention, and the residual around them."""
    return b.op(aten.add.Tensor, self_attention(b, normed(b, tokens), count), tokens)


def merges(gm: fx.GraphModule) -> int:
    return targets(gm).count(aten.scatter_reduce.two)


def tokens_attended(gm: fx.GraphModule) -> list[int]:
    nodes = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return [node.meta["val"].shape[-2] for node in nodes]


# What it computes.


@examples(8)
@given(height=st.integers(2, 9), width=st.integers(2, 9), ratio=st.floats(0.05, 0.75))
def test_computes_what_tomesd_does(height: int, width: int, ratio: float) -> None:
    tomesd = pytest.importorskip("tomesd", reason="the authors' implementation is not installed")
    b = GraphBuilder(torch.float64)
    gm = b.build(block(b, pixels(b, height, width)))
    merged = int(ratio * height * width)
    _, [record] = run_passes(gm, [MergeTokens(ratio)])
    assert record.modified == (merged > 0)

    weight, bias, q, k, v, out, out_bias = gm.parameters()
    tokens = b.inputs[0].flatten(2).transpose(1, 2)
    x = F.layer_norm(tokens, [CHANNELS], weight, bias)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(tokens, width, height, 2, 2, merged, no_rand=True)
    fewer = merge(x)
    parts = [(fewer @ w.T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    expected = unmerge(mixed @ out.T + out_bias) + tokens
    with torch.no_grad():
        assert error(gm(*b.inputs), (expected,)) <= 1e-12


def test_merging_equal_tokens_changes_nothing() -> None:
    b = GraphBuilder()
    gm = b.build(block(b, pixels(b)))
    alike = b.inputs[0][:, :, :1, :1].expand(-1, -1, 8, 8).contiguous()
    expected = gm(alike)
    run_passes(gm, [MergeTokens(0.75)])
    assert merges(gm) == 1
    assert error(gm(alike), expected) <= 1e-6


def test_tokens_without_a_direction_are_no_trouble() -> None:
    b = GraphBuilder()
    gm = b.build(self_attention(b, pixels(b)))
    run_passes(gm, [MergeTokens()])
    assert gm(torch.zeros_like(b.inputs[0]))[0].isfinite().all()


@pytest.mark.parametrize(("ratio", "attended"), [(0.25, 48), (0.5, 32), (0.75, 16)])
def test_the_ratio_says_how_many_tokens_are_gone(ratio: float, attended: int) -> None:
    b = GraphBuilder()
    gm = b.build(block(b, pixels(b)))
    check(MergeTokens(ratio), gm, b.inputs, ADDED, tolerance=ANY)
    assert tokens_attended(gm) == [attended]


def test_a_ratio_of_zero_is_the_identity() -> None:
    b = GraphBuilder()
    gm = b.build(block(b, pixels(b)))
    check(MergeTokens(0), gm, b.inputs, 0)


@pytest.mark.parametrize("ratio", [-0.1, 0.76, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio must be from 0 to 0\.75.*got"):
        MergeTokens(ratio)


@pytest.mark.parametrize("factor", [0, 1.5, True])
def test_a_resolution_that_there_cannot_be_is_refused(factor: Any) -> None:
    with pytest.raises(ValueError, match="max_downsample must be an integer of at least 1"):
        MergeTokens(max_downsample=factor)


# What it finds.


def test_sizes_that_are_spelled_out_follow() -> None:
    b = GraphBuilder()
    gm = b.build(block(b, pixels(b), count=64))
    check(MergeTokens(), gm, b.inputs, ADDED, tolerance=ANY)
    assert tokens_attended(gm) == [32]


def test_merges_in_a_chain_of_blocks() -> None:
    b = GraphBuilder()
    gm = b.build(block(b, block(b, block(b, pixels(b)))))
    check(MergeTokens(), gm, b.inputs, 3 * ADDED, tolerance=ANY)
    assert tokens_attended(gm) == [32, 32, 32]


def test_all_that_read_the_result_get_a_token_for_every_pixel() -> None:
    b = GraphBuilder()
    x = pixels(b)
    out = self_attention(b, x)
    gm = b.build(b.op(aten.add.Tensor, out, x), b.op(aten.sin.default, out), out)
    check(MergeTokens(), gm, b.inputs, ADDED, tolerance=ANY)
    assert [tuple(result.shape) for result in gm(*b.inputs)] == [(BATCH, 64, CHANNELS)] * 3


def test_several_attentions_may_read_the_same_tokens() -> None:
    b = GraphBuilder()
    x = normed(b, pixels(b))
    gm = b.build(self_attention(b, x), self_attention(b, x))
    check(MergeTokens(), gm, b.inputs, 2 * ADDED, tolerance=ANY)


@pytest.mark.parametrize("spelling", ["one layer", "adapters", "heads in the batch", "channels first", "norm of heads"])
def test_finds_projections_however_they_are_spelled(spelling: str) -> None:
    b = GraphBuilder()
    x = pixels(b) if spelling == "channels first" else normed(b, pixels(b))
    if spelling == "one layer":
        parts = b.op(aten.chunk.default, b.op(aten.linear.default, x, b.parameter(3 * CHANNELS, CHANNELS)), 3, -1)
        out = attend(b, *(b.op(operator.getitem, parts, index) for index in range(3)))
    elif spelling == "adapters":
        low = [b.op(aten.linear.default, x, b.parameter(2, CHANNELS)) for _ in range(3)]
        high = [b.op(aten.mul.Tensor, b.op(aten.linear.default, a, b.parameter(CHANNELS, 2)), 0.5) for a in low]
        out = attend(b, *(b.op(aten.add.Tensor, projected(b, x), a) for a in high))
    elif spelling == "heads in the batch":
        parts = []
        for _ in range(3):
            several = b.op(aten.reshape.default, projected(b, x), [BATCH, 64, HEADS, CHANNELS // HEADS])
            several = b.op(aten.permute.default, several, [0, 2, 1, 3])
            parts.append(b.op(aten.reshape.default, several, [BATCH * HEADS, 64, CHANNELS // HEADS]))
        mixed = b.op(aten.scaled_dot_product_attention.default, *parts)
        mixed = b.op(aten.reshape.default, mixed, [BATCH, HEADS, 64, CHANNELS // HEADS])
        mixed = b.op(aten.permute.default, mixed, [0, 2, 1, 3])
        out = b.op(aten.reshape.default, mixed, [BATCH, 64, CHANNELS])
    elif spelling == "channels first":
        columns = b.op(aten.transpose.int, x, 1, 2)
        out = self_attention(b, b.op(aten.transpose.int, b.op(aten.group_norm.default, columns, 2), 1, 2))
    else:
        several = [b.op(aten.view.default, projected(b, x), [BATCH, -1, HEADS, CHANNELS // HEADS]) for _ in range(3)]
        several = [b.op(aten.rms_norm.default, part, [CHANNELS // HEADS], None, 1e-5) for part in several]
        q, k, v = (b.op(aten.transpose.int, part, 1, 2) for part in several)
        mixed = b.op(aten.transpose.int, b.op(aten.scaled_dot_product_attention.default, q, k, v), 1, 2)
        out = projected(b, b.op(aten.flatten.using_ints, mixed, 2))
    gm = b.build(b.op(aten.sin.default, out))
    item = MergeTokens()
    check(item, gm, b.inputs, ADDED, tolerance=ANY)
    assert tokens_attended(gm) == [32]
    layers = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert all(node.meta["val"].shape[1] == 32 for node in layers), "the layers run on the merged tokens"


def test_the_layer_after_the_attention_runs_on_all_pixels_where_several_read_the_attention() -> None:
    b = GraphBuilder()
    x = normed(b, pixels(b))
    out = self_attention(b, x)
    flat = out.args[0]
    gm = b.build(b.op(aten.add.Tensor, out, projected(b, flat)))
    check(MergeTokens(), gm, b.inputs, ADDED, tolerance=ANY)
    assert tokens_attended(gm) == [32]


def test_a_result_that_is_parted_gets_a_token_for_every_pixel_before() -> None:
    b = GraphBuilder()
    x = normed(b, pixels(b))
    q, k = projected(b, x), projected(b, x)
    v = b.op(aten.linear.default, x, b.parameter(2 * CHANNELS, CHANNELS))
    parts = b.op(aten.chunk.default, b.op(aten.scaled_dot_product_attention.default, q, k, v), 2, -1)
    out, gate = (b.op(operator.getitem, parts, index) for index in range(2))
    gm = b.build(b.op(aten.mul.Tensor, out, b.op(aten.sigmoid.default, gate)))
    check(MergeTokens(), gm, b.inputs, ADDED, tolerance=ANY)
    assert tokens_attended(gm) == [32]


# What it leaves alone.


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("cross-attention", "attends to other tokens than its own"),
        ("a mask", "has a mask"),
        ("causal", "has a mask"),
        ("fewer keys than queries", "may mix tokens"),
        ("positions", "may mix tokens"),
        ("a text", "not the pixels of a feature map"),
        ("frames", "not the pixels of a feature map"),
        ("projections that are read elsewhere", "something else reads"),
        ("a smaller feature map", "works on 4x4 pixels, and max_downsample is 1"),
        ("one row", "not the pixels of a feature map"),
        ("heads apart", "does not come as"),
    ],
)
def test_leaves_other_attention_alone(case: str, reason: str) -> None:
    b = GraphBuilder()
    others: list[fx.Node] = []
    if case == "cross-attention":
        x, text = pixels(b), b.input(BATCH, 5, CHANNELS)
        out = attend(b, projected(b, x), projected(b, text), projected(b, text))
    elif case == "a mask":
        out = self_attention(b, pixels(b), attn_mask=b.input(64, 64))
    elif case == "causal":
        out = self_attention(b, pixels(b), is_causal=True)
    elif case == "fewer keys than queries":
        x = pixels(b)
        pooled = b.op(aten.slice.Tensor, x, 1, 0, 32)
        out = attend(b, projected(b, x), projected(b, pooled), projected(b, pooled))
    elif case == "positions":
        x = pixels(b)
        out = attend(b, b.op(aten.add.Tensor, projected(b, x), b.parameter(64, CHANNELS)), projected(b, x), x)
    elif case == "a text":
        out = self_attention(b, b.input(BATCH, 64, CHANNELS))
    elif case == "frames":
        clip = b.op(aten.reshape.default, b.input(4 * BATCH, CHANNELS, 8, 8), [BATCH, 4, CHANNELS, 64])
        frames = b.op(aten.reshape.default, b.op(aten.permute.default, clip, [0, 3, 1, 2]), [BATCH * 64, 4, CHANNELS])
        q, k, v = (projected(b, frames) for _ in range(3))
        out = b.op(aten.scaled_dot_product_attention.default, q, k, v)
    elif case == "projections that are read elsewhere":
        x = pixels(b)
        k = projected(b, x)
        others = [b.op(aten.sin.default, k)]
        out = attend(b, projected(b, x), k, projected(b, x))
    elif case == "a smaller feature map":
        pooled = b.op(aten.avg_pool2d.default, b.input(BATCH, CHANNELS, 8, 8), [2, 2])
        flat = b.op(aten.reshape.default, pooled, [BATCH, CHANNELS, 16])
        out = self_attention(b, b.op(aten.transpose.int, flat, 1, 2))
    elif case == "one row":
        out = self_attention(b, pixels(b, 1, 64))
    else:
        x = pixels(b)
        parts = [b.op(aten.reshape.default, projected(b, x), [BATCH, 64, HEADS, 4]) for _ in range(3)]
        mixed = b.op(
            aten.scaled_dot_product_attention.default, *(b.op(aten.transpose.int, part, 1, 2) for part in parts)
        )
        out = b.op(aten.sin.default, mixed)
    gm = b.build(out, *others)
    item = MergeTokens()
    check(item, gm, b.inputs, 0)
    [declined] = item.declined
    assert reason in declined.reason
    assert declined.nodes[0].startswith("scaled_dot_product_attention")


def test_a_graph_without_attention_stays() -> None:
    b = GraphBuilder()
    item = MergeTokens()
    check(item, b.build(b.op(aten.sin.default, b.input(BATCH, CHANNELS, 8, 8))), b.inputs, 0)
    assert item.declined == ()


def test_merges_in_smaller_feature_maps_where_asked_to() -> None:
    b = GraphBuilder()
    pooled = b.op(aten.avg_pool2d.default, b.input(BATCH, CHANNELS, 16, 16), [2, 2])
    flat = b.op(aten.reshape.default, pooled, [BATCH, CHANNELS, 64])
    gm = b.build(self_attention(b, b.op(aten.transpose.int, flat, 1, 2)))
    check(MergeTokens(max_downsample=2), gm, b.inputs, ADDED, tolerance=ANY)


# Real models.


def unet() -> UNet2DConditionModel:
    """Attention at 8x8 pixels in the first block and the two layers of the last, at 4x4 in the middle."""
    return models.sd_unet(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@cache
def _captured_unet() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    return captured(unet().requires_grad_(False), *unet_call())


def captured_unet() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    gm, inputs = _captured_unet()
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph), inputs


def test_the_more_tokens_a_unet_merges_the_less_it_computes_and_the_more_it_errs() -> None:
    gm, inputs = captured_unet()
    expected = gm(*inputs)
    errors, macs = [0.0], [total_macs(gm.graph.nodes)]
    for ratio in (0.1, 0.4, 0.75):
        gm, _ = captured_unet()
        run_passes(gm, [MergeTokens(ratio)])
        assert merges(gm) == 3
        check_metadata(gm, inputs)
        errors.append(error(gm(*inputs), expected))
        macs.append(total_macs(gm.graph.nodes))
    assert errors == sorted(errors)
    assert 0 < errors[1] < errors[-1] < 0.5
    assert [m.total for m in macs] == sorted((m.total for m in macs), reverse=True)
    assert macs[-1].attention < macs[0].attention / 2


@pytest.mark.parametrize(("factor", "count"), [(1, 3), (2, 4)])
def test_merges_in_all_feature_maps_of_a_unet_up_to_the_factor(factor: int, count: int) -> None:
    gm, inputs = captured_unet()
    item = MergeTokens(max_downsample=factor)
    run_passes(gm, [item])
    assert merges(gm) == count
    check_metadata(gm, inputs)
    assert len(item.declined) == 8 - count
    assert "merge_tokens" in str(run_passes(gm, [item])[1][0])


@pytest.mark.parametrize("rates", [(), ("refresh_rate", "prompt_rate")])
def test_merges_in_one_variant_alone(rates: tuple[str, ...]) -> None:
    gm, _ = captured_unet()
    whole = Captured(gm, pytree.tree_structure(0))
    variants = split(whole, find_skip_connections(gm.graph)[0], rates=rates, prompt_inputs=(2,))
    full, shallow = variants.full.step, variants.cuts[0].shallow.step
    before = [total_macs(graph.graph.nodes).total for graph in (full, shallow)]
    run_passes(shallow, [MergeTokens()])
    assert merges(shallow) == 1
    assert merges(full) == 0
    run_passes(full, [MergeTokens()])
    assert merges(full) == 3
    after = [total_macs(graph.graph.nodes).total for graph in (full, shallow)]
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_optimize_takes_it_as_a_pass() -> None:
    model = unet()
    sample, _, text = unet_call()
    with deepcache_fx.optimized(model, interval=2, passes=[MergeTokens(0.5)], backend="eager"), torch.no_grad():
        outputs = [model(sample, t, text).sample for t in (9, 8)]
        report = deepcache_fx.report(model)
    [record] = [record for record in report.signatures[0].passes if record.name == "merge_tokens"]
    assert record.modified
    assert report.last_run == "Fs"
    assert all(output.shape == sample.shape and output.isfinite().all() for output in outputs)
