"""The search for a schedule, against made-up errors: where it begins, how it moves, when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcache_fx.calibration.search import Candidate, Search, starts, uniform
from deepcache_fx.errors import ScheduleError
from deepcache_fx.schedules.patterns import Power, Uniform
from tests.families import examples

STEPS = 12


def early(candidate: Candidate) -> float:
    """A made-up error: the squared distances to the last refresh, early ones counting more; order 1 halves it."""
    total = 0.0
    for step in range(STEPS):
        last = max(s for s in candidate.steps if s <= step)
        total += (step - last) ** 2 / (1 + step)
    return total * (1.0 if candidate.forecast == 1 else 2.0)


def counted(error: Callable[[Candidate], float], asked: list[Candidate]) -> Callable[[Candidate, float], float]:
    def measure(candidate: Candidate, limit: float) -> float:
        asked.append(candidate)
        value = error(candidate)
        return value if value <= limit else math.inf

    return measure


def least(count: int) -> float:
    """The lowest error there is with this many full steps."""
    return min(early(Candidate((0, *rest), 1)) for rest in combinations(range(1, STEPS), count - 1))


@pytest.mark.parametrize("count", range(1, STEPS))
def test_finds_the_best_of_all_schedules_where_small_moves_lead_there(count: int) -> None:
    asked: list[Candidate] = []
    found = Search(counted(early, asked), STEPS, (0, 1), trials=10**6).at_budget(count)
    assert len(found.steps) == count
    assert (found.steps[0], found.forecast) == (0, 1)
    assert early(found) == pytest.approx(least(count))
    assert all(len(candidate.steps) == count for candidate in asked)
    assert len(asked) == len(set(asked))  # nothing is judged twice


def test_is_never_worse_than_uniform_in_any_order_however_few_trials_there_are() -> None:
    for count in range(1, STEPS + 1):
        for trials in (1, 2, 3, 7):
            asked: list[Candidate] = []
            found = Search(counted(early, asked), STEPS, (0, 2, 1), trials).at_budget(count)
            assert early(found) <= min(early(Candidate(uniform(STEPS, count), order)) for order in (0, 1, 2))
            assert len(asked) <= max(trials, 3)


def test_an_order_that_is_only_better_in_the_end_is_found() -> None:
    def error(candidate: Candidate) -> float:
        bonus = 0.5 if candidate.forecast == 2 and candidate.steps != uniform(STEPS, 4) else 1.5
        return early(Candidate(candidate.steps, 1)) * (1.0 if candidate.forecast == 1 else bonus)

    found = Search(counted(error, []), STEPS, (1, 2), trials=10**6).at_budget(4)
    assert found.forecast == 2


def test_finds_the_fewest_full_steps_that_reach_an_error() -> None:
    for count in range(1, STEPS):
        target = least(count)
        found = Search(counted(early, []), STEPS, (0, 1), trials=10**6).at_error(target * (1 + 1e-9))
        assert (len(found.steps), early(found)) == (count, pytest.approx(target))


def test_a_target_is_kept_also_when_the_trials_run_out() -> None:
    target = 1.3 * least(6)
    lengths = []
    for trials in (1, 4, 8, 16, 1000):
        found = Search(counted(early, []), STEPS, (0, 1), trials).at_error(target)
        assert early(found) <= target
        lengths.append(len(found.steps))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == STEPS
    assert lengths[-1] <= 6


def test_an_error_below_that_of_full_steps_cannot_be_reached() -> None:
    search = Search(lambda candidate, limit: early(candidate) + 0.25, STEPS, (0,), trials=50)
    with pytest.raises(ScheduleError, match=r"error of 0\.1 cannot be reached: with every step full it is 0\.25"):
        search.at_error(0.1)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 50])
def test_every_start_has_as_many_full_steps_as_asked_for_and_the_first_is_uniform(num_steps: int) -> None:
    for count in range(1, num_steps + 1):
        found = starts(num_steps, count)
        assert found[0] == uniform(num_steps, count)
        assert len(found) == len(set(found))
        for steps in found:
            assert steps[0] == 0
            assert steps == tuple(sorted(set(steps)))
            assert len(steps) == count
            assert steps[-1] < num_steps


def test_the_published_schedules_are_among_the_starts() -> None:
    for interval in (2, 3, 5, 10):
        count = len(Uniform(interval).full_steps(50))
        assert uniform(50, count) == tuple(Uniform(interval).full_steps(50))
        assert tuple(Power(interval, center=15).full_steps(50)) in starts(50, count)
    assert uniform(50, 20) == tuple(index * 50 // 20 for index in range(20))  # no interval has twenty


def nested(candidate: Candidate) -> float:
    """A made-up error: of the last refresh of either kind, and a little of the last full step."""
    total = 0.0
    for step in range(STEPS):
        full = max(s for s in candidate.steps if s <= step)
        last = max(s for s in (*candidate.steps, *candidate.deeper) if s <= step)
        total += (step - last) ** 2 + 0.1 * (step - full)
    return total


@pytest.mark.parametrize("exchange", [0.4, 1.0, 3.0, 7.9])
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_gives_full_steps_for_deeper_ones_only_where_that_helps(count: int, exchange: float) -> None:
    asked: list[Candidate] = []
    search = Search(counted(nested, asked), STEPS, (0, 1), trials=10**6)
    plain = search.at_budget(count)
    found = search.deepen(plain, exchange)
    assert nested(found) <= nested(plain)
    assert len(found.deeper) <= exchange * (count - len(found.steps))
    assert not set(found.steps) & set(found.deeper)
    assert found.steps[0] == 0
    assert len(asked) == len(set(asked))
    if exchange > 1 and count > 1:
        assert found.deeper
        assert nested(found) < nested(plain)
        step = found.deeper[0]
        for moved in {step - 1, step + 1} - {*found.steps, *found.deeper, STEPS}:
            other = Candidate(found.steps, 1, tuple(moved if at == step else at for at in found.deeper))
            assert nested(found) <= nested(other)


def test_deeper_steps_need_a_forecast_and_keep_to_the_number_of_trials() -> None:
    for orders in ((0,), (0, 1)):
        asked: list[Candidate] = []
        search = Search(counted(nested, asked), STEPS, orders, trials=20)
        plain = search.at_budget(4)
        search.trials = len(asked) + 2
        found = search.deepen(plain, 3.0)
        assert len(asked) <= search.trials
        assert (found is plain) == (orders == (0,))


@examples(30)
@given(st.integers(2, 30), st.data())
def test_letters_tell_a_candidate(num_steps: int, data: st.DataObject) -> None:
    kinds = "F" + data.draw(st.text("Fst", min_size=num_steps - 1, max_size=num_steps - 1))
    assert Candidate.read(kinds, 1).letters(num_steps) == kinds
