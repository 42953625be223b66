"""Variants as callables: no guard runs in the step path, and no program is mistaken for another."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from torch import fx

import deepcache_fx
from deepcache_fx.errors import CompileError, OptionError
from deepcache_fx.execution.compile import compile_variant, pick_backend
from deepcache_fx.options import Options
from tests.compvis import CompVisUNet, denoise
from tests.families import thorough

CPU = torch.device("cpu")


def add(number: float) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, number)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def compiled(number: float, **options: Any) -> Any:
    return compile_variant(add(number), Options.make(**{"backend": "aot_eager", **options}), CPU)


def test_auto_is_inductor_on_cuda_and_the_graph_itself_elsewhere() -> None:
    assert pick_backend(Options.make(), torch.device("cuda", 1)) == "inductor"
    assert pick_backend(Options.make(), CPU) == "eager"
    assert pick_backend(Options.make(backend="aot_eager"), torch.device("cuda")) == "aot_eager"


def test_programs_without_guards_are_told_apart() -> None:
    first, second = compiled(1.0), compiled(2.0)
    for x in (torch.zeros(3), torch.ones(3)):
        assert torch.equal(first(x)[0], x + 1)
        assert torch.equal(second(x)[0], x + 2)
        assert torch.equal(first(x)[0], x + 1)


def test_no_guard_is_checked() -> None:
    """A guard on the shape would compile anew; here the runtime's signature is what guards."""
    graphs = 0

    def count(graph: fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    program = compiled(1.0, backend=count)
    for size in (3, 5, 7):
        assert program(torch.zeros(size))[0].shape == (size,)
    assert graphs == 1


def test_a_tensor_that_is_given_twice_at_first_need_not_be_later() -> None:
    graph = fx.Graph()
    inputs = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(torch.ops.aten.sub.Tensor, inputs),))
    program = compile_variant(fx.GraphModule(torch.nn.Module(), graph), Options.make(backend="aot_eager"), CPU)
    x = torch.ones(3)
    for _ in range(2):
        assert torch.equal(program(x, x)[0], torch.zeros(3))
        assert torch.equal(program(x, 3 * x)[0], -2 * x)
        torch.compiler.reset()  # what was traced is gone: the next call is traced again


def test_users_options_and_modes_reach_the_compiler() -> None:
    seen: list[dict[str, Any]] = []

    def backend(graph: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        seen.append(settings)
        return graph.forward

    compiled(1.0, backend=backend, options={"level": 3})(torch.zeros(1))
    compiled(1.0, backend=backend, mode="fast")(torch.zeros(1))
    assert [s.get("options", {}).get("level") for s in seen] == [3, None]
    assert [s.get("mode") for s in seen] == [None, "fast"]


def test_inductors_own_cuda_graphs_are_left_out_of_its_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: seen.append(settings) or model)
    for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        compiled(1.0, backend="inductor", mode=mode)
    options = [settings["options"] for settings in seen]
    assert all(settings["mode"] is None for settings in seen)
    assert all(settings["triton.cudagraphs"] is False for settings in options), "also where a user's global says True"
    assert [settings.get("max_autotune", False) for settings in options] == [False, False, True, True]
    assert options[2] == options[3]


def test_inductors_own_cuda_graphs_cannot_be_asked_for() -> None:
    with pytest.raises(OptionError, match="cached features overwritten: leave it out, cuda_graphs=True records"):
        deepcache_fx.optimize(CompVisUNet(), backend="inductor", options={"triton.cudagraphs": True})


def test_an_unknown_mode_or_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(CompileError, match="mode 'fastest' is unknown to Inductor: use one of default, "):
        compiled(1.0, backend="inductor", mode="fastest")
    with pytest.raises(CompileError, match=r"backend 'nonsense' is unknown: use auto, eager or one of .*aot_eager"):
        compiled(1.0, backend="nonsense")


@thorough
def test_a_capture_serves_only_its_own_size() -> None:
    """Without guards in the programs, what tells sizes apart is the signature alone."""
    unet = deepcache_fx.optimize(CompVisUNet(), backend="aot_eager")
    eager = deepcache_fx.optimize(CompVisUNet(), backend="eager")
    timesteps = torch.arange(950, -1, -200)
    for size, batch in ((8, 2), (16, 2), (8, 1), (8, 2), (16, 2)):
        expected = denoise(eager, timesteps, size=size, batch=batch)
        torch.testing.assert_close(denoise(unet, timesteps, size=size, batch=batch), expected)
    assert deepcache_fx.report(unet).captures == 3


class ThreeLayers(torch.nn.Module):
    """The smallest U-Net: what Inductor generates for it is compiled in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.deep, self.last = (torch.nn.Linear(width, 4) for width in (4, 4, 8))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        skip = self.first(x.transpose(1, -1)).transpose(1, -1) + timesteps[:, None, None, None] * context.mean() / 1000
        deep = self.deep(skip.transpose(1, -1)).transpose(1, -1).relu()
        return self.last(torch.cat([deep, skip], dim=1).transpose(1, -1)).transpose(1, -1)


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="Inductor needs a C++ compiler on a CPU",
)
def test_inductor_gives_what_the_graphs_give_and_compiles_each_once() -> None:
    """On real pipelines, against the published implementation: tests/whole/test_oracle.py."""
    timesteps = torch.arange(950, -1, -100)
    expected = denoise(deepcache_fx.optimize(ThreeLayers(), backend="eager", forecast=0), timesteps)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet = deepcache_fx.optimize(ThreeLayers(), backend="inductor", forecast=0)
    for _ in range(3):
        torch.testing.assert_close(denoise(unet, timesteps), expected, rtol=1e-4, atol=1e-4)
        assert deepcache_fx.report(unet).last_run == "FssFssFssF"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
