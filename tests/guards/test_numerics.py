"""Switches that programs have frozen in them: a change makes others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import deepcache_fx
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.guards.numerics import SWITCHES, read, settled
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import thorough

TIMESTEPS = torch.arange(950, -1, -50)[:4]


@contextmanager
def put_back(change: Callable[[], object], undo: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        undo()


def matmul(precision: str) -> Callable[[], None]:
    return lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", precision)


def cudnn(name: str, value: bool) -> Callable[[], None]:
    return lambda: setattr(torch.backends.cudnn, name, value)


CHANGES = {
    "tf32 of matrices": lambda: put_back(matmul("tf32"), matmul("none")),
    "tf32 by its old name": lambda: put_back(
        lambda: torch.set_float32_matmul_precision("high"), lambda: torch.set_float32_matmul_precision("highest")
    ),
    "tf32 of convolutions": lambda: put_back(cudnn("allow_tf32", False), cudnn("allow_tf32", True)),
    "determinism": lambda: put_back(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "determinism of cuDNN": lambda: put_back(cudnn("deterministic", True), cudnn("deterministic", False)),
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_its_undoing(name: str) -> None:
    before = settled(map(read, SWITCHES))
    with CHANGES[name]():
        assert settled(map(read, SWITCHES)) != before
    assert settled(map(read, SWITCHES)) == before


def test_recorded_programs_are_made_anew_for_other_switches_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    recorded = deepcache_fx.optimize(CompVisUNet(), backend="eager", cuda_graphs=True)
    called = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    for _ in range(2):
        denoise(recorded, TIMESTEPS)
        denoise(called, TIMESTEPS)
        with CHANGES["determinism of cuDNN"]():
            denoise(recorded, TIMESTEPS)
            denoise(called, TIMESTEPS)
    assert deepcache_fx.report(recorded).captures == 2
    assert deepcache_fx.report(called).captures == 1, "operators that are called read the switches each time"


@thorough
def test_a_change_within_a_run_makes_a_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    unet = deepcache_fx.optimize(CompVisUNet(), interval=10, backend="eager", cuda_graphs=True)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 6)
    with torch.no_grad():
        unet(x, TIMESTEPS[0].expand(1), context)
        unet(x, TIMESTEPS[1].expand(1), context)
        with CHANGES["determinism of cuDNN"]():
            unet(x, TIMESTEPS[2].expand(1), context)
            unet(x, TIMESTEPS[3].expand(1), context)
    assert deepcache_fx.report(unet).last_run == "FsFs"


@thorough
def test_another_default_dtype_changes_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    unet, plain = CompVisUNet(), CompVisUNet()
    expected = denoise(deepcache_fx.optimize(plain, backend="eager"), TIMESTEPS)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6)
    # Captured as it is now: the model itself cannot run with another default.
    deepcache_fx.optimize(unet, backend="eager", cuda_graphs=True, example_inputs=(x, TIMESTEPS[0].expand(2), context))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            for t in TIMESTEPS:
                given = x, t.expand(2), context
                assert torch.equal(unet(*given), plain(*given))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(denoise(unet, TIMESTEPS), expected)
