"""A cached feature belongs to a conditioning: calls that come, go, change places or are batched otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepcache_fx
from deepcache_fx.runtime import slots
from tests.compvis import CompVisUNet
from tests.families import examples, family, thorough
from tests.oracles import TO_THE_BIT, CatOracle

INTERVAL, STEPS = 3, 9
TIMESTEPS = torch.arange(950, 950 - 50 * STEPS, -50)
CONTEXTS = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3))
SAMPLES = torch.randn(STEPS, 1, 4, 8, 8, generator=torch.Generator().manual_seed(4))

Batch = tuple[int, ...]
"""The conditionings of one UNet call, by number."""
Calls = Callable[[int], Sequence[Batch]]
"""The calls of a step."""
Give = Callable[[Batch], torch.Tensor]
"""The tensor that a call is conditioned on."""


def held() -> Give:
    """The same tensor for the same batch, as a pipeline that keeps its embeddings."""
    known: dict[Batch, torch.Tensor] = {}
    return lambda batch: known.setdefault(batch, CONTEXTS[list(batch)])


def made_anew() -> Give:
    """A new tensor at every call, as a pipeline that joins its embeddings each time."""
    return lambda batch: CONTEXTS[list(batch)].clone()


def in_one_buffer() -> Give:
    """One tensor that is written into before every call."""
    buffers: dict[int, torch.Tensor] = {}
    return lambda batch: buffers.setdefault(len(batch), CONTEXTS[list(batch)].clone()).copy_(CONTEXTS[list(batch)])


GIVING = {"held": held, "made anew": made_anew}


@torch.no_grad()
def run(forward: Callable[..., torch.Tensor], calls: Calls, give: Give) -> list[torch.Tensor]:
    """The results of all calls. Steps are announced: what is tested is not how they are found out."""
    results, is_optimized = [], isinstance(forward, CompVisUNet)
    if is_optimized:
        deepcache_fx.begin(forward, STEPS)
    for step, t in enumerate(TIMESTEPS):
        for batch in calls(step):
            x = SAMPLES[step].expand(len(batch), -1, -1, -1)
            results.append(forward(x, t.expand(len(batch)), give(batch)))
        if is_optimized:
            deepcache_fx.step(forward)
    return results


class Specified:
    """A cache for each batch of conditionings: full at every third step, and where there is none of this period."""

    def __init__(self, calls: Calls) -> None:
        self.unet = CompVisUNet()
        self.trace = ""
        self._oracles: dict[tuple[Batch, int], tuple[CatOracle, int]] = {}
        self._plan = [(step, batch) for step in range(STEPS) for batch in calls(step)]
        self._used: list[tuple[int, Batch]] = []

    def __call__(self, *args: Any) -> torch.Tensor:
        step, batch = self._plan.pop(0)
        number = self._used.count((step, batch))
        self._used.append((step, batch))
        refresh = step - step % INTERVAL
        oracle, made = self._oracles.get((batch, number), (CatOracle(self.unet.forward, 0), -1))
        full = step == refresh or made < refresh
        self._oracles[batch, number] = oracle, step if full else made
        self.trace += "F" if full else "s"
        result: torch.Tensor = oracle(full, *args)
        return result


def check(calls: Calls, give: Callable[[], Give]) -> str:
    """Equal to the specification to the bit, and full at the same calls; returns which."""
    unet, expected = deepcache_fx.optimize(CompVisUNet(), interval=INTERVAL, **TO_THE_BIT), Specified(calls)
    for actual, right in zip(run(unet, calls, give()), run(expected, calls, held()), strict=True):
        assert torch.equal(actual, right)
    assert deepcache_fx.report(unet).last_run == expected.trace
    return expected.trace


@pytest.mark.parametrize("give", family(GIVING, "held"))
@pytest.mark.parametrize(
    ("calls", "trace"),
    [
        pytest.param(lambda s: [(0,), (1,)][s >= 4 :], "FF ss ss FF s s F s s", id="the first of two calls is dropped"),
        pytest.param(lambda s: [(1,), (0,)][: 1 + (s < 4)], "FF ss ss FF s s F s s", id="the second is dropped"),
        pytest.param(
            lambda s: [(0,), (1,)][:: -1 if s >= 4 else 1], "FF ss ss FF ss ss FF ss ss", id="they change places"
        ),
        pytest.param(lambda s: [(0,), (1,)][:: -1 if s % 2 else 1], "FF ss ss FF ss ss FF ss ss", id="in turn"),
        pytest.param(lambda s: [(0 if s < 4 else 2,), (1,)], "FF ss ss FF Fs ss FF ss ss", id="a prompt is swapped"),
        pytest.param(lambda s: [(s % 2,)], "F F s F F s F F s", id="alternating prompts"),
        pytest.param(lambda s: [(0, 1)] if s < 4 else [(0,), (1,)], "F s s F FF ss FF ss ss", id="a batch is parted"),
        pytest.param(lambda s: [(0,), (1,)] if s < 4 else [(0, 1)], "FF ss ss FF F s F s s", id="calls are joined"),
        pytest.param(lambda s: [(0, 1)] if s % 2 else [(1,), (0,)], "FF F ss F FF s FF F ss", id="by free memory"),
        pytest.param(lambda s: [(0,), (0,)], "FF ss ss FF ss ss FF ss ss", id="one conditioning twice a step"),
        pytest.param(lambda s: [(0,)] if 4 <= s < 7 else [(0,), (1,)], "FF ss ss FF s s F sF ss", id="a pause"),
    ],
)
def test_each_conditioning_reads_its_own_feature(calls: Calls, trace: str, give: str) -> None:
    assert check(calls, GIVING[give]) == trace.replace(" ", "")


@given(
    st.lists(
        st.lists(st.sampled_from([(0,), (1,), (2,), (0, 1)]), min_size=1, max_size=3), min_size=STEPS, max_size=STEPS
    )
)
@examples(5, 30)
def test_whatever_the_calls_of_a_step_are_no_feature_of_another_conditioning_is_read(plan: list[list[Batch]]) -> None:
    """Full calls may be more than the schedule has; a shallow one reads what its own conditioning left since then."""
    unet, plain, give = deepcache_fx.optimize(CompVisUNet(), interval=INTERVAL, **TO_THE_BIT), CompVisUNet(), held()
    actual = zip(run(unet, plan.__getitem__, give), deepcache_fx.report(unet).last_run, strict=True)
    left: dict[Batch, list[CatOracle]] = {}
    for step, t in enumerate(TIMESTEPS):
        if step % INTERVAL == 0:
            left.clear()
        for batch in plan[step]:
            result, letter = next(actual)
            call = SAMPLES[step].expand(len(batch), -1, -1, -1), t.expand(len(batch)), give(batch)
            if letter == "F":
                left.setdefault(batch, []).append(CatOracle(plain.forward, 0))
                assert torch.equal(result, left[batch][-1](True, *call)), step
            else:
                assert any(torch.equal(result, oracle(False, *call)) for oracle in left.get(batch, ())), step
    assert next(actual, None) is None


def test_a_buffer_that_is_written_into_is_another_conditioning() -> None:
    """The values are known from the second time on; the first time the change alone is."""
    calls: Calls = lambda s: [(0 if s < 4 else 2,)]  # noqa: E731
    unet = deepcache_fx.optimize(CompVisUNet(), interval=INTERVAL, **TO_THE_BIT)
    give = in_one_buffer()
    run(unet, calls, give)
    first = deepcache_fx.report(unet).last_run
    assert first[0] == first[3] == first[4] == "F"
    assert first.count("s") >= 4


@thorough
def test_what_an_inference_tensor_held_is_compared_for_its_changes_are_not_counted() -> None:
    calls: Calls = lambda s: [(0 if s < 4 else 2,)]  # noqa: E731
    with torch.inference_mode():
        assert check(calls, in_one_buffer) == "FssFFsFss"
        assert check(lambda s: [(0,)], made_anew) == "FssFssFss"


class Device:
    """Compares as a device does: the answer arrives when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.arrived = True

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> slots.Answer:
        self.asked += 1
        equal = torch.equal(first, second)
        return lambda: equal if self.arrived else None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setitem(slots.COMPARE_LATER, "cpu", found)
    return found


