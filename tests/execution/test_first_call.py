"""Programs that cannot be compiled, which is found out at their first call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.exc import TritonMissing

import deepcache_fx
from deepcache_fx.errors import CompileError
from deepcache_fx.execution import compile as compilation
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.execution.first_call import CompiledAtFirstCall, Toolchain
from deepcache_fx.options import Options
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough

TIMESTEPS = torch.arange(950, -1, -50)[:6]


def missing(*tensors: Any) -> Any:
    raise TritonMissing(None)


def made(program: Callable[..., Any], toolchain: Toolchain) -> CompiledAtFirstCall:
    return CompiledAtFirstCall(program, lambda *tensors: ["graph", *tensors], toolchain)


def test_one_warning_and_the_graphs_where_the_choice_was_ours() -> None:
    toolchain = Toolchain("inductor", may_fall_back=True)
    first, second = made(missing, toolchain), made(missing, toolchain)
    with pytest.warns(UserWarning, match="has taken inductor, which cannot compile here.*TritonMissing") as caught:
        given = [program(number) for number, program in enumerate((first, second, first))]
    assert given == [["graph", number] for number in range(3)]
    assert len(caught) == 1
    assert first.refused == second.refused == toolchain.refused


def test_what_is_compiled_stays_compiled_when_another_cannot_be() -> None:
    toolchain = Toolchain("inductor", may_fall_back=True)
    full, shallow = made(lambda *tensors: ["compiled"], toolchain), made(missing, toolchain)
    full()
    with pytest.warns(UserWarning, match="cannot compile here"):
        shallow()
    assert (full(), shallow()) == (["compiled"], ["graph"])


def test_a_named_backend_is_an_error_with_the_remedy_at_every_call() -> None:
    program = made(missing, Toolchain("inductor", may_fall_back=False))
    for _ in range(2):
        with pytest.raises(CompileError, match=r"backend 'inductor' cannot compile the graph: TritonMissing.*'auto'"):
            program()


def test_a_programs_own_error_is_its_own() -> None:
    def broken() -> Any:
        raise ValueError("no luck")

    program = made(broken, Toolchain("inductor", may_fall_back=True))
    with pytest.raises(ValueError, match="no luck"):
        program()
    assert program.refused is None


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes a backend that finds no Triton, as Inductor on CUDA would."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise TritonMissing(None)

    original = compilation.pick_backend

    def pick(options: Options, device: torch.device) -> Any:
        return backend if options.backend == "auto" else original(options, device)

    monkeypatch.setattr(compilation, "pick_backend", pick)
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("graphs", family([True, False], True))
def test_auto_runs_the_graphs_with_one_warning_recorded_or_not(graphs: bool) -> None:
    expected = denoise(deepcache_fx.optimize(CompVisUNet(), backend="eager"), TIMESTEPS)
    unet = deepcache_fx.optimize(CompVisUNet(), cuda_graphs=graphs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(denoise(unet, TIMESTEPS), expected)
        assert torch.equal(denoise(unet, TIMESTEPS), expected)
    assert ["cannot compile here" in str(item.message) for item in caught].count(True) == 1
    assert deepcache_fx.report(unet).backend == "eager"


def broken_compiler(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("ptxas not found")


@thorough
def test_a_named_backend_that_cannot_compile_leaves_the_model_as_it_was() -> None:
    unet = CompVisUNet()
    expected = denoise(unet, TIMESTEPS)
    deepcache_fx.optimize(unet, backend=broken_compiler)
    with pytest.raises(CompileError, match="backend 'broken_compiler' cannot compile the graph"):
        denoise(unet, TIMESTEPS)
    assert torch.equal(denoise(unet, TIMESTEPS), expected)


@thorough
def test_or_runs_it_uncached_if_that_is_wished() -> None:
    expected = denoise(CompVisUNet(), TIMESTEPS)
    unet = deepcache_fx.optimize(CompVisUNet(), backend=broken_compiler, on_failure="uncached")
    with pytest.warns(UserWarning, match="runs uncached: backend 'broken_compiler' cannot compile"):
        assert torch.equal(denoise(unet, TIMESTEPS), expected)
    report = deepcache_fx.report(unet)
    assert (report.full_calls, report.original_calls, report.signatures) == (0, len(TIMESTEPS), ())
