"""What the published implementation does where conditioning changes between the calls of a run, measured.

Each loop runs three times over the same small UNet: without a cache, with `DeepCacheSDHelper` unmodified, and with one
operand of one concatenation replaced by that of the last full call *of the same conditioning* (`CatOracle`), which is
what caching should be. Errors are L2 norms of the difference of the latents to the run without a cache, relative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from DeepCache import DeepCacheSDHelper

from tests import models, small
from tests.oracles import CatOracle, published

STEPS, INTERVAL, CHANGE = 9, 3, 4
Calls = Callable[[int], Sequence[tuple[int, ...]]]
"""The UNet calls of a step: each a batch of conditionings by number, 0 the unconditional one."""
Forward = Callable[[int, tuple[int, ...], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Predicts the noise: step, conditionings, latents, timestep, embeddings."""


def embeddings() -> torch.Tensor:
    return torch.randn(3, 12, models.TEXT, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def denoise(pipe: Any, calls: Calls, forward: Forward) -> list[torch.Tensor]:
    """Latents after each step, with guidance wherever a step has the unconditional prediction too."""
    context = embeddings()
    pipe.scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    result = []
    for step, t in enumerate(pipe.scheduler.timesteps):
        noise: dict[int, torch.Tensor] = {}
        for batch in calls(step):
            predicted = forward(step, batch, x.expand(len(batch), -1, -1, -1), t, context[list(batch)])
            noise.update(zip(batch, predicted.split(1), strict=True))
        wanted = noise[max(noise)]
        guided = noise[0] + 5 * (wanted - noise[0]) if 0 in noise else wanted
        x = pipe.scheduler.step(guided, t, x).prev_sample
        result.append(x)
    return result


def as_it_is(pipe: Any) -> Forward:
    return lambda step, batch, x, t, context: pipe.unet(x, t, context).sample


def by_conditioning(pipe: Any) -> Forward:
    """A cache for each conditioning, full at every third step and where a conditioning has none."""
    own, oracles = pipe.unet.forward, {}

    def forward(
        step: int, batch: tuple[int, ...], x: torch.Tensor, t: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        full = step % INTERVAL == 0 or batch not in oracles
        oracle = oracles.setdefault(batch, CatOracle(own, 0))
        result: torch.Tensor = oracle(full, x, t, context).sample
        return result

    return forward


def errors(calls: Calls) -> tuple[list[float], list[float]]:
    """Of the published code and of a cache for each conditioning, after each step."""
    pipe = small.pipeline()
    plain = denoise(pipe, calls, as_it_is(pipe))
    right = denoise(pipe, calls, by_conditioning(pipe))
    with published(pipe, INTERVAL, 0):
        theirs = denoise(pipe, calls, as_it_is(pipe))
    return _errors(theirs, plain), _errors(right, plain)


def _errors(latents: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(latents, plain, strict=True)]


def unconditional_dropped(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)] if step < CHANGE else [(1,)]


def order_swapped(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)] if step < CHANGE else [(1,), (0,)]


def prompt_swapped(step: int) -> Sequence[tuple[int, ...]]:
    return [(1,)] if step < CHANGE else [(2,)]


def batch_split(step: int) -> Sequence[tuple[int, ...]]:
    return [(0, 1)] if step < CHANGE else [(0,), (1,)]


def batch_joined(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)] if step < CHANGE else [(0, 1)]


def heun(pipe: Any) -> Any:
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe
