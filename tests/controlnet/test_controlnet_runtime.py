"""A ControlNet beside an optimised UNet: the values of the whole network, whatever happens, and the work of little."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.controlnet.deferred import DeferredTensor
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.runtime.report import ControlNetReport
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.oracles import REPEATING, TO_THE_BIT, CatOracle, agree, specified
from tests.pipelines import CASES, Case, controlnet, one_controlnet
from tests.whole.test_pipelines import expected, trace

Residuals = tuple[list[torch.Tensor], torch.Tensor]


def controlnet_runtime(pipe: Any) -> ControlNetReport:
    [found] = deepcache_fx.report(pipe).companions
    return found


# Pipelines as diffusers has them. To the bit, with counts of the UNet: tests/whole/test_pipelines.py.


@pytest.mark.parametrize("options", family([TO_THE_BIT, REPEATING], TO_THE_BIT), ids=["bit", "default"])
@pytest.mark.parametrize(
    "name",
    family(
        ["one_controlnet", "several_controlnets", "controlnet_image_to_image", "controlnet_inpaint", "controlnet_xl"],
        "several_controlnets",
    ),
)
def test_a_controlnet_follows_the_schedule_of_its_unet(name: str, options: dict[str, Any]) -> None:
    """Three calls in turn: strengths, windows and sizes of a run change, and one capture serves."""
    case: Case = CASES[name]()
    oracle = [expected(case, run) for run in case.runs]
    deepcache_fx.optimize(case.pipe, 3, **options)
    for run, wanted in zip(case.runs, oracle, strict=True):
        assert agree(case(run), wanted, options)
        found, due = controlnet_runtime(case.pipe), trace(run)
        assert found.last_run == due
        [signature] = found.signatures
        assert signature.shallow_macs is not None
        assert signature.shallow_macs < (0.1 if options is REPEATING else 0.25) * signature.full_macs
        assert (signature.residuals, signature.shallow_residuals) == (5, 1)
        every_step = due.count("F") * signature.full_macs + due.count("s") * signature.shallow_macs
        assert found.last_run_macs == every_step + signature.prompt_macs  # the picture is embedded once
        assert found.last_run_macs_saved == run.calls * (signature.full_macs + signature.prompt_macs) - (
            every_step + signature.prompt_macs
        )
        assert (signature.prompt_macs > 0) == (options is REPEATING)
    assert found.captures == 1
    assert (found.completed_calls, found.original_calls, found.kept_full, found.refused) == (0, 0, {}, None)
    assert found.shallow_calls == sum(trace(run).count("s") for run in case.runs)


@thorough
def test_guess_mode_runs_it_whole_and_says_why() -> None:
    """There the pipeline joins residuals and zeros: other tensors reach the UNet."""
    case = CASES["guessing_controlnet"]()
    oracle = [expected(case, run) for run in case.runs]
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    traces = []
    for run, wanted in zip(case.runs, oracle, strict=True):
        assert torch.equal(case(run), wanted)
        assert deepcache_fx.report(case.pipe).last_run == trace(run)
        traces.append(controlnet_runtime(case.pipe).last_run)
    assert traces == ["FFFFFF", "FssFs", "FFFFFFF"]
    [(reason, count)] = controlnet_runtime(case.pipe).kept_full.items()
    assert "guess mode" in reason
    assert count == 4 + 4
    assert controlnet_runtime(case.pipe).completed_calls == 0


@thorough
def test_a_forecast_of_the_deep_feature_changes_nothing_for_it() -> None:
    """Equal to the same forecast with the ControlNet left alone."""
    case, alone = one_controlnet(), one_controlnet()
    deepcache_fx.optimize(case.pipe, 3, **{**TO_THE_BIT, "forecast": 1})
    deepcache_fx.optimize(alone.pipe.unet, 3, **{**TO_THE_BIT, "forecast": 1})
    for run in case.runs:
        assert torch.equal(case(run), alone(run))
    assert controlnet_runtime(case.pipe).shallow_calls == 13
    assert type(alone.pipe.controlnet) is ControlNetModel


@thorough
def test_a_deeper_branch_reads_more_residuals() -> None:
    case = one_controlnet()
    run = case.runs[0]
    with specified(case.pipe, {0, 3, 6}, 2):
        wanted = case(run)
    deepcache_fx.optimize(case.pipe, 3, branch=2, **TO_THE_BIT)
    assert torch.equal(case(run), wanted)
    [signature] = controlnet_runtime(case.pipe).signatures
    assert controlnet_runtime(case.pipe).last_run == "FssFssF"
    assert signature.shallow_residuals == 3


# A loop of our own, so that things may happen between the ControlNet and the UNet.


def passed_on(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
    return down, mid


@torch.no_grad()
def denoise(
    pipe: Any,
    between: Callable[[int, list[torch.Tensor], torch.Tensor, torch.Tensor], Residuals] = passed_on,
    *,
    steps: int = 7,
    seed: int = 0,
    text_of: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, text: text,
    turn: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pipe.scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text, picture = torch.randn(2, 12, 16, generator=generator), torch.rand(2, 3, 16, 16, generator=generator)
    for step, t in enumerate(pipe.scheduler.timesteps):
        turn()
        x = torch.cat([latents] * 2)
        down, mid = pipe.controlnet(
            x, t, encoder_hidden_states=text, controlnet_cond=picture, conditioning_scale=0.7, return_dict=False
        )
        down, mid = between(step, down, mid, x)
        noise = pipe.unet(
            x,
            t,
            encoder_hidden_states=text_of(step, text),
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        without, with_text = noise.chunk(2)
        latents = pipe.scheduler.step(without + 5 * (with_text - without), t, latents, return_dict=False)[0]
    return latents


_PIPE, _PLAIN = one_controlnet().pipe, one_controlnet().pipe


@pytest.fixture
def pipe() -> Any:
    """Captured once for all tests; each leaves it to the next one in the middle of things."""
    return deepcache_fx.optimize(_PIPE, 3, **TO_THE_BIT)


def plain(full_calls: set[int], *args: Any, **kwargs: Any) -> torch.Tensor:
    with specified(_PLAIN, full_calls, 0):
        return denoise(_PLAIN, *args, **kwargs)


def made_since(before: ControlNetReport, after: ControlNetReport) -> dict[str, int]:
    return {k: v - before.kept_full.get(k, 0) for k, v in after.kept_full.items() if v != before.kept_full.get(k, 0)}


def test_what_a_shallow_step_leaves_out_is_deferred(pipe: Any) -> None:
    seen: list[list[bool]] = []

    def note(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        seen.append([isinstance(tensor, DeferredTensor) for tensor in (*down, mid)])
        return down, mid

    assert torch.equal(denoise(pipe, note), plain({0, 3, 6}))
    whole, little = [False] * 5, [False, *[True] * 4]
    assert seen == [whole, little, little, whole, little, little, whole]
    assert controlnet_runtime(pipe).last_run == "FssFssF"


def test_a_step_forced_full_by_its_inputs_gets_every_residual(pipe: Any) -> None:
    """The UNet alone is given another number of tokens: the ControlNet has left its residuals out by then.

    The steps after it read the feature that this number of tokens has left.
    """

    def shorter(step: int, text: torch.Tensor) -> torch.Tensor:
        return text[:, :9] if step >= 1 else text

    assert torch.equal(denoise(pipe, text_of=shorter), plain({0, 1, 3, 6}, text_of=shorter))
    assert deepcache_fx.report(pipe).last_run == "FFsFssF"
    assert controlnet_runtime(pipe).last_run == "FcsFssF"


def test_a_run_forgotten_between_the_two_gets_every_residual(pipe: Any) -> None:
    def forget(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        if step == 1:
            deepcache_fx.reset(pipe)
        return down, mid

    before = controlnet_runtime(pipe).completed_calls
    assert torch.equal(denoise(pipe, forget), plain({0, 1, 4}))
    assert controlnet_runtime(pipe).completed_calls == before + 1
    assert torch.equal(denoise(pipe), plain({0, 3, 6}))
    assert controlnet_runtime(pipe).last_run == "FssFssF"


def test_the_models_own_forward_gets_every_residual(pipe: Any) -> None:
    def with_gradients(unet: Any) -> Callable[..., Any]:
        own = unet.forward

        def forward(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            with torch.set_grad_enabled(calls == 2):
                result = own(x, t, **kwargs)
            return [value.detach() for value in result]

        return forward

    calls, before = 0, controlnet_runtime(pipe).completed_calls
    pipe.unet.forward = with_gradients(pipe.unet)
    try:
        with pytest.warns(UserWarning, match="gradients"):
            found = denoise(pipe)
    finally:
        del pipe.unet.forward
    assert torch.equal(found, plain({0, 1, 2, 5}))
    assert controlnet_runtime(pipe).completed_calls == before + 1


def swapped(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
    return [down[1], down[0], *down[2:]], mid


def test_residuals_given_elsewhere_in_shallow_steps_alone_are_computed_where_they_are_read(pipe: Any) -> None:
    def between(step: int, *residuals: Any) -> Residuals:
        return (passed_on if step in (0, 3, 6) else swapped)(step, *residuals)

    assert not torch.equal(plain({0, 3, 6}, between), plain({0, 3, 6}))
    assert torch.equal(denoise(pipe, between), plain({0, 3, 6}, between))
    assert controlnet_runtime(pipe).last_run == "FccFccF"


def test_residuals_given_elsewhere_at_every_step_are_followed(pipe: Any) -> None:
    assert torch.equal(denoise(pipe, swapped), plain({0, 3, 6}, swapped))
    assert controlnet_runtime(pipe).last_run == "FssFssF"


def weaker(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
    return [value * 0.5 for value in down], mid * 0.5


def test_residuals_that_the_pipeline_makes_others_of_are_all_computed(pipe: Any) -> None:
    before = controlnet_runtime(pipe)
    assert torch.equal(denoise(pipe, weaker), plain({0, 3, 6}, weaker))
    assert controlnet_runtime(pipe).last_run == "FFFFFFF"
    [(reason, count)] = made_since(before, controlnet_runtime(pipe)).items()
    assert "other tensors" in reason
    assert count == 4


def test_a_pipeline_that_looks_at_residuals_in_shallow_steps_is_found_out_once(pipe: Any) -> None:
    seen: list[float] = []

    def look(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        seen.append(float(mid.abs().sum()))
        return down, mid

    before = controlnet_runtime(pipe)
    found, values = denoise(pipe, look), list(seen)
    seen.clear()
    assert torch.equal(found, plain({0, 3, 6}, look))
    assert values == seen
    assert controlnet_runtime(pipe).last_run == "FcFFFFF"
    assert list(made_since(before, controlnet_runtime(pipe)).values()) == [3]


def test_changes_in_place_reach_a_step_that_is_forced_full(pipe: Any) -> None:
    def change(optimized: bool) -> Callable[..., Residuals]:
        def between(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
            if step == 1:
                mid.mul_(3)
                down[3][0].add_(1)
                if optimized:
                    deepcache_fx.reset(pipe)
            return down, mid

        return between

    assert torch.equal(denoise(pipe, change(True)), plain({0, 1, 4}, change(False)))
    assert not torch.equal(plain({0, 1, 4}), plain({0, 1, 4}, change(False)))


def test_residuals_kept_for_later_steps_are_those_of_their_own_step(pipe: Any) -> None:
    def keeping() -> tuple[list[torch.Tensor], Callable[..., Residuals]]:
        kept: list[torch.Tensor] = []

        def between(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
            kept.append(mid)
            return down, (kept[1] if step == 3 else mid)

        return kept, between

    assert torch.equal(denoise(pipe, keeping()[1]), plain({0, 3, 6}, keeping()[1]))
    mids, between = keeping()
    plain({0, 3, 6}, between)
    with torch.no_grad():
        assert not torch.equal(mids[1], mids[3])


def test_what_cannot_be_computed_any_more_is_an_error_and_no_value(pipe: Any) -> None:
    kept: list[torch.Tensor] = []

    def keep(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        kept.append(mid)
        return down, mid

    def overwrite(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        if step == 1:
            x.add_(1)
            deepcache_fx.reset(pipe)
        return down, mid

    denoise(pipe, keep)
    denoise(pipe, steps=2)
    with pytest.raises(DeepCacheError, match=r"after its run: clone.*optimize\(pipe.unet\)"):
        kept[1] + 1
    with pytest.raises(DeepCacheError, match=r"changed in place.*optimize\(pipe.unet\)"):
        denoise(pipe, overwrite)
    assert torch.equal(denoise(pipe), plain({0, 3, 6}))


def test_a_setting_is_read_anew_in_a_run_that_nobody_announced(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same timesteps again, without `set_timesteps`; and after `reset` between the two networks."""

    def reorder(channels: str) -> None:
        for item in (pipe, _PLAIN):
            item.controlnet.register_to_config(controlnet_conditioning_channel_order=channels)

    def at(step: int, action: Callable[[], object]) -> Callable[..., Residuals]:
        def between(now: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
            if now == step:
                action()
            return down, mid

        return between

    denoise(pipe)
    own = type(pipe.scheduler).set_timesteps
    try:
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.scheduler), "set_timesteps", lambda *_: None)
            reorder("bgr")
            found = denoise(pipe)
            assert deepcache_fx.report(pipe).last_run == "FssFssF"
        assert type(pipe.scheduler).set_timesteps is own
        assert torch.equal(found, plain({0, 3, 6}))

        def change() -> None:
            reorder("rgb")
            deepcache_fx.reset(pipe)

        found = denoise(pipe, at(2, change))
        reorder("bgr")
        assert torch.equal(found, plain({0, 2, 5}, at(2, lambda: reorder("rgb"))))
    finally:
        reorder("rgb")


