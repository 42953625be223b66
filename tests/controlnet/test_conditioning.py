"""Calls of a ControlNet in canonical form: strengths are tensors, pictures stay, numbers multiply as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from deepcache_fx.controlnet.conditioning import ConditioningReader, multiply_in_float32
from tests.compvis import CompVisUNet

X, T, TEXT, PICTURE = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 6), torch.randn(2, 3, 64, 64)


class Network(torch.nn.Module):
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: Any,
        conditioning_scale: Any = 1.0,
        guess_mode: bool = False,
    ) -> Any:
        raise NotImplementedError


READER = ConditioningReader(Network.forward)


def read(*args: Any, **kwargs: Any) -> Any:
    return READER.read(Network(), (X, T, TEXT, *args), kwargs)


def test_another_strength_is_no_other_key() -> None:
    calls = [read(PICTURE), read(PICTURE, 0.5), read(PICTURE, conditioning_scale=0.0), read(PICTURE, 1)]
    assert len({call.key for call in calls}) == 1
    assert [float(call.tensors[4]) for call in calls] == [1.0, 0.5, 0.0, 1.0]
    assert all(call.tensors[4].dtype == torch.float32 and call.tensors[4].ndim == 0 for call in calls)
    assert all(call.numbers == (4,) for call in calls)


def test_several_strengths_are_several_tensors() -> None:
    call, other = read([PICTURE, PICTURE + 1], [0.25, 0.75]), read([PICTURE, PICTURE + 1], [1.0, 0.0])
    assert call.key == other.key
    assert [float(t) for t in call.tensors[5:]] == [0.25, 0.75]
    assert call.numbers == (5, 6)


def test_guess_mode_is_a_value() -> None:
    assert read(PICTURE).key != read(PICTURE, guess_mode=True).key


def test_the_text_and_the_picture_stay_and_the_strength_does_not() -> None:
    assert read(PICTURE, 0.5).prompt_inputs == (2, 3)
    assert read([PICTURE, PICTURE + 1], [0.5, 1.0]).prompt_inputs == (2, 3, 4)


def test_a_strength_that_is_a_tensor_is_left_as_it_is() -> None:
    strength = torch.tensor(0.5, dtype=torch.float64)
    call = read(PICTURE, strength)
    assert call.tensors[4] is strength
    assert call.numbers == ()


def test_in_double_precision_the_strength_is_a_double() -> None:
    call = READER.read(Network(), (X.double(), T, TEXT, PICTURE, 0.1), {})
    assert call.tensors[4].dtype == torch.float64


def test_a_network_without_a_picture_is_told_apart() -> None:
    assert READER.takes_condition
    assert not ConditioningReader(CompVisUNet.forward).takes_condition


def product(dtype: torch.dtype) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    x.meta["val"], scale.meta["val"] = torch.empty(4096, dtype=dtype), torch.empty(())
    result = graph.call_function(torch.ops.aten.mul.Tensor, (x, scale))
    result.meta["val"] = x.meta["val"]
    graph.output((result,))
    return graph, scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_times_a_tensor_is_what_it_is_times_the_number(dtype: torch.dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    graph, scale = product(dtype)
    multiply_in_float32(graph, [scale])
    after = fx.GraphModule({}, graph)(x, torch.tensor(0.3))[0]
    assert after.dtype == dtype
    assert torch.equal(after, x * 0.3)
    [node] = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert node.meta["val"].dtype == torch.float32  # a device rounds a 0-d tensor to the other factor's type first
    assert all("val" in node.meta for node in graph.nodes if node.op == "call_function")


def test_single_precision_is_left_alone() -> None:
    graph, scale = product(torch.float32)
    multiply_in_float32(graph, [scale])
    assert [node.target for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)]
    assert len(graph.nodes) == 4
