"""Capturing: functional graphs over the model's own parameters, outputs in the model's own form, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcache_fx.errors import CaptureError, DeepCacheError, Uncapturable
from deepcache_fx.graph.capture import Captured, capture, refuse_layerwise_offload
from deepcache_fx.graph.signature import CallReader, UnsupportedInput
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


class Applies(Small):
    """Takes what ComfyUI hands to its own: functions, objects, and what nothing knows how to flatten."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, options: Any = None, **rest: Any) -> Any:
        options["block"] = 1
        for function in options["functions"]:
            x = function(x)
        options.setdefault("seen", []).append(options["block"])
        return x * self.scale + rest.get("bias", 0.0)


def test_sizes_that_depend_on_values_are_refused() -> None:
    class Compact(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            wanted = (x > t).flatten().nonzero().flatten()
            kept = x.flatten().index_select(0, wanted) * self.scale
            return x.flatten().index_copy(0, wanted, kept).view_as(x)

    with pytest.raises(CaptureError, match=r"Compact .* sizes depend on the values of its inputs \(nonzero"):
        captured(Compact(), torch.ones(1, 2, 4, 4), torch.tensor(0.5))


def test_functions_are_bound_and_the_tensors_beside_them_are_inputs() -> None:
    mask = torch.tensor([1.0, 0.0])
    given = {"functions": [lambda x: x * mask, torch.nn.Identity()], "id": object(), "class": Small}
    result, tensors = captured(Applies(), torch.ones(1, 2), torch.tensor(3.0), given, bias=torch.ones(2), other={1})
    assert sorted(given) == ["class", "functions", "id"]
    assert len(tensors) == 3
    names = [str(node.target) for node in result.graph.graph.find_nodes(op="placeholder")]
    assert names == ["x", "t", "rest_bias"]
    with torch.no_grad():
        assert torch.equal(
            result.graph(2 * torch.ones(1, 2), tensors[1], 3 * torch.ones(2))[0], torch.tensor([[7.0, 3]])
        )


def test_a_model_that_leaves_tensors_in_its_arguments_is_refused_once_and_then_known() -> None:
    class Leaves(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor, options: Any) -> torch.Tensor:
            options["inner"]["kept"] = (0, x * 2)
            return x * self.scale

    model, x = Leaves(), torch.ones(1, 2)
    reader = CallReader(Leaves.forward)
    given: dict[str, Any] = {"inner": {}}
    call = reader.read(model, (x, x, given), {})
    with pytest.raises(Uncapturable, match=r"Leaves leaves a tensor in its argument \(options\.inner\.kept\)"):
        capture(model, call, reader)
    assert given == {"inner": {}}
    with pytest.raises(UnsupportedInput, match="leaves a tensor in its argument"):
        reader.read(model, (x, x, {"inner": {}}), {})
    reader.read(model, (x, x, {"inner": {"other": 1}}), {})
    for number in range(3):  # as where forward appends to a list: no call is like the one before
        reader.refuse(reader.read(model, (x, x, {"inner": {"other": number}}), {}), "leaves a tensor, too")
    with pytest.raises(UnsupportedInput, match="leaves a tensor in its argument"):
        reader.read(model, (x, x, {"inner": {"other": 7}}), {})


class Casting(torch.nn.Linear):
    """A layer of ComfyUI's kind: casts its weights to its input's type and device in every call."""

    comfy_cast_weights = True

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.device, x.dtype), self.bias.to(x.device, x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        return torch.nn.functional.linear(x, weight, bias)


class OfForge(torch.nn.Linear):
    parameters_manual_cast = True


def test_weights_that_are_cast_where_they_are_are_captured() -> None:
    layer = Casting().half().requires_grad_(False)
    layer.weight_function.append(lambda weight: 2 * weight)

    class Casts(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            inner = self.get_submodule("layer")
            return self.scale * inner(x)  # type: ignore[no-any-return]

    model, x = Casts(), torch.randn(3, 2)
    model.add_module("layer", layer)
    refuse_layerwise_offload(model, x.device)
    result, tensors = captured(model, x, torch.ones(1))
    with torch.no_grad():
        assert torch.equal(result.graph(*tensors)[0], model(x, torch.ones(1)))


@pytest.mark.parametrize("make", [Casting, lambda: Casting().half(), lambda: OfForge(2, 2)])
def test_weights_that_are_brought_from_elsewhere_within_a_call_are_refused(make: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), make())
    refuse_layerwise_offload(model, torch.device("cpu"))
    message = r"1 of this Sequential has its weights on cpu and its input on cuda:0: the model is loaded in part"
    with pytest.raises(DeepCacheError, match=message):
        refuse_layerwise_offload(model, torch.device("cuda", 0))
    model[1].bias = torch.nn.Parameter(torch.zeros(2, device="meta"))
    with pytest.raises(DeepCacheError, match="weights on meta and its input on cpu"):
        refuse_layerwise_offload(model, torch.device("cpu"))


def test_comfyuis_dynamic_memory_is_refused_with_the_remedy() -> None:
    model = torch.nn.Sequential(Casting())
    model[0]._v = None
    refuse_layerwise_offload(model, torch.device("cpu"))
    model[0]._v = object()
    with pytest.raises(DeepCacheError, match=r"0 of this Sequential .*dynamic VRAM.*clone\(disable_dynamic=True\)"):
        refuse_layerwise_offload(model, torch.device("cpu"))


def test_a_layer_of_another_kind_is_not_taken_for_comfyuis() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"))
    model[0]._v = object()
    refuse_layerwise_offload(model, torch.device("cpu"))
