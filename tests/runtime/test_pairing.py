"""How a ControlNet's outputs are found among a UNet's inputs, and which call of a step is which."""

from __future__ import annotations

import torch

from deepcache_fx.controlnet.deferred import Deferral, DeferredTensor
from deepcache_fx.runtime.pairing import Expectation, PrecomputedInputs, pair

SOURCE = object()
A, B, C = (torch.full((2,), float(i)) for i in range(3))
X = torch.zeros(2)


def test_the_very_tensors_are_found_wherever_they_are() -> None:
    pairing = pair(PrecomputedInputs(SOURCE, (A, B, C)), [X, C, A, B], [X, C, A, B], reads={0, 2})
    assert pairing is not None
    assert pairing.source is SOURCE
    assert pairing.read == {0}
    assert dict(pairing.places) == {1: 2, 3: 1}
    assert dict(pairing.unread) == {1: B, 2: C}


def test_equal_tensors_are_not_the_same() -> None:
    assert pair(PrecomputedInputs(SOURCE, (A, B)), [X, A.clone(), B], [X, A, B], reads={0}) is None


def test_an_output_that_goes_elsewhere_is_none_of_ours_to_leave_out() -> None:
    assert pair(PrecomputedInputs(SOURCE, (A, B)), [X, A], [X, A], reads={0}) is None
    assert pair(PrecomputedInputs(SOURCE, (A, None)), [X, A], [X, A], reads={0}) is None
    assert pair(None, [X, A], [X, A], reads={0}) is None


def test_an_output_that_is_given_twice_is_read_if_one_of_the_places_is() -> None:
    pairing = pair(PrecomputedInputs(SOURCE, (A, B)), [A, A, B], [A, A, B], reads={1})
    assert pairing is not None
    assert pairing.read == {0}
    assert dict(pairing.places) == {2: 1}


def test_only_what_is_deferred_is_replaced_and_only_where_nothing_reads_it() -> None:
    deferral = Deferral(lambda _: [A, B, C])
    pairing = pair(PrecomputedInputs(SOURCE, (A, B, C)), [X, A, B, C], [X, A, B, C], reads={0, 1})
    assert pairing is not None
    later = [torch.ones(2), DeferredTensor(A, deferral, 1), DeferredTensor(B, deferral, 2), torch.ones(2)]
    found = pairing.inputs(later)
    assert found[0] is later[0]
    assert found[1] is later[1]  # read: to be computed
    assert found[2] is B
    assert found[3] is later[3]


def test_calls_of_a_step_are_numbered_and_a_run_begins_at_nought() -> None:
    expected = Expectation()
    assert [expected.next_call(0, step) for step in (0, 0, 1, 1, 1, 2)] == [0, 1, 0, 1, 2, 0]
    assert expected.next_call(1, 2) == 0
    expected.precomputed[0] = PrecomputedInputs(SOURCE, (A,))
    expected.begin()
    assert not expected.precomputed
    assert expected.runs == 1
