"""Schedules: which steps are full."""

import ast
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcache_fx.errors import BranchError, DeepCacheError, ScheduleError
from deepcache_fx.schedules.patterns import Custom, Nested, Power, Steps, Uniform, Window, as_schedule
from tests.families import examples


@cache
def published_function() -> Callable[..., tuple[list[int], float]]:
    """`sample_from_quad_center` as published. Its module no longer imports with today's diffusers."""
    spec = importlib.util.find_spec("DeepCache")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "sd", "pipeline_stable_diffusion.py").read_text()
    [node] = [n for n in ast.parse(source).body if getattr(n, "name", "") == "sample_from_quad_center"]
    scope: dict[str, Any] = {"np": np}
    exec(compile(ast.Module([node], []), "published", "exec"), scope)
    return scope["sample_from_quad_center"]


def published(num_steps: int, interval: int, center: int, power: float) -> list[int] | None:
    """The published indices; None where the published code finds no schedule."""
    count = num_steps // interval + (num_steps % interval != 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        try:
            indices, _ = published_function()(num_steps, count, center=center, pow=power)
        except ValueError:
            return None
    return sorted(int(i) for i in indices)


def test_uniform_is_full_at_every_nth_step() -> None:
    assert Uniform(3).full_steps(10) == [0, 3, 6, 9]
    assert Uniform(1).full_steps(4) == [0, 1, 2, 3]
    assert Uniform(20).full_steps(10) == [0]


def test_power_matches_the_indices_in_the_published_readme_setting() -> None:
    assert Power(5, power=1.4, center=15).full_steps(50) == published(50, 5, 15, 1.4)


@examples(60)
@given(
    num_steps=st.integers(2, 250),
    interval=st.integers(2, 20),
    center=st.integers(0, 120),
    power=st.sampled_from([1.1, 1.2, 1.3, 1.4, 1.5, 2.0]),
)
def test_power_equals_the_published_formula(num_steps: int, interval: int, center: int, power: float) -> None:
    expected = published(num_steps, interval, center, power)
    schedule = Power(interval, power=power, center=center)
    if expected is None:
        with pytest.raises(ScheduleError, match="smaller center"):
            schedule.full_steps(num_steps)
    else:
        assert schedule.full_steps(num_steps) == [i for i in expected if i < num_steps]


def test_power_without_the_number_of_steps_says_what_to_do() -> None:
    assert Power(3).is_full(0, None)
    with pytest.raises(ScheduleError, match=r"Power\(interval=3.*number of denoising steps.*pipeline"):
        Power(3).is_full(1, None)


def test_steps_always_holds_step_zero() -> None:
    assert Steps([7, 5, 5]).full_steps(10) == [0, 5, 7]


def test_a_function_of_step_or_of_step_and_number_is_a_schedule() -> None:
    assert Custom(lambda step: step in (2, 3)).full_steps(5) == [0, 2, 3]
    assert as_schedule(lambda step, num_steps: step == num_steps - 1).full_steps(5) == [0, 4]


def test_a_callable_object_need_not_be_hashable() -> None:
    @dataclass
    class Every:
        interval: int

        def __call__(self, step: int) -> bool:
            return step % self.interval == 0

    assert as_schedule(Every(2)).full_steps(5) == [0, 2, 4]
    assert as_schedule(Every(2)) == as_schedule(Every(2)) != as_schedule(Every(3))


@pytest.mark.parametrize("bad", [0, -1, 2.5, "3", True, None])
def test_an_interval_that_is_no_positive_integer_is_refused_by_name(bad: object) -> None:
    with pytest.raises(ScheduleError, match=r"interval must be .*1"):
        Uniform(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Steps([-1]),
        lambda: Steps([1.5]),
        lambda: Power(3, power=1.0),
        lambda: Power(3, center=-1),
        lambda: as_schedule("often"),
        lambda: as_schedule(Power),
    ],
)
def test_malformed_schedules_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DeepCacheError):
        make()


