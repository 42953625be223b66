"""Models that do more than return a result run themselves: a graph would do it once, when it is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepcache_fx
from tests.compvis import CompVisUNet, denoise
from tests.oracles import TO_THE_BIT

TIMESTEPS = torch.arange(950, -1, -50)[:4]


class Recorder:
    """As an attention processor that keeps its map for the pipeline."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.all: dict[str, list[Any]] = {"seen": []}
        self.calls = 0


class Recording(CompVisUNet):
    def __init__(self, record: Callable[[Recorder, torch.Tensor], object]) -> None:
        super().__init__()
        self.recorder, self.record = Recorder(), record

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.record(self.recorder, x)
        return super().forward(x, timesteps, context)


KEEPING: dict[str, Callable[[Recorder, torch.Tensor], object]] = {
    "a tensor": lambda recorder, x: setattr(recorder, "kept", x + 1),
    "a list of tensors": lambda recorder, x: recorder.all["seen"].append(x + 1),
    "a number": lambda recorder, x: setattr(recorder, "calls", recorder.calls + 1),
}


@pytest.mark.parametrize("what", KEEPING)
def test_a_model_that_keeps_something_of_each_call_runs_uncached_and_says_why(what: str) -> None:
    model, plain = (Recording(KEEPING[what]) for _ in range(2))
    expected = denoise(plain, TIMESTEPS), denoise(plain, TIMESTEPS)
    deepcache_fx.optimize(model, **TO_THE_BIT)
    name = {"a tensor": "kept", "a list of tensors": "all", "a number": "calls"}[what]
    with pytest.warns(UserWarning, match=rf"runs uncached: Recorder keeps something of each call \({name}\)"):
        actual = [denoise(model, TIMESTEPS) for _ in range(2)]
    assert all(map(torch.equal, actual, expected))
    ours, theirs = model.recorder, plain.recorder
    assert ours.calls == theirs.calls
    assert all(map(torch.equal, [ours.kept, *ours.all["seen"]][1:], [theirs.kept, *theirs.all["seen"]][1:]))
    assert ours.kept is None or torch.equal(ours.kept, theirs.kept)
    assert len(ours.all["seen"]) == len(theirs.all["seen"])
    assert deepcache_fx.report(model).shallow_calls == 0


def test_once_the_recorder_is_gone_steps_are_cached() -> None:
    model = deepcache_fx.optimize(Recording(KEEPING["a tensor"]), **TO_THE_BIT)
    with pytest.warns(UserWarning, match="runs uncached"):
        denoise(model, TIMESTEPS)
    model.record, model.recorder = (lambda *_: None), None
    assert torch.equal(
        denoise(model, TIMESTEPS), denoise(deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT), TIMESTEPS)
    )
    assert deepcache_fx.report(model).last_run == "FssF"


def test_what_is_prepared_at_the_first_call_alone_is_no_side_effect() -> None:
    model = deepcache_fx.optimize(Recording(lambda recorder, x: setattr(recorder, "calls", 1)), **TO_THE_BIT)
    for _ in range(3):
        denoise(model, TIMESTEPS)
    report = deepcache_fx.report(model)
    assert (report.last_run, report.original_calls) == ("FssF", 0)


def test_a_hook_inside_of_the_model_is_called_at_every_step() -> None:
    model, seen = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT), []
    expected = denoise(model, TIMESTEPS)
    handle = model.out[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.warns(UserWarning, match=r"runs uncached: layer out\.2 has a forward hook"):
        denoise(model, TIMESTEPS)
    assert len(seen) == len(TIMESTEPS)
    handle.remove()
    assert torch.equal(denoise(model, TIMESTEPS), expected)


def test_hooks_of_pytorch_itself_are_captured() -> None:
    def normalised() -> CompVisUNet:
        model = CompVisUNet()
        torch.nn.utils.weight_norm(model.out[2])
        return model.requires_grad_(False)

    with pytest.warns(FutureWarning, match="weight_norm"):
        model, plain = normalised(), normalised()
    deepcache_fx.optimize(model, **TO_THE_BIT)
    assert torch.equal(denoise(model, TIMESTEPS[:1]), denoise(plain, TIMESTEPS[:1]))
    assert deepcache_fx.report(model).full_calls == 1


def test_asked_to_capture_ahead_it_is_an_error() -> None:
    model = Recording(KEEPING["a tensor"])
    inputs = {"x": torch.ones(2, 4, 8, 8), "timesteps": torch.tensor([1, 1]), "context": torch.ones(2, 3, 6)}
    with pytest.raises(deepcache_fx.DeepCacheError, match="Recorder keeps something of each call"):
        deepcache_fx.optimize(model, **TO_THE_BIT, example_inputs=inputs)
    assert type(model) is Recording
    assert model.recorder.kept is None
