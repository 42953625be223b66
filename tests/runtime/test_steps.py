"""Which step a call belongs to, from every kind of evidence."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepcache_fx.runtime.steps import (
    MAX_CALLS_PER_STEP,
    MAX_VIEWS_PER_STEP,
    StepInfo,
    StepTracker,
    position_of,
    value_position,
)
from tests.families import examples


def feed(tracker: StepTracker, timesteps: list[torch.Tensor], samples: list[object] | None = None) -> list[StepInfo]:
    samples = samples or [object() for _ in timesteps]
    return [tracker.observe(position_of(t), t, s) for t, s in zip(timesteps, samples, strict=True)]


def places(infos: list[StepInfo]) -> list[tuple[int, int]]:
    return [(info.step, info.call) for info in infos]


def values(*numbers: float) -> list[torch.Tensor]:
    return [torch.tensor(n) for n in numbers]


def test_a_view_of_the_timesteps_is_placed_by_its_offset_and_no_value_is_read() -> None:
    timesteps = torch.tensor([999, 999, 500, 500, 1])  # repeated, as Heun's and PNDM's are
    assert places(feed(StepTracker(), list(timesteps))) == [(i, 0) for i in range(5)]
    assert [position_of(t).at for t in timesteps] == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    assert position_of(timesteps[1].expand(4)).at == 1  # type: ignore[union-attr]
    assert position_of(timesteps[1].reshape(1)).at == 1  # type: ignore[union-attr]


def test_a_view_tells_how_many_steps_are_left() -> None:
    timesteps = torch.arange(20)
    info = feed(StepTracker(), [timesteps[5]])[0]
    assert info.num_steps == 15


def test_a_tensor_of_its_own_is_placed_by_its_value() -> None:
    infos = feed(StepTracker(), values(999, 500, 1))
    assert places(infos) == [(0, 0), (1, 0), (2, 0)]
    assert [t.num_steps for t in infos] == [None] * 3
    assert position_of(torch.tensor([7, 3])) == value_position(torch.tensor([7.0]))


def test_two_calls_with_one_timestep_belong_to_one_step() -> None:
    timesteps, samples = torch.tensor([999, 500, 1]), [object(), object(), object()]
    twice = [t for t in timesteps for _ in range(2)]
    infos = feed(StepTracker(), twice, [s for s in samples for _ in range(2)])
    assert places(infos) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [t.doubt for t in infos[1:]] == [None] * 5


def test_two_calls_with_different_samples_are_settled_by_one_full_step() -> None:
    """They may be guidance done as two calls, or an abandoned run and a new one: only the next step tells."""
    infos = feed(StepTracker(), [t for t in torch.tensor([999, 700, 400, 1]) for _ in range(2)])
    assert places(infos) == [(step, call) for step in range(4) for call in range(2)]
    assert [t.doubt is not None for t in infos] == [True, False, True, True, False, False, False, False]


def hooked(timesteps: list[torch.Tensor], num_steps: int) -> list[StepInfo]:
    """A scheduler whose `step` follows every call."""
    tracker, infos = StepTracker(), []
    tracker.run_announced(num_steps)
    for t in timesteps:
        infos += feed(tracker, [t])
        tracker.step_ended()
    return infos


@pytest.mark.parametrize("views", [2, MAX_CALLS_PER_STEP + 5])
def test_views_of_a_panorama_are_calls_of_a_step_although_the_scheduler_makes_a_step_for_each(views: int) -> None:
    infos = hooked([t for t in torch.tensor([999, 500, 1]) for _ in range(views)], 3)
    assert places(infos) == [(step, view) for step in range(3) for view in range(views)]
    assert [info.doubt for info in infos[1:]] == [None] * (3 * views - 1)
    assert places(hooked([torch.tensor(999)] * views, 1)) == [(0, view) for view in range(views)]


def test_with_more_views_than_can_be_told_apart_every_call_is_full() -> None:
    views = MAX_VIEWS_PER_STEP + 9
    infos = hooked([t for t in torch.tensor([999, 500, 1]) for _ in range(views)], 3)
    assert all(info.step == 0 or info.doubt for info in infos)


def test_a_bare_timestep_that_a_scheduler_repeats_is_a_step_of_its_own() -> None:
    assert places(hooked(values(999, 500, 500, 1), 4)) == [(step, 0) for step in range(4)]


def test_a_run_abandoned_after_its_first_step_leaves_nothing_to_the_next() -> None:
    tracker = StepTracker()
    feed(tracker, values(999))
    again = feed(tracker, values(999, 979, 959))
    assert again[1].doubt == "a repeated timestep may have begun a new run"
    assert again[2].doubt is None


def test_a_timestep_of_another_sequence_begins_a_run() -> None:
    tracker = StepTracker()
    feed(tracker, list(torch.arange(10))[:4])
    assert feed(tracker, [torch.arange(10)[6]])[0].new_run


def test_going_back_begins_a_run() -> None:
    tracker = StepTracker()
    timesteps = torch.arange(10)
    assert [t.new_run for t in feed(tracker, [timesteps[0], timesteps[1], timesteps[0], timesteps[1]])] == [
        True,
        False,
        True,
        False,
    ]
    assert [t.new_run for t in feed(StepTracker(), values(900, 800, 900, 800))] == [True, False, True, False]


def test_a_sequence_that_only_goes_back_is_followed_after_its_second_step() -> None:
    """DDIM inversion by value, or indexing the timesteps from the end."""
    assert [t.new_run for t in feed(StepTracker(), values(1, 20, 40, 60))] == [True, True, False, False]
    timesteps = torch.arange(5)
    infos = feed(StepTracker(), [timesteps[4 - i] for i in range(5)])
    assert [t.new_run for t in infos] == [True, True, False, False, False]


def test_a_jump_of_a_bare_value_begins_a_run() -> None:
    """Abandoned at 900, the next one (image to image) starts at 300."""
    infos = feed(StepTracker(), values(999, 950, 900, 300, 250))
    assert [t.new_run for t in infos] == [True, False, False, True, False]


def test_a_jump_within_one_timesteps_tensor_begins_a_run() -> None:
    """Abandoned after two steps; another image starts further down, as image to image does."""
    timesteps = torch.arange(20)
    infos = feed(StepTracker(), [timesteps[i] for i in (0, 1, 10, 11, 12)])
    # The second jump is the stride of one again: the price of following strided views.
    assert [t.new_run for t in infos] == [True, False, True, True, False]


def test_a_strided_or_reversed_view_tells_how_many_steps_are_left() -> None:
    strided = feed(StepTracker(), list(torch.arange(1000)[::50]))
    assert strided[2].num_steps == 19
    assert [t.new_run for t in strided] == [True, True, *[False] * 18]
    timesteps = torch.arange(20)
    assert feed(StepTracker(), [timesteps[19 - i] for i in range(20)])[5].num_steps == 19


def test_a_run_abandoned_between_the_calls_of_a_step_leaves_nothing_to_the_next() -> None:
    timesteps, tracker = torch.arange(10), StepTracker()
    samples = [object() for _ in range(5)]
    feed(tracker, [t for t in timesteps[:4] for _ in range(2)], [s for s in samples[:4] for _ in range(2)])
    feed(tracker, [timesteps[4]], [samples[4]])  # its second call never came
    assert feed(tracker, [timesteps[4]])[0].new_run


def test_a_reset_tracker_keeps_no_tensor_alive() -> None:
    tracker, sample = StepTracker(), torch.ones(1)
    feed(tracker, [torch.arange(5)[0]], [sample])
    alive = weakref.ref(sample)
    del sample
    assert alive() is not None
    tracker.reset()
    assert alive() is None


def test_a_nan_timestep_is_always_full() -> None:
    infos = feed(StepTracker(), values(999.0, float("nan"), float("nan"), 900.0))
    assert all(t.new_run for t in infos)


def test_the_scheduler_outranks_the_timestep() -> None:
    tracker = StepTracker()
    tracker.run_announced(3)
    same = torch.tensor(5)
    first = tracker.observe(position_of(same), same, object())
    tracker.step_ended()
    second = tracker.observe(position_of(same), same, object())
    third = tracker.observe(position_of(same), same, object())
    assert places([first, second, third]) == [(0, 0), (1, 0), (1, 1)]
    assert first.num_steps == 3
    assert third.doubt is None


def test_an_announced_run_begins_anew_wherever_the_last_one_stopped() -> None:
    timesteps = torch.arange(10)
    for stop in range(1, 10):
        tracker = StepTracker()
        tracker.run_announced(10)
        for t in timesteps[:stop]:
            tracker.observe(position_of(t), t, object())
            tracker.step_ended()
        tracker.run_announced(10)
        assert tracker.observe(position_of(timesteps[stop]), timesteps[stop], object()).new_run


def test_a_scheduler_that_steps_twice_a_call_counts_once() -> None:
    tracker = StepTracker()
    tracker.run_announced(4)
    steps = []
    for t in torch.arange(4):
        steps.append(tracker.observe(position_of(t), t, object()).step)
        tracker.step_ended()
        tracker.step_ended()
    assert steps == [0, 1, 2, 3]


def test_without_any_evidence_every_call_is_a_run() -> None:
    tracker = StepTracker()
    assert all(tracker.observe(None, None, object()).new_run for _ in range(4))


def test_a_value_is_wanted_only_where_nothing_else_tells() -> None:
    tracker = StepTracker()
    assert tracker.needs_value(None)
    assert not tracker.needs_value(position_of(torch.tensor(1)))
    tracker.run_announced(4)
    assert not tracker.needs_value(None)
    assert tracker.observe(None, None, object()).step == 0
    tracker.step_ended()
    assert tracker.observe(None, None, object()).step == 1


def test_a_timestep_that_never_changes_holds_a_bounded_number_of_calls() -> None:
    timesteps = torch.tensor([5, 5])
    infos = feed(StepTracker(), [timesteps[0]] * 100)
    assert max(t.call for t in infos) == MAX_CALLS_PER_STEP - 1


@examples(30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_after_any_history_an_announced_run_counts_from_zero(lengths: list[int], data: st.DataObject) -> None:
    tracker = StepTracker()
    for length in lengths:
        timesteps = torch.arange(length)
        tracker.run_announced(length)
        stop = data.draw(st.integers(1, length))
        infos = []
        for t in timesteps[:stop]:
            infos.append(tracker.observe(position_of(t), t, object()))
            tracker.step_ended()
        assert places(infos) == [(i, 0) for i in range(stop)]
        assert [t.new_run for t in infos] == [i == 0 for i in range(stop)]


@pytest.mark.parametrize("count", [1, 2, 50])
def test_bare_runs_over_new_timestep_tensors_count_from_zero(count: int) -> None:
    tracker = StepTracker()
    for _ in range(3):
        assert [t.step for t in feed(tracker, list(torch.arange(count).flip(0)))] == list(range(count))


def test_a_peek_says_what_the_next_call_turns_out_to_be() -> None:
    """Three runs: the second is announced, the third is known by its timesteps alone."""
    tracker = StepTracker()
    timesteps = torch.arange(90, -1, -10)
    for announced in (True, True, False):
        if announced:
            tracker.run_announced(10)
        for step, t in enumerate(timesteps):
            for call in range(2):
                sample = object()
                (info, told), (again, _) = (tracker.peek(position_of(t), sample) for _ in range(2))
                assert info == again == tracker.observe(position_of(t), t, sample)
                assert told
                assert (info.step, info.call, info.new_run) == (step, call, step == call == 0)
            tracker.step_ended()


def test_a_peek_says_where_no_scheduler_tells_the_step() -> None:
    tracker = StepTracker()
    t, after = torch.arange(90, -1, -10)[:2]
    tracker.observe(position_of(t), t, object())
    assert tracker.peek(position_of(after), object()) == (StepInfo(1, 0, 10), False)
