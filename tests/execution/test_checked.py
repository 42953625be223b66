"""A program held against its graph, once: what agrees goes on alone, what does not is refused or replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deepcache_fx.errors import CompileError
from deepcache_fx.execution.checked import Checked

X = torch.ones(4)


class Counting:
    """Gives its input times a factor, and an integer; counts its calls."""

    def __init__(self, factor: float = 1.0, number: int = 3) -> None:
        self.factor, self.number, self.calls = factor, number, 0

    def __call__(self, x: torch.Tensor) -> Sequence[Any]:
        self.calls += 1
        return [x * self.factor, torch.tensor([self.number]), None]


def test_a_program_that_agrees_is_called_alone_from_then_on() -> None:
    program, reference = Counting(1 + 1e-6), Counting()
    checked = Checked(program, reference, "fp32", 1)
    for _ in range(3):
        checked(X)
    assert (program.calls, reference.calls) == (3, 1)
    assert checked.error == pytest.approx(1e-6, rel=0.1)
    assert checked.refused is None


@pytest.mark.parametrize("program", [Counting(1.001), Counting(number=4), Counting(float("nan"))])
def test_one_that_does_not_is_refused_or_replaced(program: Counting) -> None:
    checked = Checked(program, Counting(), "fp32", 1)
    for _ in range(2):
        with pytest.raises(CompileError, match=r"in fp32 is .* off what its graph gives: take another backend"):
            checked(X)
    checked = Checked(program, Counting(), "fp32", 1, may_fall_back=True)
    with pytest.warns(UserWarning, match="off what its graph gives, so the graph runs as it is"):
        assert torch.equal(checked(X)[0], X)
    assert torch.equal(checked(X)[0], X)
    assert checked.refused is not None


def test_precision_and_half_precision_values_have_their_tolerances() -> None:
    assert Checked(Counting(1.1), Counting(), "bf16", 1)(X)[0][0] == pytest.approx(1.1)
    Checked(Counting(1.01), Counting(), "fp32", 1)(X.half())


def test_the_error_is_that_of_the_outputs_and_what_is_cached_counts_for_the_check() -> None:
    def gives(error: float) -> Any:
        return lambda x: [x, x * (1 + error)]

    checked = Checked(gives(1e-5), gives(0.0), "fp32", 1)
    checked(X)
    assert checked.error == 0.0
    with pytest.raises(CompileError):
        Checked(gives(1e-2), gives(0.0), "fp32", 1)(X)


def test_rounding_of_values_that_are_next_to_nothing_is_no_error() -> None:
    tiny = Checked(lambda x: [x * 1e-9], lambda x: [x * 2e-9], "fp32", 1)
    assert tiny(X)[0][0] == pytest.approx(1e-9)
    empty = Checked(lambda x: [x[:0]], lambda x: [x[:0]], "fp32", 1)
    empty(X)
    assert empty.error == 0.0
