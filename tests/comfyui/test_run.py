"""Which evaluations of a run are full, and whether it is forecast."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyui.run import Run, are_uneven, draws_noise
from deepcache_fx import Power, ScheduleError, Steps
from tests.families import examples

SIGMAS = tuple(float(value) for value in range(12, -1, -1))


def trace(run: Run, sigmas: tuple[float, ...]) -> str:
    """The run's decisions at these sigmas."""
    found = ""
    for sigma in sigmas:
        run.evaluation_begins(sigma if run.needs_sigma else None)
        found += "F" if run.is_full else "s"
    return found


def test_every_third_evaluation_is_full_and_no_sigma_is_asked_for() -> None:
    run = Run(3, SIGMAS)
    assert not run.needs_sigma
    assert trace(run, SIGMAS[:-1]) == "FssFssFssFss"
    assert trace(Run(1, SIGMAS), SIGMAS[:-1]) == "F" * 12


def test_outside_of_its_window_every_evaluation_is_full() -> None:
    assert trace(Run(3, SIGMAS, high=9.0, low=4.0), SIGMAS[:-1]) == "FFFssFssFFFF"


def test_a_schedule_is_asked_for_the_steps_of_the_sampler() -> None:
    assert trace(Run(3, SIGMAS, schedule=Steps([0, 5, 9])), SIGMAS[:-1]) == "FssssFsssFss"
    power = Power(3)
    assert trace(Run(3, SIGMAS, schedule=power), SIGMAS[:-1]).count("F") == len(power.full_steps(12))


def test_of_a_full_step_with_two_evaluations_the_first_is_full() -> None:
    heun = tuple(sigma for pair in pairwise(SIGMAS[:5]) for sigma in pair)
    assert trace(Run(3, SIGMAS[:5], schedule=Steps([0, 2])), heun) == "FssFssss"


def test_a_schedule_for_another_number_of_steps_is_refused() -> None:
    class OfTwenty(Steps):
        def is_full(self, step: int, num_steps: int | None) -> bool:
            raise ScheduleError("calibrated for 20 steps")

    with pytest.raises(ScheduleError, match="20 steps"):
        Run(3, SIGMAS, schedule=OfTwenty([0])).evaluation_begins(12.0)


@given(st.integers(1, 9), st.integers(1, 60), st.floats(0, 5), st.floats(5, 13))
@examples(40)
def test_a_run_begins_full_and_features_are_never_older_than_the_interval(
    interval: int, evaluations: int, low: float, high: float
) -> None:
    sigmas = tuple(12 * (1 - step / evaluations) for step in range(evaluations + 1))
    found = trace(Run(interval, sigmas, low=low, high=high), sigmas[:-1])
    assert found[0] == "F"
    assert all(len(shallow) < interval for shallow in found.split("F"))


def function(name: str, **options: float) -> SimpleNamespace:
    called = lambda: None  # noqa: E731
    called.__name__ = name
    return SimpleNamespace(sampler_function=called, extra_options=options)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (function("sample_euler"), False),
        (function("sample_dpmpp_2m"), False),
        (function("sample_unipc"), False),
        (function("sample_euler_ancestral"), True),
        (function("sample_dpmpp_2m_sde"), True),
        (function("sample_lcm"), True),
        (function("sample_euler", s_churn=0.5), True),
        (function("sample_euler_ancestral", eta=0.0), False),
        (SimpleNamespace(), True),  # who does not tell
    ],
)
def test_samplers_that_draw_noise_are_known(sampler: object, expected: bool) -> None:
    assert draws_noise(sampler) is expected


def test_steps_are_uneven_where_the_longest_is_twice_the_shortest() -> None:
    assert not are_uneven([999, 750, 500, 250, 0])
    assert are_uneven([999, 700, 300, 100, 50, 0])
    assert not are_uneven([999, 0])
