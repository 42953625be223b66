"""Runs, steps and conditionings that the caller announces; and models that cannot be captured."""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from typing import Any

import pytest
import torch

import deepcache_fx
from deepcache_fx import CaptureError, DeepCacheError, OptionError, Power
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.execution.cuda_graphs import Recording
from tests.compvis import INPUTS, TIMESTEPS, CompVisUNet, denoise
from tests.families import thorough
from tests.oracles import TO_THE_BIT

CONTEXT = torch.randn(1, 3, 6)


def last_run(unet: torch.nn.Module) -> str:
    return deepcache_fx.report(unet).last_run


@torch.no_grad()
def heun(unet: torch.nn.Module, sigmas: torch.Tensor, *, announced: bool) -> None:
    """Two calls a step, at two sigmas: by their values they are steps of their own."""
    if announced:
        deepcache_fx.begin(unet, 2 * (len(sigmas) - 1))
    x = torch.randn(1, 4, 8, 8)
    for here, there in itertools.pairwise(sigmas):
        for sigma in (here, there):
            x = x - 0.1 * unet(x, sigma.clone().expand(1), CONTEXT)
            if announced:
                deepcache_fx.step(unet)


def test_announced_steps_count_whatever_the_timesteps_are() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    heun(unet, TIMESTEPS[:7], announced=True)
    assert last_run(unet) == "FssFssFssFss"
    for t in ([5.0, 5.0, 7.0], [1.0, 2.0, 0.5]):  # repeated, rising, falling
        deepcache_fx.begin(unet)
        with torch.no_grad():
            for value in t:
                unet(torch.ones(1, 4, 8, 8), torch.tensor([value]), CONTEXT)
                deepcache_fx.step(unet)
        assert last_run(unet) == "Fss"


def test_calls_between_two_announced_steps_are_one_step() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    contexts = torch.randn(20, 1, 3, 6).unbind()
    deepcache_fx.begin(unet, 3)
    with torch.no_grad():
        for t in TIMESTEPS[:3]:
            for index, context in enumerate(contexts):  # more areas than guidance has calls, each at its own sigma
                unet(torch.randn(1, 4, 8, 8), t.expand(1) - index, context)
            deepcache_fx.step(unet)
    assert last_run(unet) == "F" * 20 + "s" * 40


def test_schedules_are_told_the_number_of_announced_steps() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), schedule=Power(2, center=2), **TO_THE_BIT)
    heun(unet, TIMESTEPS[:6], announced=True)
    assert len(last_run(unet)) == 10
    assert last_run(unet).count("F") == 5


def test_more_steps_than_announced_begin_a_run() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    deepcache_fx.begin(unet, 2)
    with torch.no_grad():
        for t in TIMESTEPS[:4]:
            unet(torch.ones(1, 4, 8, 8), t.expand(1), CONTEXT)
            deepcache_fx.step(unet)
    assert last_run(unet)[0] == "F"
    assert len(last_run(unet)) < 4


@thorough
def test_after_a_reset_steps_are_found_out_again() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    heun(unet, TIMESTEPS[:3], announced=True)
    deepcache_fx.reset(unet)
    denoise(unet, TIMESTEPS[:7])
    assert last_run(unet) == "FssFssF"


def test_a_thread_announces_its_own_run_alone() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    denoise(unet, TIMESTEPS[:2])
    other = threading.Thread(target=lambda: deepcache_fx.begin(unet, 5))
    other.start(), other.join()
    with torch.no_grad():
        unet(INPUTS["x"], TIMESTEPS[2].expand(2), INPUTS["context"])
    assert len(last_run(unet)) in (1, 3)  # by its timestep, not by the other thread


def test_a_named_conditioning_has_its_own_feature_whatever_its_tensors_are() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    deepcache_fx.begin(unet, 6)
    names = [("cat",), ("cat",), ("dog",), ("dog",), ("cat",), ("dog",)]
    with torch.no_grad():
        for name, t in zip(names, TIMESTEPS, strict=False):
            deepcache_fx.condition(unet, name)
            unet(torch.ones(1, 4, 8, 8), t.expand(1), torch.randn(1, 3, 6))
            deepcache_fx.step(unet)
    assert last_run(unet) == "FsFFFs"


@torch.no_grad()
def announced(unet: torch.nn.Module, **options: Any) -> torch.Tensor:
    """The last prediction of a run of six steps, whose third and sixth are shallow."""
    deepcache_fx.begin(unet, **options)
    for t in TIMESTEPS[:6]:
        found: torch.Tensor = unet(torch.ones(1, 4, 8, 8) * t / 500, t.expand(1), CONTEXT)
        deepcache_fx.step(unet)
    return found


