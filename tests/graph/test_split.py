"""Finding skip connections and splitting at one, by rates too, on graphs built by hand and on captured models."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from deepcache_fx.errors import BranchError
from deepcache_fx.graph.capture import Captured, capture
from deepcache_fx.graph.signature import CallReader
from deepcache_fx.graph.skips import find_skip_connections, pick_branch, require_skip_connections
from deepcache_fx.graph.split import RATES, keep_outputs, plain_cost, refresh_costs, split
from passes.shared.match import is_op
from tests import models
from tests.families import thorough

aten = torch.ops.aten

ROUNDING = dict(atol=1e-3, rtol=1e-4)
"""Values here reach some hundreds: sums taken in another order differ."""


class Builder:
    """Builds a graph node by node, with example values as metadata."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.graph = fx.Graph()
        self.root = torch.nn.Module()

    def input(self, *shape: int) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = torch.randn(shape)
        return node

    def op(self, target: object, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))  # type: ignore[operator]
        return node

    def conv(self, x: fx.Node, channels: int) -> fx.Node:
        name = f"weight{len(self.graph.nodes)}"
        weight = torch.nn.Parameter(torch.randn(channels, x.meta["val"].shape[1], 1, 1))
        self.root.register_parameter(name, weight)
        node = self.graph.get_attr(name)
        node.meta["val"] = weight.detach()
        return self.op(aten.conv2d.default, x, node)

    def cat(self, *operands: fx.Node, axis: int = 1) -> fx.Node:
        return self.op(aten.cat.default, list(operands), axis)

    def captured(self, *outputs: fx.Node) -> Captured:
        self.graph.output(tuple(outputs))
        module = fx.GraphModule(self.root, self.graph)
        import torch.utils._pytree as pytree

        return Captured(module, pytree.tree_structure(tuple(range(len(outputs)))))


def two_level_unet() -> tuple[Builder, Captured]:
    b = Builder()
    x = b.input(1, 3, 4, 4)
    skip0 = b.conv(x, 4)
    skip1 = b.conv(skip0, 4)
    deep = b.conv(b.conv(skip1, 8), 5)
    up1 = b.conv(b.cat(deep, skip1), 6)
    up0 = b.conv(b.cat(up1, skip0), 3)
    return b, b.captured(up0)


def test_counts_skip_connections_from_the_output() -> None:
    _, captured = two_level_unet()
    found = find_skip_connections(captured.graph.graph)
    assert [b.index for b in found] == [0, 1]
    assert [b.deep.meta["val"].shape[1] for b in found] == [6, 5]


@pytest.mark.parametrize("deep_first", [True, False])
def test_the_deep_operand_is_found_on_either_side(deep_first: bool) -> None:
    b = Builder()
    skip = b.conv(b.input(1, 3, 4, 4), 4)
    deep = b.conv(skip, 5)
    joined = b.cat(deep, skip) if deep_first else b.cat(skip, deep)
    captured = b.captured(b.conv(joined, 3))
    [found] = find_skip_connections(captured.graph.graph)
    assert found.deep is deep


def test_a_negative_channel_axis_is_the_channel_axis() -> None:
    b = Builder()
    skip = b.conv(b.input(1, 3, 4, 4), 4)
    captured = b.captured(b.conv(b.cat(b.conv(skip, 5), skip, axis=-3), 3))
    assert len(find_skip_connections(captured.graph.graph)) == 1


def test_a_residual_added_to_the_skip_does_not_hide_it() -> None:
    """ControlNet adds its residuals to the skips: the operand is then no ancestor of the deep feature."""
    b = Builder()
    x, residual = b.input(1, 3, 4, 4), b.input(1, 4, 4, 4)
    skip = b.conv(x, 4)
    deep = b.conv(skip, 5)
    captured = b.captured(b.conv(b.cat(deep, b.op(aten.add.Tensor, skip, residual)), 3))
    [found] = find_skip_connections(captured.graph.graph)
    assert found.deep is deep


