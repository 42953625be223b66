"""Deferred tensors: computed once, when something asks for values, and never seen otherwise than computed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deepcache_fx.controlnet.deferred import Deferral, DeferredTensor
from deepcache_fx.graph.lazy import all_computed, computed, plain_type

VALUE = torch.arange(6.0).reshape(2, 3)


class Source:
    """Counts how often its values are computed, and by whom they were asked for."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.deferral = Deferral(self.compute)

    def compute(self, by_operator: bool) -> list[torch.Tensor]:
        self.asked.append(by_operator)
        return [VALUE.clone(), VALUE + 1]

    def tensor(self, index: int = 0) -> DeferredTensor:
        return DeferredTensor(torch.empty(2, 3), self.deferral, index)


def saved(tensor: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    loaded: torch.Tensor = torch.load(buffer, weights_only=True)
    return loaded


OPERATIONS: dict[str, tuple[Callable[[torch.Tensor], Any], Any]] = {
    "add": (lambda d: d + 1, VALUE + 1),
    "on the right": (lambda d: VALUE * d, VALUE * VALUE),
    "view": (lambda d: d.view(3, 2), VALUE.view(3, 2)),
    "index": (lambda d: d[1, 2].item(), 5.0),
    "cat": (lambda d: torch.cat([torch.zeros_like(d), d]), torch.cat([0 * VALUE, VALUE])),
    "clone": (lambda d: d.clone(), VALUE),
    "detach": (lambda d: d.detach(), VALUE),
    "data": (lambda d: d.data, VALUE),
    "half": (lambda d: d.half(), VALUE.half()),
    "numpy": (lambda d: d.numpy(), VALUE.numpy()),
    "asarray": (lambda d: np.asarray(d), VALUE.numpy()),
    "tolist": (lambda d: d.tolist(), VALUE.tolist()),
    "deepcopy": (copy.deepcopy, VALUE),
    "pickle": (lambda d: pickle.loads(pickle.dumps(d)), VALUE),
    "save": (saved, VALUE),
    "iterate": (lambda d: torch.stack(list(d)), VALUE),
    "layer": (lambda d: torch.nn.functional.linear(d, torch.eye(3)), VALUE),
    "bool": (lambda d: bool((d == VALUE).all()), True),
    "add to another": (lambda d: VALUE.clone().add_(d), 2 * VALUE),
    "written out": (lambda d: torch.add(d, 1, out=torch.empty(2, 3)), VALUE + 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_whatever_reads_values_computes_them_first(name: str, mode: Callable[[], Any]) -> None:
    operation, expected = OPERATIONS[name]
    source = Source()
    with mode():
        found = operation(source.tensor())
    assert type(found) is type(expected)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert source.asked == [True]


def test_what_reads_no_values_computes_nothing() -> None:
    source = Source()
    d = source.tensor()
    assert (d.shape, d.stride(), d.dtype, d.device.type, d.numel(), d.ndim) == (
        (2, 3),
        (3, 1),
        torch.float32,
        "cpu",
        6,
        2,
    )
    assert d.to("cpu") is d  # as accelerate's hooks do
    assert d.to("cpu", non_blocking=True) is d
    assert d.to(torch.float32) is d
    assert d.contiguous() is d
    assert d.is_contiguous()
    assert not d.requires_grad
    assert repr(d) == "DeferredTensor(shape=(2, 3), dtype=torch.float32, device=cpu)"
    assert plain_type(d) is torch.Tensor
    assert isinstance(d, torch.Tensor)
    assert torch.is_tensor(d)
    assert source.asked == []


def test_strides_are_those_of_the_value() -> None:
    like = torch.empty(1, 4, 2, 2).to(memory_format=torch.channels_last)
    d = DeferredTensor(like, Deferral(lambda _: [like]), 0)
    assert d.stride() == like.stride()
    assert d.is_contiguous(memory_format=torch.channels_last)


def test_one_computation_serves_all_tensors_of_a_deferral() -> None:
    source = Source()
    first, second = source.tensor(0), source.tensor(1)
    assert torch.equal(second - first, torch.ones(2, 3))
    assert torch.equal(first + 0, VALUE)
    assert source.asked == [True]


def test_a_change_in_place_is_a_change_of_the_value() -> None:
    d = Source().tensor()
    d.mul_(2)
    d[0].add_(1)
    expected = 2 * VALUE
    expected[0] += 1
    assert torch.equal(d + 0, expected)
    assert torch.equal(d.value(), expected)


def test_one_who_knows_gets_the_value_itself() -> None:
    source = Source()
    d = source.tensor()
    [value, other] = computed([d, VALUE])
    assert other is VALUE
    assert type(value) is torch.Tensor
    assert all_computed({"a": [d, 1]}) == {"a": [value, 1]}
    assert source.asked == [False]


def test_arguments_without_a_deferred_tensor_are_the_callers_own_objects() -> None:
    mine: dict[str, Any] = {"kept": [VALUE]}
    assert all_computed((mine, VALUE))[0] is mine
    assert all_computed({"options": mine, "residual": [Source().tensor()]})["options"] is mine


def test_a_computation_that_failed_is_asked_again_and_fails_again() -> None:
    def fail(by_operator: bool) -> list[torch.Tensor]:
        raise RuntimeError("gone")

    d = DeferredTensor(VALUE, Deferral(fail), 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gone"):
            d + 1