def test_schedule_imports_no_torch() -> None:
    code = (
        "import importlib.util, sys, types; pkg = types.ModuleType('deepcache_fx'); "
        "spec = importlib.util.find_spec('deepcache_fx'); pkg.__path__ = spec.submodule_search_locations; "
        "sys.modules['deepcache_fx'] = pkg; import deepcache_fx.schedules.patterns; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_window_is_full_outside_and_counts_from_its_start() -> None:
    assert Window(2, 8, Uniform(3)).full_steps(11) == [0, 1, 2, 5, 8, 9, 10]
    assert Window(2, -1, Uniform(4)).full_steps(10) == [0, 1, 2, 6, 9]
    assert Window(0, None, Uniform(3)).full_steps(7) == Uniform(3).full_steps(7)
    assert Window(3, None, Steps([2])).full_steps(8) == [0, 1, 2, 3, 5]
    assert Window(4, 8).full_steps(3) == [0, 1, 2]


def test_a_window_passes_its_own_length_on() -> None:
    inner = Power(3, power=1.4, center=4)
    window = Window(5, 25, inner)
    assert window.full_steps(30) == [*range(5), *(5 + step for step in inner.full_steps(20)), *range(25, 30)]
    assert window.needs_num_steps
    assert not Window(1, 5).needs_num_steps


def test_a_window_that_makes_no_sense_is_refused() -> None:
    for arguments in ((-1,), (3, 2), (1.5,), (0, "end"), (0, None, "inner")):
        with pytest.raises(ScheduleError):
            Window(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="needs the number of denoising steps"):
        Window(0, -1).is_full(3, None)


def test_nested_steps_begin_where_the_last_schedule_says() -> None:
    schedule = Nested(6, {1: 3, (1, 0): Steps([4, 9])})
    assert schedule.full_steps(13) == [0, 6, 12]
    assert schedule.branches == (1, (1, 0))
    found = [None if schedule.is_full(n, 13) else schedule.branch_at(n, 13) for n in range(13)]
    assert found == [None, None, None, 1, (1, 0), None, None, None, None, (1, 0), None, None, None]
    assert schedule == Nested(Uniform(6), [(1, Uniform(3)), ([1, 0], Steps([9, 4]))])
    assert not schedule.needs_num_steps
    assert Nested(6, {2: Power(3)}).needs_num_steps


def test_nested_schedules_nest() -> None:
    schedule = Nested(Nested(8, {1: 2}), {3: 4})
    assert schedule.branches == (3, 1)
    assert [schedule.branch_at(n, None) for n in (1, 2, 4)] == [None, 1, 3]


@examples(30)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(10, 40))
def test_a_window_hands_its_inner_steps_on(start: int, interval: int, deeper: int, num_steps: int) -> None:
    inner = Nested(interval, {2: deeper})
    schedule = Window(start, -1, inner)
    for step in range(start, num_steps - 1):
        assert schedule.is_full(step, num_steps) == inner.is_full(step - start, None) or step == start
        assert schedule.branch_at(step, num_steps) == inner.branch_at(step - start, None)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Nested(3, {}), "deeper must name at least one"),
        (lambda: Nested(6, 3), r"deeper must map skip connections to schedules, as in \{3: 3\}, got 3"),
        (lambda: Nested(6, [1, 2]), "deeper must map skip connections"),
        (lambda: Nested(3, {-1: 2}), "branch must be a number of at least 0"),
        (lambda: Nested(3, [(1, 2), (1, 3)]), "names a skip connection twice"),
        (lambda: Nested(3, {1: 0}), "interval must be at least 1"),
        (lambda: Nested("3", {1: 2}), "schedule must be Uniform"),
    ],
)
def test_nested_schedules_that_make_no_sense_are_refused(make: Callable[[], Any], error: str) -> None:
    with pytest.raises((BranchError, ScheduleError), match=error):
        make()
