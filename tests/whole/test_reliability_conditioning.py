"""What the published implementation does where conditioning changes between the calls of a run, measured.

Every implementation is asked for its predictions at the same latents, timesteps and embeddings: without a cache, with
`DeepCacheSDHelper` unmodified, and with one operand of one concatenation replaced by that of the last full call *of the
same conditioning* (`CatOracle`), which is what caching should be. The UNet has cross-attention in its deep half
alone, so what a shallow call knows of its text is in the feature that it reads.
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
BOOST = 16
Calls = Callable[[int], Sequence[tuple[int, ...]]]
"""The UNet calls of a step: each a batch of conditionings by number, 0 the unconditional one."""
Forward = Callable[[int, tuple[int, ...], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Predicts the noise: step, conditionings, latents, timestep, embeddings."""


def embeddings() -> torch.Tensor:
    return torch.randn(3, 12, models.TEXT, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predict(pipe: Any, calls: Calls, forward: Forward) -> list[dict[int, torch.Tensor]]:
    """The noise of each step, by conditioning."""
    context = embeddings()
    pipe.scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(1)
    x, drift = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    result: list[dict[int, torch.Tensor]] = []
    for step, t in enumerate(pipe.scheduler.timesteps):
        x = x + 0.1 * drift
        result.append({})
        for batch in calls(step):
            predicted = forward(step, batch, x.expand(len(batch), -1, -1, -1), t, context[list(batch)])
            result[-1].update(zip(batch, predicted.split(1), strict=True))
    return result


def pipeline() -> Any:
    """Random weights hardly listen to the text: here cross-attention says much more."""
    pipe = small.pipeline()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                parameter.mul_(BOOST)
    return pipe


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


def published_predictions(calls: Calls) -> list[dict[int, torch.Tensor]]:
    pipe = pipeline()
    with published(pipe, INTERVAL, 0):
        return predict(pipe, calls, as_it_is(pipe))


def right_predictions(calls: Calls) -> list[dict[int, torch.Tensor]]:
    pipe = pipeline()
    return predict(pipe, calls, by_conditioning(pipe))


Predictions = Sequence[dict[int, torch.Tensor]]


def errors(calls: Calls, step: int, conditioning: int, *predictions: Predictions) -> tuple[float, ...]:
    """To the prediction without a cache, relative (L2 norms)."""
    pipe = pipeline()
    plain = predict(pipe, calls, as_it_is(pipe))[step][conditioning]
    return tuple(float((each[step][conditioning] - plain).norm() / plain.norm()) for each in predictions)


def told(theirs: float, right: float) -> Any:
    """As docs/reliability.md tells it."""
    return pytest.approx((theirs, right), abs=0.01)


def two_calls(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)]


def unconditional_dropped(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)] if step < CHANGE else [(1,)]


def unconditional_last_and_dropped(step: int) -> Sequence[tuple[int, ...]]:
    return [(1,), (0,)] if step < CHANGE else [(1,)]


def order_swapped(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)] if step < CHANGE else [(1,), (0,)]


def prompt_swapped(step: int) -> Sequence[tuple[int, ...]]:
    return [(1,)] if step < CHANGE else [(2,)]


def batch_split(step: int) -> Sequence[tuple[int, ...]]:
    return [(0, 1)] if step < CHANGE else [(0,), (1,)]


def batch_joined(step: int) -> Sequence[tuple[int, ...]]:
    return [(0,), (1,)] if step < CHANGE else [(0, 1)]


def test_guidance_as_two_calls_is_no_guidance_in_the_published_codes_shallow_steps() -> None:
    """Both calls read the feature of the one that came last."""
    theirs, right = published_predictions(two_calls), right_predictions(two_calls)
    for step in range(STEPS):
        assert torch.equal(theirs[step][0], theirs[step][1]) == (step % INTERVAL > 0)
        assert not torch.equal(right[step][0], right[step][1])
        assert torch.equal(theirs[step][1], right[step][1])
    assert errors(two_calls, 4, 0, theirs, right) == told(0.41, 0.04)


