"""Every scheduler of diffusers that drives a UNet: which of its calls are full, against a written specification.

The specification: a step ends where the scheduler's `step` returns, a run begins at `set_timesteps`, and steps 0, N,
2N, ... are full. How many UNet calls a run of n steps has is in the table below. That the calls are what they are said
to be shows in the latents, equal to the bit to those of a UNet in which one operand is replaced as specified.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch

import deepcache_fx
from tests.compvis import CompVisUNet
from tests.families import family
from tests.oracles import TO_THE_BIT, CatOracle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(diffusers|numpy)")

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS = {**BETAS, "use_karras_sigmas": True}


class Row(NamedTuple):
    scheduler: str
    config: dict[str, Any] = BETAS
    calls: Callable[[int], int] = lambda n: n
    """UNet calls, each ended by one `step`, of a run of n steps."""
    fewest: int = 1
    """Steps that it works with."""
    needs: str = ""
    """A package that diffusers wants for it."""


def repeated(n: int) -> int:
    """Second order: every step but the last calls the UNet twice, and each call is ended by a `step`."""
    return 2 * n - 1


def plms(n: int) -> int:
    """The second timestep comes twice."""
    return n + 1 if n > 1 else 1


def runge_kutta(n: int) -> int:
    """Three steps of four calls each, at the timesteps of three PLMS steps."""
    return n + 9


ROWS = {
    "ddim": Row("DDIMScheduler"),
    "ddim v-prediction, zero snr": Row(
        "DDIMScheduler",
        {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "ddim parallel": Row("DDIMParallelScheduler"),
    "ddim inverse": Row("DDIMInverseScheduler"),
    "ddpm": Row("DDPMScheduler"),
    "ddpm parallel": Row("DDPMParallelScheduler"),
    "pndm, plms only": Row("PNDMScheduler", {**BETAS, "skip_prk_steps": True}, plms),
    "pndm, runge-kutta first": Row("PNDMScheduler", BETAS, runge_kutta, fewest=4),
    "ipndm": Row("IPNDMScheduler", {"num_train_timesteps": 1000}),
    "lms": Row("LMSDiscreteScheduler", needs="scipy"),
    "lms karras": Row("LMSDiscreteScheduler", KARRAS, needs="scipy"),
    "euler": Row("EulerDiscreteScheduler"),
    "euler v-prediction": Row("EulerDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    "euler karras": Row("EulerDiscreteScheduler", KARRAS),
    "euler exponential": Row("EulerDiscreteScheduler", {**BETAS, "use_exponential_sigmas": True}),
    "euler beta": Row("EulerDiscreteScheduler", {**BETAS, "use_beta_sigmas": True}, needs="scipy"),
    "euler continuous, as stable video diffusion": Row(
        "EulerDiscreteScheduler",
        {
            **KARRAS,
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    "euler ancestral": Row("EulerAncestralDiscreteScheduler"),
    "heun": Row("HeunDiscreteScheduler", BETAS, repeated),
    "heun karras": Row("HeunDiscreteScheduler", KARRAS, repeated),
    "kdpm2": Row("KDPM2DiscreteScheduler", BETAS, repeated),
    "kdpm2 karras": Row("KDPM2DiscreteScheduler", KARRAS, repeated),
    "kdpm2 ancestral": Row("KDPM2AncestralDiscreteScheduler", BETAS, repeated),
    "dpm++ 1": Row("DPMSolverMultistepScheduler", {**BETAS, "solver_order": 1}),
    "dpm++ 2m": Row("DPMSolverMultistepScheduler"),
    "dpm++ 3m": Row("DPMSolverMultistepScheduler", {**BETAS, "solver_order": 3}),
    "dpm++ 2m karras": Row("DPMSolverMultistepScheduler", KARRAS),
    "dpm++ 2m lambdas": Row("DPMSolverMultistepScheduler", {**BETAS, "use_lu_lambdas": True}),
    "dpm++ 2m sde": Row("DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2m sde karras": Row("DPMSolverMultistepScheduler", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2m inverse": Row("DPMSolverMultistepInverseScheduler"),
    "dpm++ 2s": Row("DPMSolverSinglestepScheduler"),
    "dpm++ 3s karras": Row("DPMSolverSinglestepScheduler", {**KARRAS, "solver_order": 3, "lower_order_final": True}),
    "dpm++ sde": Row("DPMSolverSDEScheduler", {**BETAS, "noise_sampler_seed": 0}, repeated, needs="torchsde"),
    "cosine dpm++": Row("CosineDPMSolverMultistepScheduler", {}, needs="torchsde"),
    "deis": Row("DEISMultistepScheduler"),
    "deis karras": Row("DEISMultistepScheduler", KARRAS),
    "unipc": Row("UniPCMultistepScheduler"),
    "unipc 3 karras": Row("UniPCMultistepScheduler", {**KARRAS, "solver_order": 3}),
    "sa-solver": Row("SASolverScheduler"),
    "unclip": Row("UnCLIPScheduler", {}, fewest=2),
    "lcm": Row("LCMScheduler"),
    "tcd": Row("TCDScheduler"),
    "edm euler": Row("EDMEulerScheduler", {}),
    "edm dpm++ 2m": Row("EDMDPMSolverMultistepScheduler", {}),
    "consistency model": Row("CMStochasticIterativeScheduler", {}),
}
"""Left out: what drives no UNet that predicts noise (flow matching, VQ diffusion, video transformers)."""

REPRESENTATIVES = (
    "ddim",
    "pndm, plms only",
    "pndm, runge-kutta first",
    "euler ancestral",
    "heun karras",
    "dpm++ 2m",
    "dpm++ 2s",
    "unclip",
    "lcm",
    "edm euler",
)
"""One of each kind of loop: single calls, repeated timesteps, second order, several steps at once, other timesteps."""


class UNet(CompVisUNet):
    """Called with a 0-d timestep, as diffusers' pipelines do."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return super().forward(sample, timestep.reshape(-1).expand(sample.shape[0]), context)


