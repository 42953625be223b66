"""Two independent implementations of DeepCache to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

TO_THE_BIT: dict[str, Any] = {"backend": "eager", "disable": "all", "forecast": 0}
"""Arguments of `optimize` with which it is the published method: the cached feature is repeated, and the captured
operators run as they are, in their order."""

REPEATING: dict[str, Any] = {"backend": "eager", "forecast": 0}
"""The published method with the default passes and rates: sums are taken in another order."""


def agree(actual: torch.Tensor, expected: torch.Tensor, options: dict[str, Any]) -> bool:
    """Equal with the first of these options, within 1e-5 relative (L2 norms) with the others."""
    if options is TO_THE_BIT:
        return torch.equal(actual, expected)
    return bool((actual - expected).norm() <= 1e-5 * expected.norm())


@contextmanager
def published(pipe: Any, interval: int, branch: int) -> Iterator[None]:
    """The published implementation, unmodified, switched on for the length of a block."""
    from DeepCache import DeepCacheSDHelper  # here, for ComfyUI's tests need the other oracle alone

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def specified(pipe: Any, full_steps: set[int], branch: int, per_step: int = 1) -> Iterator[None]:
    """The pipeline's UNet runs eagerly with the operand replaced, full at exactly these calls.

    Of several calls in a step, each has an operand of its own.
    """
    oracles = [CatOracle(pipe.unet.forward, branch) for _ in range(per_step)]
    calls = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return oracles[(calls - 1) % per_step](calls - 1 in full_steps, *args, **kwargs)

    pipe.unet.forward = forward
    try:
        yield
    finally:
        del pipe.unet.forward


class CatOracle:
    """Runs the module itself, eagerly, replacing one operand of one `torch.cat` by the one of the last full step.

    For models the published code cannot run. `branch` counts the two-operand channel concatenations of feature maps
    from the last one executed; the deep operand is the first in every model tested.
    """

    def __init__(self, forward: Callable[..., Any], branch: int) -> None:
        self.forward = forward
        self.branch = branch
        self.count: int | None = None
        self.cached: torch.Tensor | None = None

    def __call__(self, full: bool, *args: Any, **kwargs: Any) -> Any:
        cat = torch.cat
        if self.count is None:
            self.count = self._count(cat, args, kwargs)
        position = self.count - 1 - self.branch
        seen = 0

        def replacing(tensors: Sequence[torch.Tensor], dim: int = 0, **rest: Any) -> torch.Tensor:
            nonlocal seen
            if joins_channels(tensors, dim):
                if seen == position:
                    if full:
                        self.cached = tensors[0].clone()
                    assert self.cached is not None
                    tensors = [self.cached, tensors[1]]
                seen += 1
            return cat(tensors, dim=dim, **rest)

        with mock.patch("torch.cat", replacing), torch.no_grad():
            return self.forward(*args, **kwargs)

    def _count(self, cat: Callable[..., Any], args: Any, kwargs: Any) -> int:
        count = 0

        def counting(tensors: Sequence[torch.Tensor], dim: int = 0, **rest: Any) -> torch.Tensor:
            nonlocal count
            count += joins_channels(tensors, dim)
            return cat(tensors, dim=dim, **rest)

        with mock.patch("torch.cat", counting), torch.no_grad():
            self.forward(*args, **kwargs)
        return count


def joins_channels(tensors: Sequence[torch.Tensor], dim: int) -> bool:
    """True for a concatenation of two feature maps on the channel axis."""
    return len(tensors) == 2 and tensors[0].ndim >= 4 and dim == 1
