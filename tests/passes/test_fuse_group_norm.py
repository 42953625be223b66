"""Fusing GroupNorm with what stands around it: on graphs built by hand, exported modules and a real UNet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

from passes import run_passes
from passes.fuse_group_norm import FuseGroupNorm
from tests import models

aten = torch.ops.aten
ours = torch.ops.deepcache_fx
C = 12
X, Y = torch.randn(2, C, 3, 4) + 3, torch.randn(2, 8, 3, 4)
T = torch.randn(2, C, 1, 1)
WEIGHT, BIAS = torch.randn(C), torch.randn(C)
CAT_WEIGHT = torch.randn(C + 8)

Build = Callable[..., fx.Node | tuple[fx.Node, ...]]


def graph_of(build: Build, *inputs: torch.Tensor, device: str | None = None) -> fx.GraphModule:
    """A graph made by hand, with fake values as metadata, of tensors on `device`."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    result = build(graph, *nodes)
    graph.output(result if isinstance(result, tuple) else (result,))
    module = fx.GraphModule(nn.Module(), graph)
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device) for x in inputs]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    return module


def call(graph: fx.Graph, target: Callable[..., object], *args: object) -> fx.Node:
    return graph.call_function(target, args)  # type: ignore[arg-type]


def norm(graph: fx.Graph, x: fx.Node, *rest: object, groups: int = 4) -> fx.Node:
    return call(graph, aten.group_norm.default, x, groups, *rest)