class Pipe:
    """All of a pipeline that `optimize` looks at."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler


@pytest.fixture(scope="module", params=["pipeline", "bare UNet"])
def unet(request: pytest.FixtureRequest) -> UNet:
    """One for all rows: whatever ran before must not show."""
    unet = UNet()
    unet.pipeline_is_given = request.param == "pipeline"
    return unet


@pytest.fixture(params=family(ROWS, *REPRESENTATIVES))
def row(request: pytest.FixtureRequest) -> Row:
    row = ROWS[request.param]
    if row.needs and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"diffusers needs {row.needs} for {row.scheduler}")
    return row


def make(row: Row, **changes: Any) -> Any:
    return getattr(diffusers, row.scheduler)(**{**row.config, **changes})


@torch.no_grad()
def denoise(
    model: Callable[..., torch.Tensor],
    scheduler: Any,
    skip: int = 0,
    stop: int | None = None,
    form: Callable[[torch.Tensor], Any] = lambda t: t,
) -> torch.Tensor:
    """The loop of a diffusers pipeline, over what `set_timesteps` has left: from timestep `skip` to before `stop`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    context = torch.randn(1, 3, 6, generator=generator)
    seeded = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if skip and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skip)
    for t in scheduler.timesteps[skip:stop]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, form(t), context), t, x, **seeded).prev_sample
    assert x.isfinite().all()
    return x


def optimized(unet: UNet, scheduler: Any, interval: int) -> Pipe:
    """The pipeline or the UNet alone is what `optimize` is given; programs captured before are kept."""
    pipe = Pipe(unet, scheduler)
    deepcache_fx.optimize(pipe if unet.pipeline_is_given else unet, interval, **TO_THE_BIT)
    return pipe


