"""Weights that are moved, tied or written into after the first call: never a wrong step, whatever happens to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepcache_fx
from deepcache_fx.execution import cuda_graphs, memory_format
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.graphs import error

TIMESTEPS = torch.arange(950, -1, -50)
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([1, 1]), torch.randn(2, 3, 6)


def as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend that compiles nothing: the graph as Dynamo has it."""
    return graph.forward


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_format, "DEVICE_TYPES", ("cpu",))


@pytest.fixture(params=family([False, True], True), ids=["called", "recorded"])
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    return bool(request.param)


def compiled(unet: Any = None, **options: Any) -> Any:
    return deepcache_fx.optimize(unet or CompVisUNet(), **{"branch": 1, "backend": as_it_is, **options})


def plain(unet: Any = None, **options: Any) -> Any:
    return deepcache_fx.optimize(unet or CompVisUNet(), **{"branch": 1, "backend": "eager", **options})


def projections(unet: CompVisUNet) -> list[torch.nn.Linear]:
    return [layer[1] for name, layer in unet.named_modules() if name.endswith("emb_layers")]  # type: ignore[index]


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return error((actual,), (expected,)) <= 1e-5


def _double_and_back(unet: CompVisUNet) -> None:
    unet.double().float()


def _other_memory(unet: CompVisUNet) -> None:
    for parameter in unet.parameters():  # as offloading does, there and back
        parameter.data = parameter.data.clone()


def _in_place(unet: CompVisUNet) -> None:
    for parameter in unet.parameters():
        parameter.mul_(0.9)


def _through_data(unet: CompVisUNet) -> None:
    for layer in projections(unet):
        layer.weight.data += 0.1  # fusing a LoRA


def _one_of_them(unet: CompVisUNet) -> None:
    weight = projections(unet)[2].weight
    weight.data = weight.data * 3  # fusing one safely


def _the_shallow_ones(unet: CompVisUNet) -> None:
    for layer in (projections(unet)[0], *projections(unet)[-2:]):
        layer.weight.data = layer.weight.data * 3
        layer.bias.data = layer.bias.data + 1


def _tied(unet: CompVisUNet) -> None:
    projections(unet)[0].weight.data = projections(unet)[-1].weight.data


def _flat(unet: CompVisUNet) -> None:
    layers = projections(unet)
    flat = torch.cat([layer.weight.data * 2 for layer in layers])
    for layer, part in zip(layers, flat.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part


def _reversed_in_place(unet: CompVisUNet) -> None:
    """The same storage, the same addresses, other owners: only the order differs."""
    same = [layer.weight for layer in projections(unet) if len(layer.weight) == 16]
    for weight, data in zip(same, [weight.data for weight in reversed(same)], strict=True):
        weight.data = data


def _loaded(unet: CompVisUNet) -> None:
    unet.load_state_dict({name: value * 1.1 for name, value in unet.state_dict().items()})


IN_THE_MIDST: list[Callable[[CompVisUNet], None]] = [
    _double_and_back,
    _other_memory,
    _in_place,
    _through_data,
    _one_of_them,
    _the_shallow_ones,
    _tied,
    _flat,
    _reversed_in_place,
    _loaded,
]


@torch.no_grad()
def _as_at_first(*unets: CompVisUNet) -> None:
    for unet in unets:
        for parameter, value in zip(unet.parameters(), CompVisUNet().parameters(), strict=True):
            parameter.data = value.data.clone()


def test_whatever_happens_to_the_weights_between_runs_is_seen_by_the_next(recording: bool) -> None:
    unet, other = compiled(), plain()
    for change in IN_THE_MIDST:
        _as_at_first(unet, other)
        denoise(unet, TIMESTEPS[:2])
        with torch.no_grad():
            change(unet), change(other)
        for _ in range(2):
            assert close(denoise(unet, TIMESTEPS[:5]), denoise(other, TIMESTEPS[:5])), change.__name__
    assert deepcache_fx.report(unet).captures == 1


@pytest.mark.parametrize("step", family([2, 3], 2))
def test_whatever_happens_to_the_weights_within_a_run_is_seen_by_the_next_step(step: int, recording: bool) -> None:
    """Step 2 is shallow, step 3 full."""
    unet, other = compiled(), plain()
    generator = torch.Generator().manual_seed(0)
    for change in IN_THE_MIDST:
        _as_at_first(unet, other)
        deepcache_fx.reset(unet), deepcache_fx.reset(other)
        with torch.no_grad():
            for index, t in enumerate(TIMESTEPS[:5]):
                if index == step:
                    change(unet), change(other)
                arguments = torch.randn(2, 4, 8, 8, generator=generator), t.expand(2), torch.ones(2, 3, 6)
                assert close(unet(*arguments), other(*arguments)), (change.__name__, index)
        assert deepcache_fx.report(unet).last_run == "FssFs"
    assert deepcache_fx.report(unet).captures == 1


@thorough
def test_a_model_that_shares_memory_with_another_sees_its_own_values() -> None:
    """As after load_state_dict(assign=True) from another: parameters of its own over the same storages."""
    unet, twin = CompVisUNet(), CompVisUNet()
    twin.load_state_dict(unet.state_dict(), assign=True)
    expected = denoise(plain(), TIMESTEPS)
    assert close(denoise(compiled(twin), TIMESTEPS), expected)
    assert close(denoise(compiled(unet), TIMESTEPS), expected)
    assert close(denoise(twin, TIMESTEPS), expected)


@thorough
def test_threads_that_begin_at_once_after_the_weights_have_moved_get_what_they_get_alone() -> None:
    expected = {size: denoise(plain(), TIMESTEPS[:6], size=size) for size in (8, 16)}
    unet, num_threads = compiled(), torch.get_num_threads()
    for size in expected:
        denoise(unet, TIMESTEPS[:6], size=size)
    results: list[tuple[int, torch.Tensor]] = []
    gate = threading.Barrier(4, action=lambda: _other_memory(unet))

    def work(size: int) -> None:
        torch.set_num_threads(num_threads)
        for _ in range(3):
            gate.wait()
            results.append((size, denoise(unet, TIMESTEPS[:6], size=size)))

    threads = [threading.Thread(target=work, args=(size,)) for size in (8, 16, 8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(close(result, expected[size]) for size, result in results)


@thorough
def test_a_step_in_inference_mode_leaves_weights_that_can_be_trained() -> None:
    unet = compiled()
    with torch.inference_mode():
        denoise(unet, TIMESTEPS[:4])
    with pytest.warns(UserWarning, match="gradients are enabled"):
        unet(*INPUTS).sum().backward()
    assert unet.out[2].weight.grad is not None
