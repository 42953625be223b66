"""Channels-last weights: values and objects stay, strides change, and change back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepcache_fx
from deepcache_fx.execution import memory_format
from deepcache_fx.execution.memory_format import ChannelsLastWeights
from tests.compvis import CompVisUNet, denoise

TIMESTEPS = torch.arange(950, -1, -50)


def formats(module: nn.Module) -> set[bool]:
    """Of the 3x3 convolutions."""
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return {w.is_contiguous(memory_format=torch.channels_last) for w in weights}


def test_converts_in_place_and_back() -> None:
    unet = CompVisUNet()
    parameters, values = list(unet.parameters()), copy.deepcopy(unet.state_dict())
    strides = [p.stride() for p in parameters]
    weights = ChannelsLastWeights()
    assert weights.convert(unet) == sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in unet.modules())
    assert formats(unet) == {True}
    assert all(a is b for a, b in zip(unet.parameters(), parameters, strict=True))
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in values.items())
    assert weights.convert(unet) == 0
    weights.undo()
    assert [p.stride() for p in parameters] == strides


def test_undo_keeps_what_was_loaded_meanwhile_and_what_the_user_had_made_channels_last() -> None:
    conv, own = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    weights = ChannelsLastWeights()
    assert weights.convert(nn.Sequential(conv, own)) == 1
    with torch.no_grad():
        conv.weight.copy_(torch.full((8, 4, 3, 3), 2.0))
    weights.undo()
    assert conv.weight.is_contiguous()
    assert bool((conv.weight == 2).all())
    assert own.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_two_use_stays_until_the_last_undoes_it() -> None:
    shared, own = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    first, second = ChannelsLastWeights(), ChannelsLastWeights()
    assert first.convert(nn.Sequential(shared, own)) == 2
    assert second.convert(shared) == 0
    first.undo()
    assert (formats(shared), formats(own)) == ({True}, {False})
    first.undo()  # and a second time it does nothing
    assert formats(shared) == {True}
    assert first.convert(nn.Sequential(shared, own)) == 1
    second.undo()
    assert formats(shared) == {True}
    first.undo()
    assert formats(shared) == {False}


def test_one_that_is_gone_keeps_nothing_as_it_is() -> None:
    conv = nn.Conv2d(4, 8, 3)
    gone, left = ChannelsLastWeights(), ChannelsLastWeights()
    gone.convert(conv)
    left.convert(conv)
    del gone
    left.undo()
    assert formats(conv) == {False}


def test_a_1x1_convolution_and_other_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv1d(4, 8, 3), nn.Linear(4, 4))
    assert ChannelsLastWeights().convert(model) == 0


@pytest.fixture
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_format, "DEVICE_TYPES", ("cpu",))


@pytest.mark.usefixtures("on_this_device")
def test_a_compiled_unet_has_channels_last_weights_until_it_is_restored() -> None:
    expected = denoise(deepcache_fx.optimize(CompVisUNet(), backend="eager"), TIMESTEPS)
    unet = deepcache_fx.optimize(CompVisUNet(), backend="aot_eager")
    torch.testing.assert_close(denoise(unet, TIMESTEPS), expected)
    assert formats(unet) == {True}
    deepcache_fx.restore(unet)
    assert formats(unet) == {False}


@pytest.mark.usefixtures("on_this_device")
def test_the_eager_backend_leaves_weights_as_they_are() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    denoise(unet, TIMESTEPS[:4])
    assert formats(unet) == {False}


@pytest.mark.usefixtures("on_this_device")
def test_programs_come_back_with_the_strides_they_were_compiled_for() -> None:
    """After another schedule, a with block and a user's change of format, weights fit the program that reads them."""
    expected = {n: denoise(deepcache_fx.optimize(CompVisUNet(), n, backend="eager"), TIMESTEPS) for n in (3, 5)}
    unet = deepcache_fx.optimize(CompVisUNet(), backend="aot_eager")
    torch.testing.assert_close(denoise(unet, TIMESTEPS), expected[3])
    with deepcache_fx.optimized(unet, interval=5, backend="aot_eager"):
        torch.testing.assert_close(denoise(unet, TIMESTEPS), expected[5])
    torch.testing.assert_close(denoise(unet, TIMESTEPS), expected[3])
    with deepcache_fx.optimized(unet, backend="eager"):
        torch.testing.assert_close(denoise(unet, TIMESTEPS), expected[3])
    unet.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(denoise(unet, TIMESTEPS), expected[3])
    assert deepcache_fx.report(unet).captures == 1
