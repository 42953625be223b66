"""Steps of several depths: against a plain eager reference, and itself in every way of running."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch

import deepcache_fx
from deepcache_fx import BranchError, DeepCacheError, Nested, Schedule, ScheduleError, Steps, Uniform, Window
from deepcache_fx.execution import cuda_graphs
from tests import compvis, models
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.oracles import TO_THE_BIT, joins_channels
from tests.pipelines import one_controlnet

TIMESTEPS = torch.arange(950, -1, -50)
SCHEDULE = Nested(6, {1: 3, 2: Steps([4, 9, 16])})
LETTERS = "FsstusFssussFsstusFs"


class NestedOracle:
    """Runs the module itself, eagerly; operands of `torch.cat` are noted and replaced, branch by branch.

    A forecast is the polynomial by Lagrange's formula through what was noted last.
    """

    def __init__(self, forward: Any, branches: tuple[int, ...], order: int) -> None:
        self.forward, self.branches, self.order = forward, branches, order
        self.count = 0
        """Of the concatenations: the first call, which runs nothing else, tells."""
        self.noted: dict[int, list[tuple[int, torch.Tensor]]] = {branch: [] for branch in branches}

    def step(self, number: int, start: int | None, *args: Any) -> Any:
        """`start` is the branch that the step begins at; None is a full step."""
        cat, seen = torch.cat, 0
        self.count = self.count or self._count(cat, args)

        def replacing(tensors: Any, dim: int = 0) -> torch.Tensor:
            nonlocal seen
            if joins_channels(tensors, dim):
                branch = self.count - 1 - seen
                seen += 1
                if branch == start:
                    tensors = [self.forecast(branch, number), tensors[1]]
                elif branch in self.branches and (start is None or (branch < start and self.order)):
                    self.noted[branch] = [(number, tensors[0].clone()), *self.noted[branch]][: self.order + 1]
            return cat(tensors, dim=dim)

        with mock.patch("torch.cat", replacing), torch.no_grad():
            return self.forward(*args)

    def _count(self, cat: Any, args: Any) -> int:
        count = 0

        def counting(tensors: Any, dim: int = 0) -> torch.Tensor:
            nonlocal count
            count += joins_channels(tensors, dim)
            return cat(tensors, dim=dim)

        with mock.patch("torch.cat", counting), torch.no_grad():
            self.forward(*args)
        return count

    def forecast(self, branch: int, number: int) -> torch.Tensor:
        points = self.noted[branch]
        total = torch.zeros_like(points[0][1])
        for i, (at, value) in enumerate(points):
            weight = 1.0
            for j, (other, _) in enumerate(points):
                weight *= 1 if i == j else (number - other) / (at - other)
            total = total + weight * value
        return total


def reference(schedule: Schedule, order: int, seed: int = 0) -> torch.Tensor:
    unet = CompVisUNet()
    oracle = NestedOracle(unet.forward, (0, *schedule.branches), order)
    number = -1

    def call(*args: Any) -> Any:
        nonlocal number
        number += 1
        full = number == 0 or schedule.is_full(number, len(TIMESTEPS))
        return oracle.step(number, None if full else schedule.branch_at(number, len(TIMESTEPS)) or 0, *args)

    return denoise(call, TIMESTEPS, seed)  # type: ignore[arg-type]


def optimized(order: int, schedule: Schedule = SCHEDULE, **options: Any) -> CompVisUNet:
    return deepcache_fx.optimize(CompVisUNet(), schedule=schedule, **{**options, "forecast": order})


@pytest.mark.parametrize("order", family([0, 1, 2], 1))
def test_equals_the_operands_replaced_in_plain_eager_code(order: int) -> None:
    unet = optimized(order, **TO_THE_BIT)
    result = denoise(unet, TIMESTEPS)
    torch.testing.assert_close(result, reference(SCHEDULE, order), atol=1e-5, rtol=1e-5)
    found = deepcache_fx.report(unet)
    assert found.last_run == LETTERS
    assert found.calls_by_branch == {0: 11, 1: 2, 2: 3}


@pytest.mark.parametrize("order", family([0, 1], 1))
def test_hoisted_programs_are_close_to_the_plain_ones(order: int) -> None:
    """Order 0 to rounding; a forecast of what is past a norm is not the same polynomial, but close."""
    hoisted = denoise(optimized(order, backend="eager"), TIMESTEPS)
    plain = denoise(optimized(order, **TO_THE_BIT), TIMESTEPS)
    assert (hoisted - plain).norm() < (1e-2 if order else 1e-5) * plain.norm()


@pytest.mark.parametrize("order", family([0, 1, 2], 1))
def test_recorded_steps_give_what_called_ones_give_to_the_bit(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    plain = optimized(order, backend="eager", cuda_graphs=False)
    unet = optimized(order, backend="eager", cuda_graphs=True)
    for seed in (0, 1, 0):
        assert torch.equal(denoise(unet, TIMESTEPS, seed), denoise(plain, TIMESTEPS, seed))
    [signature] = deepcache_fx.report(unet).signatures
    assert signature.cuda_graphs == "recorded"
    assert set(signature.first_call_seconds) == {"full", "shallow", "shallow_1", "shallow_2"}


@pytest.mark.parametrize("recorded", family([False, True], True))
def test_two_calls_a_step_do_not_mix_their_caches(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    unet, first, second = (optimized(1, backend="eager", cuda_graphs=recorded) for _ in range(3))
    x, contexts = torch.randn(1, 4, 8, 8), [torch.randn(1, 3, 6) for _ in range(2)]
    with torch.no_grad():
        for t in TIMESTEPS:
            both = [unet(x, t.expand(1), context) for context in contexts]
            alone = [model(x, t.expand(1), context) for model, context in zip((first, second), contexts, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
            x = x - 0.1 * both[0]


@thorough
def test_a_deeper_step_is_closer_to_the_uncached_result() -> None:
    plain = denoise(CompVisUNet(), TIMESTEPS)
    schedules = (Uniform(6), Nested(6, {2: 2}))
    errors = [float((denoise(optimized(1, one, backend="eager"), TIMESTEPS) - plain).norm()) for one in schedules]
    assert errors[1] < errors[0]


@thorough
def test_a_pipeline_follows_it_and_a_window_passes_it_on() -> None:
    pipe = models.sd_pipeline()
    with deepcache_fx.optimized(pipe, schedule=Window(1, -1, Nested(4, {(1, 0): 2})), forecast=1, backend="eager"):
        models.generate(pipe, 10)
        found = deepcache_fx.report(pipe)
    assert found.last_run == "FFstsFstsF"
    assert [(cut.block, cut.layer) for cut in found.signatures[0].cuts] == [(0, 0), (1, 0)]
    assert "shallow calls: 4 at branch 0, 2 at branch 3" in str(found)


def test_each_cut_has_listings_and_counts() -> None:
    unet = optimized(1, backend="eager")
    denoise(unet, TIMESTEPS[:7])
    found = deepcache_fx.report(unet)
    [signature] = found.signatures
    assert {"full", "shallow", "shallow_1", "shallow_2"} <= set(signature.graphs)
    macs = [cut.shallow_macs for cut in signature.cuts]
    assert macs == sorted(macs)
    assert signature.mean_shallow_macs({0: 1, 2: 1}) == round((macs[0] + macs[2]) / 2)
    assert signature.mean_shallow_macs({}) == macs[0]
    assert found.cache_bytes == 2 * sum(cut.cache_bytes for cut in signature.cuts)
    assert f"cache 2 x {signature.cuts[0].cache_bytes / 2**20:.2f} MiB" in str(found)


def test_a_schedule_with_other_branches_needs_other_programs_and_one_with_the_same_keeps_them() -> None:
    unet = optimized(1, Nested(6, {1: 3}), backend="eager")
    denoise(unet, TIMESTEPS[:4])
    deepcache_fx.optimize(unet, schedule=Nested(4, {1: 2}), forecast=1, backend="eager")
    denoise(unet, TIMESTEPS[:4])
    assert deepcache_fx.report(unet).captures == 1
    for schedule in (Nested(Nested(8, {1: 2}), {1: 4}), Window(1, None, Nested(4, {1: 2}))):
        deepcache_fx.optimize(unet, schedule=schedule, forecast=1, backend="eager")
        assert deepcache_fx.report(unet).captures == 1
    deepcache_fx.optimize(unet, schedule=Nested(4, {2: 2}), forecast=1, backend="eager")
    denoise(unet, TIMESTEPS[:4])
    assert [cut.branch for cut in deepcache_fx.report(unet).signatures[0].cuts] == [0, 2]


@pytest.mark.parametrize("deeper", [0, 1, 99, (7, 7)])
def test_a_branch_that_is_not_deeper_or_not_there_is_refused(deeper: Any) -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), branch=1, schedule=Nested(6, {deeper: 3}), backend="eager")
    with pytest.raises(BranchError, match=r"must be deeper|out of range"):
        denoise(unet, TIMESTEPS[:2])


@thorough
def test_two_names_of_one_skip_connection_share_a_cut() -> None:
    [first] = [
        skip for skip in deepcache_fx.plan(CompVisUNet(), example_inputs=compvis.INPUTS).branches if skip.index == 1
    ]
    both = optimized(1, Nested(6, {1: 2, (first.block, first.layer): 3}), backend="eager")
    one = optimized(1, Nested(6, {1: Steps([2, 3, 4, 8, 9, 10, 14, 15, 16])}), backend="eager")
    assert torch.equal(denoise(both, TIMESTEPS), denoise(one, TIMESTEPS))
    assert [cut.branch for cut in deepcache_fx.report(both).signatures[0].cuts] == [0, 1]


def test_a_schedule_that_begins_a_step_where_it_did_not_say_is_refused() -> None:
    class Wrong(Uniform):
        def branch_at(self, step: int, num_steps: int | None) -> int:
            return 0

    with pytest.raises(ScheduleError, match=r"begins step 1 at branch 0, which its `branches` do not name"):
        denoise(optimized(1, Wrong(3), backend="eager"), TIMESTEPS[:3])


def test_a_calibrated_schedule_is_checked_wherever_it_stands() -> None:
    class MadeForAnother(Uniform):
        def check(self, unet: Any, scheduler: Any = None) -> None:
            raise ScheduleError("made for another")

    another = MadeForAnother(3)
    for schedule in (another, Window(1, None, another), Nested(another, {1: 3}), Nested(6, {1: another})):
        unet = CompVisUNet()
        with pytest.raises(ScheduleError, match="made for another"):
            deepcache_fx.optimize(unet, schedule=schedule)
        with pytest.raises(DeepCacheError, match="is not optimised"):
            deepcache_fx.report(unet)


@thorough
def test_compiled_programs_that_are_not_recorded_follow_too_also_after_a_reset_of_the_compiler() -> None:
    schedule = Nested(4, {1: 2})
    expected = denoise(optimized(1, schedule, backend="eager"), TIMESTEPS[:9])
    unet = optimized(1, schedule, backend="aot_eager", cuda_graphs=False)
    for _ in range(2):
        torch.testing.assert_close(denoise(unet, TIMESTEPS[:9]), expected, atol=1e-6, rtol=1e-5)
        torch.compiler.reset()


@pytest.mark.parametrize("order", family([0, 1], 1))
def test_a_controlnet_computes_what_each_depth_reads(order: int) -> None:
    schedule, options = Nested(6, {1: 2, 2: 3}), {**TO_THE_BIT, "forecast": order}
    followed, alone = one_controlnet(), one_controlnet()
    deepcache_fx.optimize(followed.pipe, schedule=schedule, **options)
    deepcache_fx.optimize(alone.pipe.unet, schedule=schedule, **options)
    run = followed.runs[0]
    assert torch.equal(followed(run), alone(run))
    found = deepcache_fx.report(followed.pipe)
    assert {"F", "s", "t"} <= set(found.last_run)
    assert found.companions[0].shallow_calls > 0


def test_a_report_is_ready_for_json() -> None:
    unet = optimized(1, backend="eager")
    denoise(unet, TIMESTEPS[:5])
    values = deepcache_fx.report(unet).to_dict()
    assert json.loads(json.dumps(values))["calls_by_branch"] == values["calls_by_branch"] == {"0": 2, "1": 1, "2": 1}