@pytest.mark.parametrize(
    "case", ["spatial axis", "three operands", "two-dimensional", "unrelated operands", "same depth"]
)
def test_other_concatenations_are_no_skip_connections(case: str) -> None:
    b = Builder()
    x = b.input(1, 3, 4, 4)
    trunk = b.conv(x, 4)
    if case == "spatial axis":
        joined = b.cat(b.conv(trunk, 4), trunk, axis=2)
    elif case == "three operands":
        joined = b.cat(b.conv(trunk, 4), trunk, trunk)
    elif case == "two-dimensional":
        flat = b.op(aten.view.default, trunk, [4, 16])
        joined = b.cat(b.op(aten.sin.default, flat), flat)
    elif case == "unrelated operands":
        joined = b.cat(b.conv(trunk, 4), b.conv(b.input(1, 3, 4, 4), 4))
    else:
        joined = b.cat(b.op(aten.sin.default, trunk), b.op(aten.cos.default, trunk))
    captured = b.captured(b.conv(joined, 3) if joined.meta["val"].ndim == 4 else joined)
    assert find_skip_connections(captured.graph.graph) == ()
    with pytest.raises(BranchError, match="Model has no skip connection"):
        require_skip_connections(captured.graph.graph, "Model")


def test_the_shallow_variant_has_no_deep_layer_and_both_give_the_whole_output() -> None:
    _, captured = two_level_unet()
    x = torch.randn(1, 3, 4, 4)
    expected = captured.graph(x)[0]
    for index, convolutions in ((0, 2), (1, 4)):
        variants = split(captured, find_skip_connections(captured.graph.graph)[index])
        output, cached = variants.full.step(x)
        assert torch.equal(output, expected)
        assert torch.equal(variants.cuts[0].shallow.step(x, cached)[0], expected)
        assert not torch.equal(variants.cuts[0].shallow.step(x, torch.zeros_like(cached))[0], expected)
        assert sum(is_op(n, aten.conv2d.default) for n in variants.cuts[0].shallow.step.graph.nodes) == convolutions
        assert variants.cuts[0].cost.cache_bytes == cached.numel() * 4
        assert variants.cuts[0].shallow.macs.total < variants.full.macs.total


def test_several_outputs_are_kept_in_order() -> None:
    b = Builder()
    skip = b.conv(b.input(1, 3, 4, 4), 4)
    deep = b.conv(skip, 5)
    top = b.conv(b.cat(deep, skip), 3)
    captured = b.captured(top, deep)
    variants = split(captured, find_skip_connections(captured.graph.graph)[0])
    x = torch.randn(1, 3, 4, 4)
    _, second, cached = variants.full.step(x)
    assert torch.equal(second, cached)
    other = torch.randn_like(cached)
    assert torch.equal(variants.cuts[0].shallow.step(x, other)[1], other)


def test_an_output_that_is_the_cached_feature_may_be_written_into() -> None:
    b = Builder()
    skip = b.conv(b.input(1, 3, 4, 4), 4)
    deep = b.conv(skip, 5)
    captured = b.captured(b.conv(b.cat(deep, skip), 3), deep)
    variants = split(captured, find_skip_connections(captured.graph.graph)[0])
    x = torch.randn(1, 3, 4, 4)
    _, given, cached = variants.full.step(x)
    expected = cached.clone()
    given.zero_()
    assert torch.equal(cached, expected)
    variants.cuts[0].shallow.step(x, cached)[1].zero_()
    assert torch.equal(cached, expected)


def test_out_of_range_branches_name_the_range() -> None:
    _, captured = two_level_unet()
    found = find_skip_connections(captured.graph.graph)
    with pytest.raises(BranchError, match=r"branch 2 is out of range: Net has skip connections 0 \(shallowest\) to 1"):
        pick_branch(found, 2, "Net")
    with pytest.raises(BranchError, match=r"\(0, 5\).*block 0: layers 0-1"):
        pick_branch(found, (0, 5), "Net")
    assert pick_branch(found, (0, 1), "Net").index == 1


