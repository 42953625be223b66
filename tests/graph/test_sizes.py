"""One capture for many sizes: which it serves, and that it gives there what the model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcache_fx.graph.capture import Captured, capture
from deepcache_fx.graph.signature import Call, CallReader
from deepcache_fx.graph.sizes import at, family, fixed, free_axes
from passes.shared.sizes import is_size
from tests.compvis import CompVisUNet
from tests.families import thorough

MODEL = CompVisUNet()
READER = CallReader(CompVisUNet.forward)


def inputs(batch: int = 2, height: int = 8, width: int = 8, tokens: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, 4, height, width, generator=generator),
        "timesteps": torch.full((batch,), 7),
        "context": torch.randn(batch, tokens, 6, generator=generator),
    }


def call(**sizes: int) -> Call:
    return READER.read(MODEL, (), inputs(**sizes))


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(MODEL, call(), READER, dynamic=True)


@thorough
@pytest.mark.parametrize("sizes", [(2, 8, 12), (3, 6, 14), (5, 16, 4)])
@torch.no_grad()
def test_the_graph_gives_what_the_model_gives_to_the_bit(captured: Captured, sizes: tuple[int, int, int]) -> None:
    assert captured.sizes is not None
    batch, height, width = sizes
    given = call(batch=batch, height=height, width=width)
    values = captured.sizes.values(given.tensors)
    assert values is not None
    expected = MODEL(*given.tensors)
    assert torch.equal(captured.graph(*given.tensors)[0], expected)
    with_numbers = fixed(captured.graph, at(values))
    assert not any(map(is_size, with_numbers.graph.nodes))
    assert with_numbers.graph.output_node().args[0][0].meta["val"].shape == expected.shape  # type: ignore[index,union-attr]
    assert torch.equal(with_numbers(*given.tensors)[0], expected)


def test_other_sizes_are_not_served(captured: Captured) -> None:
    assert captured.sizes is not None
    for other in (
        dict(batch=1),
        dict(height=9),
        dict(height=7, width=8),
        dict(tokens=4),
        dict(width=2),
        dict(height=1),
    ):
        assert captured.sizes.values(call(**other).tensors) is None, other


def test_other_strides_types_and_relations_are_not_served(captured: Captured) -> None:
    assert captured.sizes is not None
    x, timesteps, context = call(height=12).tensors
    assert captured.sizes.values((x, timesteps, context)) is not None
    for others in (
        (x.contiguous(memory_format=torch.channels_last), timesteps, context),
        (x.double(), timesteps, context),
        (x, timesteps, context[:1]),
        (x, timesteps[:1], context),
        (x, timesteps.expand(1, 2), context),
        (x[:, :3].contiguous(), timesteps, context),
    ):
        assert captured.sizes.values(others) is None


@thorough
def test_a_reader_is_told_the_inputs(captured: Captured) -> None:
    assert captured.sizes is not None
    assert captured.sizes.describe() == "batchx4xheightxwidth, batch, batchx3x6"


def test_a_family_differs_in_free_sizes_alone() -> None:
    assert family(call()) == family(call(batch=3, height=9))
    assert family(call()) != family(call(batch=1))
    assert family(call()) != family(call(tokens=4))
    assert free_axes(torch.empty(2, 4, 1, 8)) == (0, 3)
    assert free_axes(torch.empty(())) == ()
