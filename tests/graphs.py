"""Graphs built by hand or captured from a model, and what every pass must keep, for the tests of passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase

from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.signature import CallReader
from passes import Canonicalize, run_passes
from tests import models


class GraphBuilder:
    """Adds nodes one by one; `build` gives them fake values. Random numbers are the same every time."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.dtype = dtype
        self.inputs: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def input(self, *shape: int) -> fx.Node:
        """Goes behind the inputs there are, before everything else."""
        self.inputs.append(self._random(*shape))
        others = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(others[-1] if others else None):
            return self.graph.placeholder(f"x{len(self.inputs)}")

    def parameter(self, *shape: int) -> fx.Node:
        name = f"p{len(list(self.root.parameters()))}"
        self.root.register_parameter(name, torch.nn.Parameter(self._random(*shape), requires_grad=False))
        return self.graph.get_attr(name)

    def op(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def build(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        module = fx.GraphModule(self.root, self.graph)
        FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*self.inputs)
        return module


def targets(gm: fx.GraphModule) -> list[Any]:
    """What the graph calls, in order."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def error(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest difference over the largest value, of the worst output; infinite where shapes or types differ."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def check(
    item: PassBase, gm: fx.GraphModule, inputs: list[torch.Tensor], delta: int, *, tolerance: float = 0.0
) -> None:
    """A pass changes the number of nodes by `delta`, says whether it did, finds nothing more, and keeps all values.

    The module is changed in place, as passes do; every node has a fake value of the right shape and strides after it.
    """
    expected = gm(*inputs)
    before = len(gm.graph.nodes)
    result, [record] = run_passes(gm, [item])
    assert result is gm
    assert len(gm.graph.nodes) - before == delta
    assert record.modified == (delta != 0)
    again = item(gm)
    assert not again.modified
    assert again.graph_module is gm
    assert error(gm(*inputs), expected) <= tolerance
    check_metadata(gm, inputs)


def check_metadata(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
    """Fail where a node's fake value is not what the node computes."""

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and n.op != "output":
                fake = n.meta["val"]
                assert (fake.shape, fake.dtype, fake.device) == (result.shape, result.dtype, result.device), n.name
                assert n.op == "get_attr" or fake.stride() == result.stride(), n.name
            return result

    with torch.no_grad():
        Compare(gm).run(*inputs)


def unet_of_two_levels(**changes: object) -> UNet2DConditionModel:
    """Groups of 4 and 6 channels over skips of 8 and 16: some straddle."""
    return models.sd_unet(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def unet_call(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Arguments of a call: sample, timestep, text."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    return sample, 3, torch.randn(2, 5, models.TEXT, generator=generator).to(dtype)


@cache
def _captured_unet() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    return captured(unet_of_two_levels(), *unet_call())


def captured_unet() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph of a small UNet and its inputs: a graph of the caller's own, over the same weights every time."""
    gm, inputs = _captured_unet()
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph), inputs


def captured(model: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The canonical graph of a call, and the call's tensors."""
    reader = CallReader(type(model).forward)
    call = reader.read(model, args, kwargs)
    gm, _ = run_passes(capture(model, call, reader).graph, [Canonicalize()])
    return gm, list(call.tensors)