@thorough
def test_blocks_of_a_diffusers_unet_are_its_up_blocks() -> None:
    unet = models.sd_unet()
    reader = CallReader(type(unet).forward)
    call = reader.read(unet, (torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, models.TEXT)), {})
    captured = capture(unet, call, reader)
    found = find_skip_connections(captured.graph.graph)
    assert [(b.block, b.layer) for b in found] == [(i // 3, i % 3) for i in range(9)]
    variants = split(captured, found[0])
    own = {id(p) for p in unet.parameters()}
    for variant in (variants.full.step, variants.cuts[0].shallow.step):
        parameters = list(variant.parameters())
        assert parameters
        assert all(id(p) in own for p in parameters)
    assert len(list(variants.cuts[0].shallow.step.parameters())) < len(own) / 3


# By rates.


def test_what_depends_on_the_cached_feature_alone_moves_into_the_full_variant() -> None:
    _, captured = two_level_unet()
    x = torch.randn(1, 3, 4, 4)
    expected = captured.graph(x)[0]
    before = [(node.name, node.target) for node in captured.graph.graph.nodes]
    branch = find_skip_connections(captured.graph.graph)[0]
    variants = split(captured, branch, rates=RATES)
    [plain], [hoisted] = split(captured, branch).cuts, variants.cuts
    output, cached = variants.full.step(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(hoisted.shallow.step(x, cached)[0], expected)
    assert cached.shape == (1, 3, 4, 4)  # half of the last convolution's output, not the deep feature's 6 channels
    assert hoisted.plain == plain.cost == plain.plain
    assert hoisted.shallow.macs.total == plain.shallow.macs.total - 6 * 3 * 16
    assert variants.full.macs.total == split(captured, branch).full.macs.total
    assert hoisted.cost.cache_bytes == 3 * 16 * 4 < plain.cost.cache_bytes
    assert [(node.name, node.target) for node in captured.graph.graph.nodes] == before


def test_costs_by_rate_are_known_without_splitting() -> None:
    _, captured = two_level_unet()
    found = find_skip_connections(captured.graph.graph)
    costs = refresh_costs(captured, found)
    assert costs == [split(captured, branch, rates=["refresh_rate"]).cuts[0].cost for branch in found]
    plain = [plain_cost(captured.graph.graph, branch.deep) for branch in found]
    assert all(cost.macs.total < whole.macs.total for cost, whole in zip(costs, plain, strict=True))


@pytest.mark.parametrize("forecast", [0, 1])
@pytest.mark.parametrize("rates", [(), RATES])
def test_cut_at_several_skip_connections(rates: tuple[str, ...], forecast: int) -> None:
    """Each has a cache and a variant; with a forecast a deeper step returns the caches of those above it, too."""
    _, captured = two_level_unet()
    x = torch.randn(1, 3, 4, 4)
    expected = captured.graph(x)[0]
    found = find_skip_connections(captured.graph.graph)
    variants = split(captured, found, rates=rates, forecast=forecast)
    shallowest, deepest = variants.cuts
    assert list(variants.named()) == ["full", "shallow", "shallow_1"]
    assert shallowest.shallow.macs.total < deepest.shallow.macs.total < variants.full.macs.total
    assert (shallowest.refreshed, deepest.refreshed) == (0, forecast)
    output, upper, lower = variants.full.step(x)
    weights = [torch.tensor([1.5, -0.5])] if forecast else []
    torch.testing.assert_close(output, expected, **ROUNDING)
    for cut, cached in ((shallowest, upper), (deepest, lower)):
        assert cut.cache[0].shape == cached.shape
        steps = [cached] * (forecast + 1)
        result, *refreshed = cut.shallow.step(x, *steps, *weights)
        torch.testing.assert_close(result, expected, **ROUNDING)
        for value in refreshed:
            torch.testing.assert_close(value, upper, **ROUNDING)
        assert len(refreshed) == cut.refreshed
    # The one cut is as it is alone.
    alone = split(captured, found[1], rates=rates, forecast=forecast).cuts[0]
    assert alone.shallow.macs == deepest.shallow.macs
    assert alone.cost == deepest.cost


def unet_with_a_prompt() -> tuple[Captured, torch.Tensor, torch.Tensor]:
    """Each level adds a projection of the text to what it computes."""
    b = Builder()
    x, text = b.input(1, 3, 4, 4), b.input(1, 7, 1, 1)
    skip = b.op(aten.add.Tensor, b.conv(x, 4), b.conv(text, 4))
    deep = b.op(aten.add.Tensor, b.conv(skip, 5), b.conv(b.conv(text, 9), 5))
    return b.captured(b.conv(b.cat(deep, skip), 3)), torch.randn(1, 3, 4, 4), torch.randn(1, 7, 1, 1)


def test_what_depends_on_the_prompt_alone_is_computed_once_and_only_where_it_is_needed() -> None:
    captured, x, text = unet_with_a_prompt()
    expected = captured.graph(x, text)[0]
    branch = find_skip_connections(captured.graph.graph)[0]
    variants = split(captured, branch, rates=RATES, prompt_inputs=[1])
    full, shallow = variants.full, variants.cuts[0].shallow
    assert full.prompt is not None
    assert shallow.prompt is not None
    assert full.prompt_inputs == shallow.prompt_inputs == (1,)
    assert (full.prompt_macs.total, shallow.prompt_macs.total) == (7 * 4 + 7 * 9 + 9 * 5, 7 * 4)
    other = torch.zeros_like(text)  # the steps themselves read no text any more
    output, *cache = full.step(x, other, *full.prompt(text))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(shallow.step(x, other, *cache, *shallow.prompt(text))[0], expected)


def test_an_input_that_changes_with_every_step_keeps_its_work_in_the_step() -> None:
    captured, x, text = unet_with_a_prompt()
    branch = find_skip_connections(captured.graph.graph)[0]
    variants = split(captured, branch, rates=RATES, prompt_inputs=[])
    assert variants.full.prompt is variants.cuts[0].shallow.prompt is None
    output, *cache = variants.full.step(x, text)
    torch.testing.assert_close(output, captured.graph(x, text)[0])
    torch.testing.assert_close(variants.cuts[0].shallow.step(x, text, *cache)[0], output)


def test_outputs_that_are_not_kept_are_not_computed() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    outputs = tuple(graph.call_function(op, (value,)) for op in (torch.sin, torch.cos) for value in (x, y))
    graph.output(outputs)
    whole = fx.GraphModule({}, graph)
    part = keep_outputs(whole, {3, 0})
    a, b = torch.randn(2), torch.randn(2)
    assert [node.target for node in part.graph.find_nodes(op="placeholder")] == ["x", "y"]
    assert len(part.graph.find_nodes(op="call_function", target=torch.sin)) == 1
    assert all(map(torch.equal, part(a, b), (a.sin(), b.cos())))
    assert len(whole(a, b)) == 4


def laid_out_conv(b: Builder, x: fx.Node) -> fx.Node:
    """A convolution with a channels-last weight."""
    weight = torch.randn(3, x.meta["val"].shape[1], 3, 3).contiguous(memory_format=torch.channels_last)
    b.root.register_parameter("laid_out", torch.nn.Parameter(weight))
    node = b.graph.get_attr("laid_out")
    node.meta["val"] = weight
    return b.op(aten.conv2d.default, x, node)


def test_on_a_gpu_contiguous_cached_maps_take_the_layout_of_channels_last_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = Builder()
    x = b.input(1, 3, 4, 4)
    skip = b.conv(x, 4)
    deep = b.op(aten.relu.default, b.conv(skip, 5))
    captured = b.captured(b.op(aten.contiguous.default, laid_out_conv(b, b.cat(deep, skip))))
    [branch] = find_skip_connections(captured.graph.graph)
    plain = split(captured, branch)
    [kept] = plain.cuts[0].cache
    assert kept.is_contiguous(), "channels-last weights on a CPU change nothing"

    monkeypatch.setattr("deepcache_fx.graph.split.CHANNELS_LAST", ("cpu",))
    laid = split(captured, branch)
    [kept] = laid.cuts[0].cache
    assert kept.is_contiguous(memory_format=torch.channels_last)
    inputs = torch.randn(1, 3, 4, 4)
    output, cache = laid.full.step(inputs)
    torch.testing.assert_close(output, plain.full.step(inputs)[0])
    assert cache.stride() == kept.stride()
    torch.testing.assert_close(laid.cuts[0].shallow.step(inputs, cache)[0], output)


def test_a_cached_map_that_a_view_reads_stays_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepcache_fx.graph.split.CHANNELS_LAST", ("cpu",))
    b = Builder()
    x = b.input(1, 3, 4, 4)
    skip = b.conv(x, 4)
    deep = b.op(aten.clone.default, b.conv(skip, 5))
    flat = b.op(aten.view.default, deep, [1, 80])
    captured = b.captured(laid_out_conv(b, b.cat(deep, skip)), b.op(aten.relu.default, flat))
    [branch] = find_skip_connections(captured.graph.graph)
    [kept] = split(captured, branch).cuts[0].cache
    assert kept.is_contiguous()