def silu(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return call(graph, aten.silu.default, x)


def count(module: fx.GraphModule, target: Callable[..., object]) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def check(item: FuseGroupNorm, module: fx.GraphModule, delta: int, *inputs: torch.Tensor) -> fx.GraphModule:
    """Node delta, a truthful flag, fresh metadata, a second run that changes nothing, close values, equal strides."""
    expected = module(*inputs)
    before = len(module.graph.nodes)
    norms = count(module, aten.group_norm.default)
    result, [record] = run_passes(module, [item])
    assert len(result.graph.nodes) - before == delta
    assert record.modified == (count(result, aten.group_norm.default) < norms)
    assert all("val" in node.meta for node in result.graph.nodes if node.op != "output")
    again = item(result)
    assert not again.modified
    assert again.graph_module is result
    for got, want in zip(result(*inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.stride() == want.stride()
    return result


def test_fuses_a_norm_with_its_silu() -> None:
    gm = graph_of(lambda g, x, w, b: silu(g, norm(g, x, w, b, 1e-3)), X, WEIGHT, BIAS)
    result = check(FuseGroupNorm(), gm, -1, X, WEIGHT, BIAS)
    [node] = result.graph.find_nodes(op="call_function", target=ours.group_norm.default)
    assert node.args[3:] == (4, 1e-3, True, None)


def test_fuses_a_norm_alone() -> None:
    result = check(FuseGroupNorm(), graph_of(norm, X), 0, X)
    assert count(result, ours.group_norm.default) == 1


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_fuses_the_addition_of_a_time_embedding_on_either_side(swapped: bool, rows: int) -> None:
    def build(g: fx.Graph, x: fx.Node, t: fx.Node) -> fx.Node:
        return silu(g, norm(g, call(g, aten.add.Tensor, *((t, x) if swapped else (x, t)))))

    check(FuseGroupNorm(), graph_of(build, X, T[:rows]), -2, X, T[:rows])


def test_fuses_a_time_embedding_of_one_number_per_sample_and_channel_only() -> None:
    for other in (torch.randn_like(X), torch.randn(2, 1, 1, 1), torch.randn(C, 1, 1), torch.randn(2, C, 3, 1)):
        gm = graph_of(lambda g, x, t: norm(g, call(g, aten.add.Tensor, x, t)), X, other)
        result = check(FuseGroupNorm(), gm, 0, X, other)
        assert count(result, aten.add.Tensor) == 1


def test_keeps_an_addition_that_scales_or_changes_the_type() -> None:
    def scaled(g: fx.Graph, x: fx.Node, t: fx.Node) -> fx.Node:
        return norm(g, g.call_function(aten.add.Tensor, (x, t), {"alpha": 2}))

    check(FuseGroupNorm(), graph_of(scaled, X, T), 0, X, T)
    half = X.bfloat16()
    gm = graph_of(lambda g, x, t: norm(g, call(g, aten.add.Tensor, x, t)), half, T)
    check(FuseGroupNorm(), gm, 0, half, T)


def test_keeps_an_addition_that_others_read() -> None:
    def build(g: fx.Graph, x: fx.Node, t: fx.Node) -> tuple[fx.Node, ...]:
        total = call(g, aten.add.Tensor, x, t)
        return silu(g, norm(g, total)), call(g, aten.cos.default, total)

    result = check(FuseGroupNorm(), graph_of(build, X, T), -1, X, T)
    assert count(result, aten.add.Tensor) == 1


def test_keeps_a_silu_next_to_other_readers_of_the_norm() -> None:
    def build(g: fx.Graph, x: fx.Node) -> tuple[fx.Node, ...]:
        n = norm(g, x)
        return silu(g, n), call(g, aten.cos.default, n)

    result = check(FuseGroupNorm(), graph_of(build, X), 0, X)
    assert count(result, aten.silu.default) == 1


def test_keeps_a_silu_whose_norm_is_an_output() -> None:
    def build(g: fx.Graph, x: fx.Node) -> tuple[fx.Node, ...]:
        n = norm(g, x)
        return n, silu(g, n)

    check(FuseGroupNorm(), graph_of(build, X), 0, X)


@pytest.mark.parametrize("dim", [1, -3])
def test_reads_the_operands_of_a_cat_whose_group_straddles_the_boundary(dim: int) -> None:
    def build(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> fx.Node:
        return silu(g, norm(g, call(g, aten.cat.default, [x, y], dim), w, groups=2))

    result = check(FuseGroupNorm(), graph_of(build, X, Y, CAT_WEIGHT), -2, X, Y, CAT_WEIGHT)
    assert count(result, ours.cat_group_norm.default) == 1


def test_keeps_a_cat_if_told_to() -> None:
    gm = graph_of(lambda g, x, y: norm(g, call(g, aten.cat.default, [x, y], 1)), X, Y)
    result = check(FuseGroupNorm(cat=False), gm, 0, X, Y)
    assert count(result, aten.cat.default) == 1


@pytest.mark.parametrize(
    ("operands", "dim"), [((0, 0, 0), 1), ((0,), 1), ((0, 0), 0), ((0, 0), 2)], ids=["three", "one", "batch", "height"]
)
def test_keeps_a_cat_that_does_not_join_two_tensors_on_the_channel_axis(operands: tuple[int, ...], dim: int) -> None:
    gm = graph_of(lambda g, x: norm(g, call(g, aten.cat.default, [x] * len(operands), dim)), X)
    result = check(FuseGroupNorm(), gm, 0, X)
    assert count(result, aten.cat.default) == 1


def test_keeps_a_cat_that_converts_an_operand() -> None:
    half = Y.bfloat16()
    gm = graph_of(lambda g, x, y: norm(g, call(g, aten.cat.default, [x, y], 1)), X, half)
    result = check(FuseGroupNorm(), gm, 0, X, half)
    assert count(result, aten.cat.default) == 1


def shortcut(g: fx.Graph, x: fx.Node, y: fx.Node) -> tuple[fx.Node, ...]:
    """A `cat` that a norm and a shortcut read."""
    joined = call(g, aten.cat.default, [x, y], 1)
    return silu(g, norm(g, joined)), call(g, aten.cos.default, joined)


def test_keeps_a_cat_that_others_read() -> None:
    result = check(FuseGroupNorm(), graph_of(shortcut, X, Y), -1, X, Y)
    assert count(result, ours.group_norm.default) == 1


def test_fuses_a_chain_of_norms() -> None:
    def build(g: fx.Graph, x: fx.Node, t: fx.Node) -> fx.Node:
        for _ in range(3):
            x = silu(g, norm(g, call(g, aten.add.Tensor, x, t)))
        return x

    result = check(FuseGroupNorm(), graph_of(build, X, T), -6, X, T)
    assert count(result, ours.group_norm.default) == 3


def test_leaves_a_graph_without_group_norm_alone() -> None:
    gm = graph_of(lambda g, x, y: silu(g, call(g, aten.cat.default, [x, y], 1)), X, Y)
    check(FuseGroupNorm(), gm, 0, X, Y)
    result = FuseGroupNorm()(gm)
    assert not result.modified
    assert result.graph_module is gm


@pytest.mark.parametrize(("x", "reason"), [(X.double(), "float64"), (X[..., 0, 0].contiguous(), "2 axes")])
def test_declines_what_the_kernels_do_not_take_and_says_why(x: torch.Tensor, reason: str) -> None:
    item = FuseGroupNorm()
    check(item, graph_of(norm, x), 0, x)
    [declined] = item.declined
    assert reason in declined.reason


CHANNELS_LAST = X.contiguous(memory_format=torch.channels_last)


def test_makes_channels_last_output_on_cuda_where_what_follows_takes_either_layout() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = call(g, aten.neg.default, silu(g, norm(g, x)))
        return g.call_function(aten.clone.default, (y,), {"memory_format": torch.contiguous_format})

    gm = graph_of(build, CHANNELS_LAST, device="cuda")
    [negated] = gm.graph.find_nodes(op="call_function", target=aten.neg.default)
    assert negated.meta["val"].is_contiguous()  # PyTorch's norm changes the layout
    result, [record] = run_passes(gm, [FuseGroupNorm()])
    assert record.modified
    assert negated.meta["val"].stride() == CHANNELS_LAST.stride()
    [output] = result.graph.output_node().args[0]  # type: ignore[misc]
    assert output.meta["val"].is_contiguous()  # type: ignore[union-attr]


@pytest.mark.parametrize("reader", ["output", "view"])
def test_declines_on_cuda_where_the_layout_of_the_output_matters(reader: str) -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = call(g, aten.neg.default, norm(g, x))
        return y if reader == "output" else call(g, aten.sum.default, call(g, aten.view.default, y, [2, -1]))

    gm = graph_of(build, CHANNELS_LAST, device="cuda")
    nodes = list(gm.graph.nodes)
    item = FuseGroupNorm()
    assert not item(gm).modified
    assert list(gm.graph.nodes) == nodes
    [declined] = item.declined
    assert "channels-last" in declined.reason


class Block(nn.Module):
    """A residual block with a time embedding, after a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(4, C + 8), nn.GroupNorm(4, C)
        self.conv_in, self.conv_out = nn.Conv2d(C + 8, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.time = nn.Linear(5, C)

    def forward(self, x: torch.Tensor, skip: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(F.silu(self.norm_in(torch.cat([x, skip], dim=1))))
        h = h + self.time(t)[:, :, None, None]
        return x + self.conv_out(F.silu(self.norm_out(h)))


def exported(module: nn.Module, inputs: tuple[torch.Tensor, ...], decomposed: bool) -> fx.GraphModule:
    program = torch.export.export(module, inputs, strict=False)
    if decomposed:
        program = program.run_decompositions({})
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    mode = detect_fake_mode([node.meta.get("val") for node in graph_module.graph.nodes])
    assert mode is not None
    for node in graph_module.graph.find_nodes(op="get_attr"):
        node.meta["val"] = mode.from_tensor(program.state_dict[str(node.target)])
    return graph_module


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_fuses_an_exported_block_whole(decomposed: bool, memory_format: torch.memory_format) -> None:
    block = Block().eval().to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = (X.contiguous(memory_format=memory_format), Y.contiguous(memory_format=memory_format), torch.randn(2, 5))
    module, _ = run_passes(exported(block, inputs, decomposed), [FuseGroupNorm()])
    fused = [count(module, op.default) for op in (ours.cat_group_norm, ours.group_norm)]
    assert fused == [1, 1]
    assert not any(count(module, op) for op in (aten.group_norm.default, aten.silu.default, aten.cat.default))
    torch.testing.assert_close(module(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fuses_every_norm_of_a_unet_and_keeps_the_concatenations_that_shortcuts_read() -> None:
    unet = models.sd_unet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, models.TEXT))
    module = exported(unet, inputs, decomposed=True)
    cats = count(module, aten.cat.default)
    module, _ = run_passes(module, [FuseGroupNorm()])
    assert not count(module, aten.group_norm.default)
    assert count(module, aten.cat.default) == cats > 0
    torch.testing.assert_close(module(*inputs).sample, unet(*inputs).sample, rtol=1e-5, atol=1e-5)
