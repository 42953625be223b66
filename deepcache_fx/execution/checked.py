"""A program of another compiler, held against the graph that it was made of: once, on its first inputs.

Converters have errors that raise nothing (OpenVINO 2026.4 divides negative integers downwards wrongly, and takes the
variance with another correction). One step of the graph run by PyTorch is the price of knowing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcache_fx.errors import CompileError

TOLERANCE = {"fp32": 1e-4, "bf16": 0.3}
"""Of the relative L2 error, by the precision that the program computes in."""

HALF_TOLERANCE = 2e-2
"""Of values in half precision, which differ in their rounding."""

_SMALL = 1e-3
"""Values smaller than this count as of this size."""


@dataclass
class Checked:
    """A program that may be in the place of `reference`, if what it gives is the same.

    Where it is not, the first call raises a CompileError; or, where `may_fall_back`, it warns, and that call and those
    to come are the reference's.
    """

    program: Callable[..., Sequence[Any]]
    reference: Callable[..., Sequence[Any]]
    precision: str
    num_outputs: int
    """Of what it returns the first are a step's outputs, the others are cached."""
    may_fall_back: bool = False
    error: float | None = None
    """The largest relative L2 error of the outputs at the first call."""
    refused: str | None = None
    """Why the reference runs instead."""

    def __call__(self, *tensors: torch.Tensor) -> Sequence[Any]:
        if self.error is not None:
            return self.program(*tensors)
        leaves, expected = self.program(*tensors), self.reference(*tensors)
        errors = [_error(leaf, right) for leaf, right in zip(leaves, expected, strict=True)]
        wrong = [error for error, right in zip(errors, expected, strict=True) if not error <= self._tolerance(right)]
        self.error = max(errors[: self.num_outputs], default=0.0)
        if not wrong:
            return leaves
        reason = f"a program of OpenVINO in {self.precision} is {wrong[0]:.1e} off what its graph gives"
        if not self.may_fall_back:
            self.error = None
            raise CompileError(f"{reason}: take another backend")
        self.refused, self.program, self.error = reason, self.reference, 0.0
        warnings.warn(f"{reason}, so the graph runs as it is", stacklevel=2)
        return expected

    def _tolerance(self, right: Any) -> float:
        is_half = isinstance(right, torch.Tensor) and right.dtype in (torch.float16, torch.bfloat16)
        return max(TOLERANCE[self.precision], HALF_TOLERANCE if is_half else 0.0)


def _error(value: Any, right: Any) -> float:
    """Relative, by L2 norms; of what is not of a floating type 0 where equal, else infinite."""
    if not isinstance(right, torch.Tensor):
        return 0.0 if value == right else torch.inf
    if not right.is_floating_point():
        return 0.0 if torch.equal(value, right) else torch.inf
    norm = right.double().norm().clamp_min(_SMALL * right.numel() ** 0.5)
    return float((value.double() - right.double()).norm() / norm) if right.numel() else 0.0
