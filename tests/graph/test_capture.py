"""Capturing: functional graphs over the model's own parameters, outputs in the model's own form, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcache_fx.errors import CaptureError
from deepcache_fx.graph.capture import Captured, capture
from deepcache_fx.graph.signature import CallReader
from tests import models
from tests.compvis import CompVisUNet


def captured(model: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Captured, tuple[torch.Tensor, ...]]:
    reader = CallReader(type(model).forward)
    call = reader.read(model, args, kwargs)
    return capture(model, call, reader), call.tensors


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))


def test_a_graph_computes_the_model_to_the_bit_with_its_own_parameters() -> None:
    unet = CompVisUNet()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.randn(2, 3, 6))
    result, tensors = captured(unet, *inputs)
    with torch.no_grad():
        assert torch.equal(result.outputs(result.graph(*tensors)), unet(*inputs))
    own = {id(p) for p in unet.parameters()}
    assert {id(p) for p in result.graph.parameters()} == own


@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_have_the_form_the_model_gives_them(return_dict: bool) -> None:
    unet = models.sd_unet(layers_per_block=1, block_out_channels=(16, 16, 16))
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 2, models.TEXT))
    result, tensors = captured(unet, *inputs, return_dict=return_dict)
    with torch.no_grad():
        expected = unet(*inputs, return_dict=return_dict)
        actual = result.outputs(result.graph(*tensors))
    assert type(actual) is type(expected)
    assert torch.equal(actual[0], expected[0])


def test_writes_in_place_become_functional() -> None:
    class Writes(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            y = x * self.scale
            y[:, :1] *= t
            return y

    model, x, t = Writes(), torch.ones(1, 2), torch.tensor(3.0)
    result, tensors = captured(model, x, t)
    with torch.no_grad():
        assert torch.equal(result.graph(*tensors)[0], torch.tensor([[6.0, 2.0]]))
    assert torch.equal(x, torch.ones(1, 2))
    schemas = [n.target._schema for n in result.graph.graph.nodes if hasattr(n.target, "_schema")]
    assert schemas
    assert not any(schema.is_mutable for schema in schemas)


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    class Adds(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + self.scale * t

    model, x = Adds(), torch.ones(2)
    result, _ = captured(model, x, x)
    with torch.no_grad():
        assert torch.equal(result.graph(x, 3 * x)[0], torch.full((2,), 7.0))


def test_a_model_that_changes_its_buffers_is_refused() -> None:
    model = torch.nn.BatchNorm2d(2)
    model.train()
    with pytest.raises(CaptureError, match=r"BatchNorm2d changes its own state in forward .*eval mode"):
        captured(model, torch.randn(2, 2, 4, 4))


def test_control_flow_on_values_is_refused_with_class_and_shapes() -> None:
    class Branches(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * self.scale if t.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"Branches could not be captured for inputs \(2, 3\) float32 on cpu"):
        captured(Branches(), torch.randn(2, 3), torch.tensor(1.0))