@pytest.mark.parametrize("step", family([0, 1, 3], 1))
def test_a_run_interrupted_between_the_two_leaves_nothing_behind(pipe: Any, step: int) -> None:
    def interrupt(at: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        if at == step:
            raise KeyboardInterrupt
        return down, mid

    with pytest.raises(KeyboardInterrupt):
        denoise(pipe, interrupt, seed=5)
    assert torch.equal(denoise(pipe), plain({0, 3, 6}))
    assert controlnet_runtime(pipe).last_run == "FssFssF"


@pytest.mark.parametrize("order", ["CUCU", "CCUU"])
def test_guidance_as_two_calls_has_residuals_for_each(pipe: Any, order: str) -> None:
    @torch.no_grad()
    def two_calls(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        pipe.scheduler.set_timesteps(5)
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        texts, picture = torch.randn(2, 1, 12, 16, generator=generator), torch.rand(1, 3, 16, 16, generator=generator)
        for t in pipe.scheduler.timesteps:
            residuals: list[Residuals] = []
            noise: list[torch.Tensor] = []
            for letter in order:
                if letter == "C":
                    text = texts[len(residuals)]
                    residuals.append(pipe.controlnet(latents, t, text, picture, 0.7, return_dict=False))
                    continue
                down, mid = residuals[len(noise)]
                kwargs = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
                noise.append(pipe.unet(latents, t, texts[len(noise)], **kwargs, return_dict=False)[0])
            latents = pipe.scheduler.step(2 * noise[1] - noise[0], t, latents, return_dict=False)[0]
        return latents

    assert torch.equal(two_calls(pipe), oracle_of_two_calls(two_calls))
    assert deepcache_fx.report(pipe).last_run == controlnet_runtime(pipe).last_run == "FFssssFFss"


def oracle_of_two_calls(run: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Each of a step's two calls has an operand of its own."""
    oracles, calls = [CatOracle(_PLAIN.unet.forward, 0) for _ in range(2)], 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return oracles[(calls - 1) % 2]((calls - 1) // 2 % 3 == 0, *args, **kwargs)

    _PLAIN.unet.forward = forward
    try:
        return run(_PLAIN)
    finally:
        del _PLAIN.unet.forward


def test_threads_that_take_turns_keep_to_their_own(pipe: Any) -> None:
    wanted = {seed: plain({0, 3, 6}, seed=seed) for seed in (0, 1)}
    barrier = threading.Barrier(2)
    found: dict[int, torch.Tensor] = {}
    traces: dict[int, str] = {}

    def run(seed: int) -> None:
        found[seed] = denoise(pipe, seed=seed, turn=lambda: barrier.wait(60))
        traces[seed] = controlnet_runtime(pipe).last_run

    threads = [threading.Thread(target=run, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in wanted)
    assert traces == {0: "FssFssF", 1: "FssFssF"}


def test_inference_mode_is_as_good(pipe: Any) -> None:
    def forget(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
        if step == 4:
            x_before = x.clone()
            x.add_(1)  # not counted: the inputs were kept
            deepcache_fx.reset(pipe)
            mid.add_(0)
            x.copy_(x_before)
        return down, mid

    with torch.inference_mode():
        assert torch.equal(denoise(pipe), plain({0, 3, 6}))
        assert controlnet_runtime(pipe).last_run == "FssFssF"
        assert torch.equal(denoise(pipe, forget), plain({0, 3, 4}))


def test_a_weight_changed_in_place_between_runs_is_seen(pipe: Any) -> None:
    captures = controlnet_runtime(pipe).captures
    with torch.no_grad():
        for network in (pipe.controlnet, _PLAIN.controlnet):
            network.controlnet_down_blocks[0].weight.mul_(1.25)
            network.controlnet_cond_embedding.conv_in.weight.mul_(0.75)
    assert torch.equal(denoise(pipe), plain({0, 3, 6}))
    assert controlnet_runtime(pipe).captures == captures


def test_the_report_says_what_was_saved(pipe: Any) -> None:
    denoise(pipe)
    report = deepcache_fx.report(pipe)
    [found] = report.companions
    values = json.loads(json.dumps(report.to_dict()))["companions"][0]
    assert (values["model"], values["last_run"]) == ("ControlNetModel", "FssFssF")
    assert values["last_run_macs_saved"] == found.last_run_macs_saved > 0
    text = str(report)
    assert "  ControlNetModel: " in text
    assert f"last run: FssFssF, {found.last_run_macs / 1e9:.3g} GMAC instead of" in text
    assert "(1 of 5 residuals)" in text


# Networks that cannot be followed.


class Unnamed(ControlNetModel):
    """Does not say what it takes."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(sample, *args, **kwargs)


class Looking(ControlNetModel):
    """Its Python code depends on a value: `torch.export` cannot follow it."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        if conditioning_scale == 0.0:
            return super().forward(sample, timestep, encoder_hidden_states, 0 * controlnet_cond, 1.0)
        return super().forward(
            sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale, return_dict=return_dict
        )


def test_a_network_that_cannot_be_captured_runs_as_it_is() -> None:
    case, alone = one_controlnet(), one_controlnet()
    for item in (case, alone):
        item.pipe.controlnet.__class__ = Looking
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    with pytest.warns(UserWarning, match="computes everything at each step: Looking could not be captured"):
        found = case(case.runs[0])
    with specified(alone.pipe, {0, 3, 6}, 0):
        assert torch.equal(found, alone(alone.runs[0]))
    report = controlnet_runtime(case.pipe)
    assert (report.original_calls, report.full_calls, report.captures) == (7, 0, 0)
    assert "could not be captured" in str(deepcache_fx.report(case.pipe))
    assert deepcache_fx.report(case.pipe).last_run == "FssFssF"
    deepcache_fx.restore(case.pipe)
    assert type(case.pipe.controlnet) is Looking


def test_a_network_that_takes_no_picture_is_left_alone() -> None:
    case = one_controlnet()
    case.pipe.controlnet.__class__ = Unnamed
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    assert type(case.pipe.controlnet) is Unnamed
    assert controlnet_runtime(case.pipe).refused == "its forward takes no controlnet_cond"
    assert "Unnamed is left as it is" in str(deepcache_fx.report(case.pipe))


def test_a_compiled_network_is_left_alone() -> None:
    case = one_controlnet()
    case.pipe.controlnet.compile(backend="eager")
    deepcache_fx.optimize(case.pipe, 3, **TO_THE_BIT)
    assert "compile() was called" in str(controlnet_runtime(case.pipe).refused)


# Recorded graphs.


def test_recorded_graphs_give_what_called_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upon a recorder that spoils what a replay returned at the next one, and checks every address."""
    recorders: list[FakeRecorder] = []
    monkeypatch.setitem(
        cuda_graphs.RECORDERS, "cpu", lambda device: recorders.append(FakeRecorder(device)) or recorders[-1]
    )
    recorded, called = one_controlnet().pipe, one_controlnet().pipe
    deepcache_fx.optimize(recorded, 3, backend="eager", cuda_graphs=True)
    deepcache_fx.optimize(called, 3, backend="eager", cuda_graphs=False)

    def forget(pipe: Any) -> Callable[..., Residuals]:
        def between(step: int, down: list[torch.Tensor], mid: torch.Tensor, x: torch.Tensor) -> Residuals:
            if step == 2:
                deepcache_fx.reset(pipe)
            return down, mid

        return between

    for seed in (0, 1):
        assert torch.equal(denoise(recorded, seed=seed), denoise(called, seed=seed))
        assert controlnet_runtime(recorded).last_run == "FssFssF"
        assert torch.equal(denoise(recorded, forget(recorded)), denoise(called, forget(called)))
    [recorder] = recorders
    assert len(recorder.graphs) == 4  # two of each network
    assert [item.cuda_graphs for item in controlnet_runtime(recorded).signatures] == ["recorded"]


def test_the_small_controlnet_is_alive() -> None:
    """Zero convolutions would make every test above hold for any residuals."""
    assert all(bool(layer.weight.any()) for layer in controlnet().controlnet_down_blocks)