@thorough
def test_a_caller_says_that_a_run_is_not_to_be_forecast() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="eager", disable="all")
    expected = announced(deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT))
    forecast = announced(unet)
    assert deepcache_fx.report(unet).last_forecast[0] == "1"
    assert torch.allclose(announced(unet, may_forecast=False), expected, rtol=1e-5)
    assert deepcache_fx.report(unet).last_forecast == "0 (the caller says not to forecast)"
    assert not torch.allclose(forecast, expected, rtol=1e-5)
    obeyed = deepcache_fx.optimize(CompVisUNet(), backend="eager", forecast=2)
    announced(obeyed, may_forecast=False)
    assert deepcache_fx.report(obeyed).last_forecast == "2 (as asked for)"


@pytest.mark.parametrize("num_steps", [0, -1, True, 2.0, "3"])
def test_a_number_of_steps_that_is_none_is_refused(num_steps: Any) -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    with pytest.raises(OptionError, match="num_steps must be an integer of at least 1"):
        deepcache_fx.begin(unet, num_steps)
    with pytest.raises(OptionError, match="must be hashable"):
        deepcache_fx.condition(unet, [])


def test_announcing_to_a_model_that_is_not_optimised_is_refused() -> None:
    for announce in (deepcache_fx.begin, deepcache_fx.step, lambda unet: deepcache_fx.condition(unet, 1)):
        with pytest.raises(DeepCacheError, match="is not optimised"):
            announce(CompVisUNet())


class Unfollowable(CompVisUNet):
    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # a branch on values
            return super().forward(x, timesteps, context)
        return super().forward(-x, timesteps, context)


class Straight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("model", [Unfollowable, Straight])
def test_what_cannot_be_captured_raises_or_runs_as_it_is(model: type[torch.nn.Module]) -> None:
    unet, plain = model().eval(), model().eval()
    plain.load_state_dict(unet.state_dict())
    with pytest.raises(DeepCacheError), torch.no_grad():
        denoise(deepcache_fx.optimize(unet, **TO_THE_BIT), TIMESTEPS[:1])
    deepcache_fx.optimize(unet, on_failure="uncached", **TO_THE_BIT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = denoise(unet, TIMESTEPS[:5])
    assert torch.equal(found, denoise(plain, TIMESTEPS[:5]))
    assert len([w for w in caught if "runs uncached" in str(w.message)]) == 1
    report = deepcache_fx.report(unet)
    assert (report.original_calls, report.captures) == (5, 0)
    assert len(report.original_reasons) == 1
    deepcache_fx.restore(unet)
    assert type(unet) is model


def test_a_failure_is_not_tried_again_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcache_fx.runtime import runtime

    tried = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise CaptureError("this one cannot")

    monkeypatch.setattr(runtime, "capture", failing)
    unet = deepcache_fx.optimize(CompVisUNet(), on_failure="uncached", **TO_THE_BIT)
    with pytest.warns(UserWarning, match="this one cannot"):
        denoise(unet, TIMESTEPS[:4])
    assert len(tried) == 1


def test_a_failure_is_not_tried_again_after_another_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcache_fx.runtime import runtime

    tried = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise CaptureError("this one cannot")

    monkeypatch.setattr(runtime, "capture", failing)
    unet = CompVisUNet()
    for interval in (2, 3, 4):
        deepcache_fx.optimize(unet, interval, on_failure="uncached", **TO_THE_BIT)
        with pytest.warns(UserWarning, match="this one cannot"):
            denoise(unet, TIMESTEPS[:2])
    assert len(tried) == 1


def test_on_failure_takes_two_words() -> None:
    with pytest.raises(OptionError, match='on_failure must be "raise" or "uncached"'):
        deepcache_fx.optimize(CompVisUNet(), on_failure="ignore")  # type: ignore[arg-type]


class NothingToDo:
    """A recorder whose replays cost nothing: what is left is the step path."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()

    def begin(self) -> bool:
        return True

    def keep(self, tensor: torch.Tensor) -> None: ...

    def finish(self) -> None: ...

    def record(self, run: Any) -> Recording:
        return Recording(lambda: None, [value.clone() for value in run()], lambda: None)


def test_a_warm_shallow_step_makes_at_most_thirty_python_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `torch.nn.Module.__call__` counted, those of the recorder not."""
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", NothingToDo)
    unet = deepcache_fx.optimize(CompVisUNet(), interval=50, backend="eager", cuda_graphs=True)
    denoise(unet, TIMESTEPS)  # captures; the weights of the forecast are known by then
    calls: list[str] = []

    def count(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename != __file__:
            calls.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    x, context = torch.ones(2, 4, 8, 8), torch.ones(2, 3, 6)
    with torch.no_grad():
        for step, t in enumerate(TIMESTEPS[:6]):
            timestep = t.expand(2)
            sys.setprofile(count if step == 5 else None)
            try:
                unet(x, timestep, context)
            finally:
                sys.setprofile(None)
    assert last_run(unet) == "Fsssss"
    assert 0 < len(calls) <= 30, calls