def specified(scheduler: Any, full: Callable[[int], bool], **loop: Any) -> torch.Tensor:
    """The latents that the specification asks for."""
    oracle, calls = CatOracle(UNet().forward, branch=0), 0

    def model(*args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return oracle(full(calls - 1), *args)

    return denoise(model, scheduler, **loop)


def check(unet: UNet, scheduler: Any, interval: int, calls: int, begin: Callable[[Any], object], **loop: Any) -> None:
    """One run, full at every `interval`-th of exactly `calls` calls, with the latents that this gives."""
    plain = type(scheduler).from_config(scheduler.config)
    begin(plain)
    expected = specified(plain, lambda call: call % interval == 0, **loop)
    pipe = optimized(unet, scheduler, interval)
    begin(scheduler)
    actual = denoise(pipe.unet, scheduler, **loop)  # the pipeline is held: its UNet would not keep it
    assert deepcache_fx.report(unet).last_run == "".join("s" if i % interval else "F" for i in range(calls))
    assert torch.equal(actual, expected)


def test_every_nth_step_is_full(unet: UNet, row: Row) -> None:
    for interval in (2, 3):
        check(unet, make(row), interval, row.calls(7), lambda s: s.set_timesteps(7))


def test_a_change_of_the_number_of_steps_is_followed_also_after_an_interrupted_run(unet: UNet, row: Row) -> None:
    """One scheduler object, as a pipeline has: 5 steps, 9 abandoned after 4 calls, 4 steps."""
    scheduler = make(row)
    check(unet, scheduler, 3, row.calls(5), lambda s: s.set_timesteps(5))
    check(unet, scheduler, 3, 4, lambda s: s.set_timesteps(9), stop=4)
    check(unet, scheduler, 3, row.calls(4), lambda s: s.set_timesteps(4))


def test_an_interval_beyond_the_number_of_steps_leaves_one_full_step(unet: UNet, row: Row) -> None:
    check(unet, make(row), 50, row.calls(4), lambda s: s.set_timesteps(4))


def test_runs_of_a_single_step_are_full(unet: UNet, row: Row) -> None:
    """Without a scheduler nothing tells three such runs from three calls of one step: full all the same."""
    if row.fewest > 1:
        pytest.skip(f"{row.scheduler} wants at least {row.fewest} steps")
    plain, scheduler = make(row), make(row)
    plain.set_timesteps(1)
    expected = specified(plain, lambda call: True)
    pipe = optimized(unet, scheduler, 3)
    before = deepcache_fx.report(unet)
    for _ in range(3):
        scheduler.set_timesteps(1)
        assert torch.equal(denoise(pipe.unet, scheduler), expected)
    after = deepcache_fx.report(unet)
    assert after.full_calls - before.full_calls == 3 * row.calls(1)
    assert after.shallow_calls == before.shallow_calls


@pytest.mark.parametrize(
    "name",
    family(
        [
            "ddim",
            "ddpm",
            "pndm, plms only",
            "euler",
            "euler ancestral",
            "heun karras",
            "kdpm2",
            "dpm++ 2m",
            "unipc",
            "lcm",
        ],
        "ddim",
        "heun karras",
    ),
)
def test_strength_windows_in_turn_begin_at_their_own_first_step(unet: UNet, name: str) -> None:
    """Image to image: the last part of the timesteps, another part at each call."""
    scheduler = make(ROWS[name])
    calls = ROWS[name].calls(10)
    order = scheduler.order
    for strength in (0.3, 1.0, 0.6, 0.3):
        skip = (10 - int(10 * strength)) * order
        check(unet, scheduler, 3, calls - skip, lambda s: s.set_timesteps(10), skip=skip)


DESCENDING = [999, 900, 850, 500, 499, 498, 20, 1]  # steps of every length, as no spacing has


@pytest.mark.parametrize(
    "name", family(["ddpm", "euler", "heun", "dpm++ 2m", "dpm++ 2s", "lcm", "tcd"], "ddpm", "heun")
)
def test_timesteps_of_ones_own_are_steps_whatever_their_distance(unet: UNet, name: str) -> None:
    row = ROWS[name]
    check(unet, make(row), 3, row.calls(len(DESCENDING)), lambda s: s.set_timesteps(timesteps=DESCENDING))


@pytest.mark.parametrize("name", ["euler", "edm euler"])
def test_sigmas_of_ones_own_are_steps(unet: UNet, name: str) -> None:
    given: Any = [14.6, 9.0, 8.9, 3.0, 0.5, 0.4, 0.03, 0.0]
    if name == "edm euler":  # places on the ramp of its sigmas
        given = torch.tensor([0.0, 0.1, 0.15, 0.5, 0.6, 0.9, 1.0])
    check(unet, make(ROWS[name]), 3, 7, lambda s: s.set_timesteps(sigmas=given))


VALUES = {
    "number": lambda t: t.item(),
    "0-d tensor": lambda t: t.clone(),
    "one a sample": lambda t: t.repeat(1),
}
"""Forms in which a timestep is its bare value: nothing tells where in the timesteps it stands."""


@pytest.mark.parametrize("form", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(
    "name",
    family(["ddim", "ddim inverse", "euler", "euler karras", "dpm++ 2m karras", "unipc"], "euler karras"),
)
def test_timesteps_given_by_value_are_steps(unet: UNet, name: str, form: Callable[[torch.Tensor], Any]) -> None:
    """Values that rise (an inversion) are understood at the second step: one more is full."""
    late = name == "ddim inverse"
    scheduler, plain = make(ROWS[name]), make(ROWS[name])
    full = {0, 1, 4, 7} if late else {0, 3, 6}
    pipe = optimized(unet, scheduler, 3)
    deepcache_fx.reset(unet)  # a bare value that falls could go on from the run before
    for s in (scheduler, plain):
        s.set_timesteps(8)
    before = deepcache_fx.report(unet)
    assert torch.equal(denoise(pipe.unet, scheduler, form=form), specified(plain, lambda call: call in full))
    after = deepcache_fx.report(unet)
    assert (after.full_calls - before.full_calls, after.shallow_calls - before.shallow_calls) == (
        len(full),
        8 - len(full),
    )


def test_rising_timesteps_given_by_value_keep_the_number_of_steps_that_the_scheduler_told() -> None:
    """A schedule over the whole run, on an inversion."""
    scheduler, unet = make(ROWS["ddim inverse"]), UNet()
    pipe = deepcache_fx.optimize(Pipe(unet, scheduler), schedule=deepcache_fx.Power(3, center=2), **TO_THE_BIT)
    scheduler.set_timesteps(8)
    denoise(pipe.unet, scheduler, form=lambda t: t.item())
    assert deepcache_fx.report(unet).shallow_calls > 0


@pytest.mark.parametrize("name", family(["heun", "kdpm2", "pndm, plms only"], "heun"))
def test_a_timestep_that_is_repeated_by_value_is_never_shallower_than_specified(unet: UNet, name: str) -> None:
    """A bare value twice may be a second call of one step or a second step: taken for whichever is full."""
    scheduler, plain = make(ROWS[name]), make(ROWS[name])
    for s in (scheduler, plain):
        s.set_timesteps(6)
    pipe = optimized(unet, scheduler, 3)
    deepcache_fx.reset(unet)
    before = deepcache_fx.report(unet).full_calls
    scheduler.set_timesteps(6)
    ages: list[int] = []

    def model(x: torch.Tensor, t: Any, context: torch.Tensor) -> torch.Tensor:
        was = deepcache_fx.report(unet).full_calls
        out = pipe.unet(x, t, context)
        ages.append(0 if deepcache_fx.report(unet).full_calls > was else ages[-1] + 1)
        return out

    actual = denoise(model, scheduler, form=lambda t: t.item())
    assert max(ages) <= 2
    assert len(ages) == ROWS[name].calls(6)
    assert deepcache_fx.report(unet).full_calls - before == ages.count(0)
    if unet.pipeline_is_given:
        assert torch.equal(actual, specified(plain, lambda call: call % 3 == 0))


@pytest.mark.parametrize(
    "name", family(["heun", "kdpm2 karras", "pndm, plms only", "pndm, runge-kutta first", "dpm++ 2m"], "kdpm2 karras")
)
def test_guidance_in_two_calls_keeps_a_cache_each_also_where_timesteps_repeat(unet: UNet, name: str) -> None:
    """Two calls of batch one equal one call of batch two."""
    row = ROWS[name]
    unconditional = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(9))
    together, apart = make(row), make(row)

    def guided(model: Callable[..., torch.Tensor], at_once: bool) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            if at_once:
                first, second = model(x.repeat(2, 1, 1, 1), t, torch.cat([unconditional, context])).chunk(2)
            else:
                first, second = model(x, t, unconditional), model(x, t, context)
            return first + 3 * (second - first)

        return call

    pipe = optimized(unet, together, 3)
    together.set_timesteps(7)
    expected = denoise(guided(pipe.unet, True), together)
    assert deepcache_fx.report(unet).last_run == "".join("s" if i % 3 else "F" for i in range(row.calls(7)))
    pipe = optimized(unet, apart, 3)
    apart.set_timesteps(7)
    actual = denoise(guided(pipe.unet, False), apart)
    assert deepcache_fx.report(unet).last_run == "".join("ss" if i % 3 else "FF" for i in range(row.calls(7)))
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
def test_steps_that_correct_before_they_predict_have_a_cache_for_each_call(unet: UNet) -> None:
    """ScoreSdeVe: `step_correct` twice at a timestep, then `step_pred`; `step` is never called."""

    def run(model: Callable[..., torch.Tensor], scheduler: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(6)
        scheduler.set_sigmas(6)
        x = torch.randn(1, 4, 8, 8, generator=generator) * 0.5
        context = torch.randn(1, 3, 6, generator=generator)
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i].repeat(1)
            for _ in range(2):
                x = scheduler.step_correct(model(x, sigma, context), x, generator=generator).prev_sample
            x = scheduler.step_pred(model(x, sigma, context), t, x, generator=generator).prev_sample
        return x

    oracles, calls = [CatOracle(UNet().forward, branch=0) for _ in range(3)], 0

    def model(*args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return oracles[(calls - 1) % 3]((calls - 1) // 3 % 3 == 0, *args)

    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=10.0)
    expected = run(model, scheduler)
    pipe = optimized(unet, scheduler, 3)
    if not unet.pipeline_is_given:
        deepcache_fx.reset(unet)
    actual = run(pipe.unet, scheduler)
    report = deepcache_fx.report(unet)
    if unet.pipeline_is_given:
        assert report.last_run == "FFFssssss" * 2
        assert torch.equal(actual, expected)
    else:  # the calls of a step differ in their samples: more are full, none is stale
        assert report.last_run.count("s") <= 12
        assert actual.isfinite().all()


def test_a_schedule_over_the_run_counts_the_calls_that_a_strength_leaves(unet: UNet) -> None:
    """Power spreads its full steps over the run that there is, not over all timesteps."""
    scheduler = make(ROWS["ddim"])
    schedule = deepcache_fx.Power(3, power=1.4, center=2)
    pipe = Pipe(unet, scheduler)
    deepcache_fx.optimize(pipe if unet.pipeline_is_given else unet, schedule=schedule, **TO_THE_BIT)
    for steps, skip in ((20, 0), (20, 8), (12, 0)):
        scheduler.set_timesteps(steps)
        denoise(unet, scheduler, skip=skip)
        left = steps - skip
        full = schedule.full_steps(left)
        assert deepcache_fx.report(unet).last_run == "".join("F" if i in full else "s" for i in range(left))