def test_the_published_code_goes_on_with_the_last_calls_feature_when_one_is_dropped() -> None:
    """The right one by chance, where the unconditional call came first; its own before it is dropped is wrong."""
    theirs, right = published_predictions(unconditional_dropped), right_predictions(unconditional_dropped)
    assert all(torch.equal(theirs[step][1], right[step][1]) for step in range(STEPS))
    calls = unconditional_last_and_dropped
    theirs, right = published_predictions(calls), right_predictions(calls)
    assert [torch.equal(theirs[step][1], right[step][1]) for step in range(STEPS)] == [
        step % INTERVAL == 0 or step > 6 for step in range(STEPS)
    ]
    assert errors(calls, CHANGE, 1, theirs, right) == told(0.41, 0.04)


def test_the_published_code_gives_either_call_the_others_feature_when_their_order_changes() -> None:
    """The unconditional call has the conditional one's feature before, the conditional one the other's afterwards."""
    theirs, right = published_predictions(order_swapped), right_predictions(order_swapped)
    for conditioning in (0, 1):
        wrong = [s for s in range(STEPS) if not torch.equal(theirs[s][conditioning], right[s][conditioning])]
        assert wrong == ([1, 2, 4, 5] if conditioning == 0 else [7, 8])
    assert errors(order_swapped, 7, 1, theirs, right) == told(0.40, 0.05)


def test_the_published_code_stays_with_the_old_prompt_until_the_next_full_step() -> None:
    def the_old_one(step: int) -> Sequence[tuple[int, ...]]:
        return [(1,)]

    theirs, old = published_predictions(prompt_swapped), published_predictions(the_old_one)
    for step in range(CHANGE, STEPS):
        assert torch.equal(theirs[step][2], old[step][1]) == (step < 6)
    right = right_predictions(prompt_swapped)
    assert errors(prompt_swapped, CHANGE, 2, theirs, right) == told(0.46, 0.0)
    assert errors(prompt_swapped, CHANGE + 1, 2, theirs, right) == told(0.46, 0.06)


@pytest.mark.parametrize("calls", [batch_split, batch_joined])
def test_the_published_code_fails_when_two_conditionings_are_batched_otherwise(calls: Calls) -> None:
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        published_predictions(calls)


def test_the_published_code_leaves_a_closure_in_a_skipped_block_what_the_last_full_step_left_there() -> None:
    """No FakeTensor, which there is no capture to leave; but the map is not of this step."""
    pipe, seen = pipeline(), []
    middle = pipe.unet.mid_block
    own = middle.forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden)
        return own(hidden, *args, **kwargs)

    middle.forward = forward
    with published(pipe, INTERVAL, 0):
        predict(pipe, lambda step: [(1,)], as_it_is(pipe))
    assert len(seen) == STEPS // INTERVAL
    assert all(type(tensor) is torch.Tensor for tensor in seen)


def test_the_published_code_cannot_be_told_the_steps_of_heun() -> None:
    """It looks the timestep up in the pipeline's scheduler: of two calls with one timestep it sees the first."""
    assert not {"begin", "step"} & set(dir(DeepCacheSDHelper))
    pipe, full, call = pipeline(), [], 0
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    middle = pipe.unet.mid_block
    own = middle.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        full.append(call)
        return own(*args, **kwargs)

    middle.forward = forward
    context = embeddings()[1:2]
    with published(pipe, INTERVAL, 0), torch.no_grad():
        pipe.scheduler.set_timesteps(6)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        for call, t in enumerate(pipe.scheduler.timesteps):  # noqa: B007 - `forward` reads it
            x = pipe.scheduler.step(pipe.unet(pipe.scheduler.scale_model_input(x, t), t, context).sample, t, x)[0]
        assert full == [0, 3, 4, 9, 10]  # of calls that repeat timesteps; every third is [0, 3, 6, 9]
        with pytest.raises(ValueError, match="not in list"):  # a sampler of one's own, with a timestep of its own
            pipe.unet(x, torch.tensor(123.4), context)
