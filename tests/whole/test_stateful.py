"""Any sequence of runs, interruptions and changes, on two threads: every run gives what the specification gives.

The model of what must come out is a plain UNet in which one operand is replaced as the schedule says, from the first
step of each run: it knows no history. `DEEPCACHE_FX_EXAMPLES=2000 pytest tests/whole/test_stateful.py` tries that many
sequences instead of the 4 of `make test` and the 15 of `make test-all`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import deepcache_fx
from deepcache_fx.runtime.attach import runtime_of
from tests.compvis import CompVisUNet
from tests.families import examples
from tests.oracles import TO_THE_BIT, CatOracle

EXAMPLES = int(os.environ.get("DEEPCACHE_FX_EXAMPLES", "0"))
STEPS = st.integers(1, 7)
SIZES = st.sampled_from([8, 8, 8, 12])
SEEDS = st.integers(0, 3)


class Interrupted(Exception):
    pass


class Pipe:
    """All of a pipeline that `optimize` looks at."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet, self.scheduler = unet, diffusers.DDIMScheduler()


@torch.no_grad()
def denoising(
    models: list[Callable[..., torch.Tensor]],
    scheduler: Any,
    steps: int,
    seed: int,
    size: int,
    stop: int | None = None,
    smaller: int | None = None,
) -> Iterator[torch.Tensor]:
    """A run, step by step: at each, one UNet call for each of `models`; the batch is halved at step `smaller`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, size, size, generator=generator)
    contexts = [torch.randn(2, 3, 6, generator=generator) for _ in models]
    scheduler.set_timesteps(steps)
    for index, t in enumerate(scheduler.timesteps):
        if index == smaller:
            x = x[:1]
        calls = zip(models, contexts, strict=True)
        noise = [model(x, t.expand(len(x)), context[: len(x)].contiguous()) for model, context in calls]
        if index == stop:
            raise Interrupted
        x = scheduler.step(sum(noise) / len(noise), t, x).prev_sample
        yield x


def denoise(*args: Any, **kwargs: Any) -> torch.Tensor:
    """A whole run."""
    return list(denoising(*args, **kwargs))[-1]


class Runs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.unet, self.plain = CompVisUNet(), CompVisUNet()
        self.pipe, self.another_pipe = Pipe(self.unet), Pipe(self.unet)
        self.other_thread = ThreadPoolExecutor(1)
        self.other_thread.submit(torch.set_num_threads, torch.get_num_threads()).result()
        self.thread = 0
        self.interval: int | None = None

    def teardown(self) -> None:
        self.other_thread.shutdown()

    def here(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On the thread of the moment: each keeps what its last run left."""
        return (
            self.other_thread.submit(function, *args, **kwargs).result() if self.thread else function(*args, **kwargs)
        )

    def wanted(self, steps: int, calls: int, smaller: int | None = None, **loop: Any) -> tuple[torch.Tensor, str]:
        """The latents and the trace that the specification gives."""
        scheduler = diffusers.DDIMScheduler()
        if self.interval is None:
            return denoise([self.plain] * calls, scheduler, steps, smaller=smaller, **loop), ""
        full = {step for step in range(steps) if step % self.interval == 0 or step == smaller}

        def model() -> Callable[..., torch.Tensor]:
            oracle, step = CatOracle(self.plain.forward, branch=0), itertools.count()
            return lambda *args: oracle(next(step) in full, *args)

        latents = denoise([model() for _ in range(calls)], scheduler, steps, smaller=smaller, **loop)
        return latents, "".join(calls * ("F" if step in full else "s") for step in range(steps))

    def check(self, steps: int, calls: int = 1, **loop: Any) -> None:
        latents, trace = self.wanted(steps, calls, **loop)
        assert torch.equal(self.here(denoise, [self.unet] * calls, self.pipe.scheduler, steps, **loop), latents)
        if self.interval is not None:
            assert self.here(deepcache_fx.report, self.unet).last_run == trace

    @initialize()
    def begin(self) -> None:
        self.optimize(3, whole=True)

    # What a user does.

    @rule(steps=STEPS, seed=SEEDS, size=SIZES)
    def run(self, steps: int, seed: int, size: int) -> None:
        self.check(steps, seed=seed, size=size)

    @rule(steps=STEPS, seed=SEEDS)
    def run_with_two_calls_a_step(self, steps: int, seed: int) -> None:
        self.check(steps, 2, seed=seed, size=8)

    @rule(steps=st.integers(2, 7), seed=SEEDS, data=st.data())
    def run_with_a_batch_that_changes(self, steps: int, seed: int, data: st.DataObject) -> None:
        self.check(steps, seed=seed, size=8, smaller=data.draw(st.integers(1, steps - 1)))

    @rule(steps=st.tuples(STEPS, STEPS), seeds=st.tuples(SEEDS, SEEDS))
    def run_on_both_threads_in_turn(self, steps: tuple[int, int], seeds: tuple[int, int]) -> None:
        """A step here, a step there; one has more of them than the other."""
        runs = [
            (thread, denoising([self.unet], pipe.scheduler, count, seed, 8))
            for thread, (pipe, count, seed) in enumerate(zip((self.pipe, self.another_pipe), steps, seeds, strict=True))
        ]
        results: list[list[torch.Tensor]] = [[], []]
        before = self.thread
        for _ in range(max(steps)):
            for self.thread, run in runs:
                results[self.thread] += [x for x in [self.here(next, run, None)] if x is not None]
        self.thread = before
        for result, count, seed in zip(results, steps, seeds, strict=True):
            assert len(result) == count
            assert torch.equal(result[-1], self.wanted(count, 1, seed=seed, size=8)[0])

    @rule(steps=STEPS, calls=st.integers(1, 2), size=SIZES, data=st.data())
    def interrupt(self, steps: int, calls: int, size: int, data: st.DataObject) -> None:
        """Between a UNet call and the scheduler's step."""
        stop = data.draw(st.integers(0, steps - 1))
        with pytest.raises(Interrupted):
            self.here(denoise, [self.unet] * calls, self.pipe.scheduler, steps, 9, size, stop)

    @precondition(lambda self: self.interval is not None and deepcache_fx.report(self.unet).captures)
    @rule()
    def call_with_nonsense(self) -> None:
        inputs = torch.ones(2, 3, 8, 8), torch.tensor([1, 1]), torch.ones(2, 3, 6)
        with pytest.raises(deepcache_fx.DeepCacheError), torch.no_grad():
            self.here(torch.no_grad()(self.unet), *inputs)

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def change_weights_in_place(self, factor: float) -> None:
        with torch.no_grad():
            for model in (self.unet, self.plain):
                model.middle_block[0].in_layers[2].weight.mul_(factor)
                model.out[2].weight.mul_(1 / factor)

    @rule()
    def replace_a_parameter(self) -> None:
        for model in (self.unet, self.plain):
            model.out[2].bias = torch.nn.Parameter(model.out[2].bias.detach() + 0.1, requires_grad=False)

    @rule(interval=st.integers(1, 4), whole=st.booleans())
    def optimize(self, interval: int, whole: bool) -> None:
        """Or change the interval, on the pipeline or the bare UNet."""
        for target in (self.pipe, self.another_pipe) if whole else (self.unet,):
            deepcache_fx.optimize(target, interval, **TO_THE_BIT)
        self.interval = interval

    @rule()
    def restore(self) -> None:
        deepcache_fx.restore(self.pipe)
        self.interval = None

    @rule()
    def reset(self) -> None:
        if self.interval is not None:
            self.here(deepcache_fx.reset, self.unet)

    @rule()
    def replace_the_scheduler(self) -> None:
        self.pipe.scheduler = diffusers.DDIMScheduler()

    @rule()
    def switch_thread(self) -> None:
        self.thread = 1 - self.thread

    @invariant()
    def attached_where_it_is_on(self) -> None:
        assert (runtime_of(self.unet) is None) == (self.interval is None)
        assert isinstance(self.unet, CompVisUNet)
        assert list(self.unet.state_dict()) == list(self.plain.state_dict())


@pytest.mark.hypothesis
def test_after_any_history_every_run_is_as_specified() -> None:
    run_state_machine_as_test(
        Runs,
        settings=examples(
            EXAMPLES or 4,
            EXAMPLES or 15,
            stateful_step_count=8,
            derandomize=not EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )
