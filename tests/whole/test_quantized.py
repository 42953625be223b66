"""Weights quantised by torchao: moved, replaced and written into after the first call, as any other weights are."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepcache_fx
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.graph.weights import unwrapped
from tests import models
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.oracles import TO_THE_BIT
from tests.whole.test_stacking import denoise, difference, make_unet, oracle

CONFIGS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig")


@pytest.fixture(params=family(CONFIGS, CONFIGS[0]))
def unet(request: pytest.FixtureRequest) -> Any:
    return quantized(request.param)


def quantized(config: str, **settings: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    unet = make_unet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(unet, getattr(quantization, config)(**settings))
    unet.config_name = config
    return unet


def quantized_weights(unet: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in unet.parameters() if type(p) is not torch.nn.Parameter]


@torch.no_grad()
def write_into(unet: torch.nn.Module) -> None:
    for weight in quantized_weights(unet):
        weight.scale.mul_(1.25)  # type: ignore[attr-defined]


def optimize(unet: Any, **options: Any) -> None:
    deepcache_fx.optimize(unet, interval=3, **{**TO_THE_BIT, **options})


def counts(unet: torch.nn.Module) -> tuple[int, int]:
    report = deepcache_fx.report(unet)
    assert report.original_calls == 0
    return report.captures, report.rebound


@thorough
@pytest.mark.parametrize("recorded", family([False, True], True))
def test_a_quantised_model_is_moved_after_the_first_call(
    unet: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As offloading does it. What is written into it afterwards shows: the graphs read what the model has."""
    if recorded:
        monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    expected = oracle(unet)
    optimize(unet, cuda_graphs=recorded)
    assert torch.equal(denoise(unet), expected)
    for _ in range(2):
        unet.to("cpu")
        assert torch.equal(denoise(unet), expected)
        unet.to("cpu")
        write_into(unet)
        last, expected = expected, oracle(unet)
        assert difference(expected, last) > 1e-3
        assert torch.equal(denoise(unet), expected)
    assert deepcache_fx.report(unet).captures == 1


@thorough
def test_nothing_refers_to_a_quantised_weight_weakly_once_it_is_captured(unet: Any) -> None:
    import weakref

    optimize(unet, disable=(), passes=[lambda graph: graph])  # such a pass has the metadata made anew
    denoise(unet)
    assert not any(weakref.getweakrefs(weight) for weight in quantized_weights(unet))


@thorough
def test_every_signature_of_a_quantised_model_is_captured_once(unet: Any) -> None:
    optimize(unet)
    inputs = {size: (torch.randn(2, 4, size, size), 1, torch.randn(2, 5, models.TEXT)) for size in (8, 12)}
    with torch.no_grad():
        for size in (8, 12, 8, 12):
            deepcache_fx.reset(unet)
            unet(*inputs[size])
            unet.to("cpu")
    assert deepcache_fx.report(unet).captures == 2


def test_replaced_quantised_weights_are_bound(unet: Any) -> None:
    optimize(unet)
    denoise(unet)
    other = quantized(unet.config_name)
    write_into(other)
    for model in (other, quantized(unet.config_name)):
        expected = oracle(model)
        for name, parameter in list(model.named_parameters()):
            setattr(unet.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
        assert torch.equal(denoise(unet), expected)
    assert counts(unet) == (1, 2)


@thorough
def test_weights_quantised_in_another_way_are_captured_anew() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    unet = quantized("Int8WeightOnlyConfig")
    optimize(unet)
    denoise(unet)
    other = quantized("Int8WeightOnlyConfig", granularity=quantization.PerTensor())
    twin = SimpleNamespace(unet=other)
    for name, parameter in list(twin.unet.named_parameters()):
        setattr(unet.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
    assert torch.equal(denoise(unet), oracle(other))
    assert counts(unet) == (2, 0)


def test_what_a_quantised_weight_wraps_is_the_plain_tensors_inside() -> None:
    weight = quantized_weights(quantized("Int8WeightOnlyConfig"))[0]
    inside = list(unwrapped(weight))
    assert any(item is weight.qdata for item in inside)  # type: ignore[attr-defined]
    assert any(item is weight.scale for item in inside)  # type: ignore[attr-defined]
    assert all(type(item) in (torch.Tensor, torch.nn.Parameter) for item in inside)


@thorough
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_quantised_model_is_moved_after_the_first_call(backend: str, unet: Any) -> None:
    torch._dynamo.reset()
    # Of a sum taken in another order an activation may become the next of the 8-bit values.
    tolerance = 5e-3 if "DynamicActivation" in unet.config_name else 1e-4
    optimize(unet, backend=backend)
    before = denoise(unet)
    unet.to("cpu")
    write_into(unet)
    expected = oracle(unet)
    assert difference(before, expected) > 4 * tolerance
    assert difference(denoise(unet), expected) < tolerance
    assert deepcache_fx.report(unet).captures == 1