def trace_of(calls: Calls, give: Give) -> str:
    unet = deepcache_fx.optimize(CompVisUNet(), interval=INTERVAL, **TO_THE_BIT)
    run(unet, calls, give)
    return deepcache_fx.report(unet).last_run


def test_on_a_device_tensors_that_are_held_are_told_apart_without_asking_it(device: Device) -> None:
    for calls in (lambda s: [(0,), (1,)][s >= 4 :], lambda s: [(0 if s < 4 else 2,), (1,)]):
        check(calls, held)
    assert device.asked == 0


def test_on_a_device_a_tensor_made_anew_stays_shallow_and_a_change_is_noticed_a_step_late(device: Device) -> None:
    assert trace_of(lambda s: [(0,)], made_anew()) == "FssFssFss"
    assert device.asked == 6 + 2  # and once at each full step but the first
    assert trace_of(lambda s: [(0 if s < 4 else 2,)], made_anew()) == "FssFsFFss"


def test_an_answer_that_has_not_arrived_is_not_waited_for(device: Device) -> None:
    device.arrived = False
    assert trace_of(lambda s: [(0 if s < 4 else 2,)], made_anew()) == "FssFssFss"


def test_why_a_step_was_full_is_in_the_report() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), interval=INTERVAL, **TO_THE_BIT)
    run(unet, lambda s: [(0 if s < 4 else 2,)], held())
    assert deepcache_fx.report(unet).forced_full == {slots.CONDITIONING_CHANGED: 1}
    run(unet, lambda s: [(0,) if s < 4 else (0, 1)], held())
    assert deepcache_fx.report(unet).forced_full == {slots.CONDITIONING_CHANGED: 1, slots.CHANGED: 1}


class TwoMaps(CompVisUNet):
    """Takes a feature map besides the sample."""

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, extra: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(x + extra, timesteps, context)


@torch.no_grad()
def trace_with_maps(give: Callable[[int], torch.Tensor]) -> str:
    unet = deepcache_fx.optimize(TwoMaps(), interval=INTERVAL, **TO_THE_BIT)
    for step, t in enumerate(TIMESTEPS):
        unet(SAMPLES[step], t.expand(1), CONTEXTS[:1], give(step))
    return deepcache_fx.report(unet).last_run


def test_a_feature_map_that_is_made_for_each_step_is_no_conditioning() -> None:
    assert trace_with_maps(lambda s: torch.randn(1, 4, 8, 8)) == "FssFssFss"


def test_a_feature_map_that_was_held_and_is_another_one_is_a_change() -> None:
    one, other = torch.randn(2, 1, 4, 8, 8)
    assert trace_with_maps(lambda s: one if s < 4 else other) == "FssFFsFss"


@thorough
def test_old_features_do_not_pile_up() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), interval=50, **TO_THE_BIT)
    contexts = torch.randn(30, 1, 3, 6)
    with torch.no_grad():
        for step, t in enumerate(torch.arange(950, 350, -20)):
            unet(SAMPLES[0], t.expand(1), contexts[step])
    runtime = type(unet)._deepcache_fx
    assert len(runtime._state.slots) <= slots.SPARE_SLOTS + 2
    assert deepcache_fx.report(unet).last_run == "F" * 30
