"""The step path: runs, calls, signatures, threads, settings. On a small U-Net and loops without any pipeline."""

from __future__ import annotations

import dataclasses
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepcache_fx
from deepcache_fx import DeepCacheError, Power, Report, ScheduleError, Steps
from deepcache_fx.execution.programs import PromptStage
from deepcache_fx.runtime.attach import runtime_of
from tests import small
from tests.compvis import INPUTS, TIMESTEPS, CompVisUNet, denoise
from tests.families import family, thorough
from tests.oracles import REPEATING, TO_THE_BIT, agree


@pytest.fixture
def unet() -> CompVisUNet:
    return CompVisUNet()


def fresh(**options: Any) -> torch.Tensor:
    return denoise(deepcache_fx.optimize(CompVisUNet(), backend="eager", **options), TIMESTEPS)


def report(unet: torch.nn.Module) -> Report:
    return deepcache_fx.report(unet)


def test_interval_one_is_the_model_itself_to_the_bit(unet: CompVisUNet) -> None:
    expected = denoise(unet, TIMESTEPS)
    deepcache_fx.optimize(unet, interval=1, **TO_THE_BIT)
    assert torch.equal(denoise(unet, TIMESTEPS), expected)
    assert report(unet).last_run == "F" * 20


def test_caching_changes_the_result_a_little(unet: CompVisUNet) -> None:
    expected = denoise(unet, TIMESTEPS)
    actual = denoise(deepcache_fx.optimize(unet, interval=3, backend="eager"), TIMESTEPS)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.1


@thorough
def test_capturing_draws_no_random_number(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="aot_eager")
    before = torch.get_rng_state()
    denoise(unet, TIMESTEPS[:4])
    assert torch.equal(torch.get_rng_state(), before)


class ScalarReads(TorchDispatchMode):
    """Counts values read out of tensors: on a device, each waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@thorough
def test_no_value_is_read_from_the_timesteps_of_a_loop(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager")
    with ScalarReads() as reads:
        denoise(unet, TIMESTEPS)
    assert reads.count == 0
    assert report(unet).shallow_calls == 13
    with ScalarReads() as reads, torch.no_grad():  # a timestep of its own memory has to be read: this can fail
        unet(INPUTS["x"], torch.tensor([1, 2]), INPUTS["context"])
    assert reads.count == 1


def test_no_value_is_read_in_the_unet_calls_of_a_pipeline() -> None:
    pipe = small.pipeline()
    deepcache_fx.optimize(pipe, backend="eager")
    forward, reads = type(pipe.unet).forward, []

    def counting(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ScalarReads() as mode:
            result = forward(self, *args, **kwargs)
        reads.append(mode.count)
        return result

    type(pipe.unet).forward = counting  # of the one instance: optimize gave it a class of its own
    pipe("a", num_inference_steps=4, output_type="latent", **small.SIZE)
    assert reads[1:] == [0] * 3  # the first call captures
    assert report(pipe.unet).last_run == "FssF"


@pytest.mark.parametrize("stop", family(range(1, 8), 2))
def test_a_run_abandoned_at_any_step_leaves_the_next_one_as_fresh(unet: CompVisUNet, stop: int) -> None:
    expected = fresh()
    deepcache_fx.optimize(unet, backend="eager")
    denoise(unet, TIMESTEPS, seed=1, stop=stop)
    assert torch.equal(denoise(unet, TIMESTEPS.clone()), expected)


@pytest.mark.parametrize("step", family(range(5), 2))
def test_a_call_that_raises_leaves_the_next_run_as_fresh(unet: CompVisUNet, step: int) -> None:
    expected = fresh()
    deepcache_fx.optimize(unet, backend="eager")
    denoise(unet, TIMESTEPS, seed=1, stop=step)
    with pytest.raises(DeepCacheError, match="CompVisUNet could not be captured for inputs"), torch.no_grad():
        unet(torch.randn(2, 3, 8, 8), TIMESTEPS[step].expand(2), torch.randn(2, 3, 6))
    deepcache_fx.optimize(unet, backend="eager")  # it was restored if that was its first call
    assert torch.equal(denoise(unet, TIMESTEPS), expected)


def count_prompts(unet: CompVisUNet) -> dict[str, int]:
    """How often each variant's prompt stage runs from here on, in loops over TIMESTEPS."""
    denoise(unet, TIMESTEPS[:1])  # captures
    deepcache_fx.reset(unet)
    runtime = runtime_of(unet)
    assert runtime is not None
    counts = {"full": 0, "shallow": 0}

    def counted(name: str, stage: PromptStage) -> PromptStage:
        def program(*tensors: torch.Tensor) -> Any:
            counts[name] += 1
            return stage.program(*tensors)

        return dataclasses.replace(stage, program=program)

    for entry in runtime._entries.values():
        entry.prompts = {name: counted(name, stage) for name, stage in entry.prompts.items()}
    return counts


class PromptUNet(CompVisUNet):
    """With a projection of the context at the end, so that shallow steps need the prompt as well."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return super().forward(x, timesteps, context) + self.shift(context).mean(1)[:, :, None, None]


def test_the_prompt_stage_runs_once_a_run_and_not_before_it_is_needed() -> None:
    unet = deepcache_fx.optimize(PromptUNet(), **REPEATING)
    counts = count_prompts(unet)
    denoise(unet, TIMESTEPS[:1])
    deepcache_fx.reset(unet)
    assert counts == {"full": 1, "shallow": 0}
    denoise(unet, TIMESTEPS)
    assert counts == {"full": 2, "shallow": 1}
    expected = denoise(deepcache_fx.optimize(PromptUNet(), **TO_THE_BIT), TIMESTEPS)
    assert agree(denoise(unet, TIMESTEPS), expected, REPEATING)


@pytest.mark.parametrize("change", family(["in place", "another tensor", "another memory", "weights"], "in place"))
def test_a_prompt_that_changes_within_a_run_is_seen(change: str) -> None:
    unet = deepcache_fx.optimize(PromptUNet(), **REPEATING)
    plain = deepcache_fx.optimize(PromptUNet(), **TO_THE_BIT)
    counts = count_prompts(unet)
    torch.manual_seed(0)
    context = torch.randn(2, 3, 6)
    with torch.no_grad():
        for step, t in enumerate(TIMESTEPS[:6]):
            if step == 2:
                if change == "in place":
                    context.mul_(3)
                elif change == "another tensor":
                    context = 3 * context
                elif change == "another memory":
                    context.data = 3 * context
                else:
                    for model in (unet, plain):
                        model.shift.weight.mul_(3)
            x = torch.randn(2, 4, 8, 8)
            assert agree(unet(x, t.expand(2), context), plain(x, t.expand(2), context), REPEATING)
    assert counts == {"full": 2, "shallow": 2}


def test_two_calls_a_step_have_their_own_prompts() -> None:
    unet = deepcache_fx.optimize(PromptUNet(), backend="eager")
    counts = count_prompts(unet)
    contexts = [torch.randn(2, 3, 6) for _ in range(2)]
    with torch.no_grad():
        for t in TIMESTEPS:
            for context in contexts:
                unet(INPUTS["x"], t.expand(2), context)
    assert counts == {"full": 2, "shallow": 2}


@thorough
def test_prompts_whose_changes_are_not_counted_are_taken_to_be_new() -> None:
    """An inference tensor has no version: it may be written into unseen."""
    unet = deepcache_fx.optimize(PromptUNet(), **REPEATING)
    plain = deepcache_fx.optimize(PromptUNet(), **TO_THE_BIT)
    with torch.inference_mode():
        context = torch.randn(2, 3, 6)
        for t in TIMESTEPS[:6]:
            context.mul_(2)
            arguments = INPUTS["x"], t.expand(2), context
            assert agree(unet(*arguments), plain(*arguments), REPEATING)


@thorough
def test_the_same_timesteps_tensor_serves_several_runs(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager")
    results = [denoise(unet, TIMESTEPS, seed=seed) for seed in (1, 0, 1)]
    assert torch.equal(results[1], fresh())
    assert torch.equal(results[0], results[2])
    assert report(unet).captures == 1


def test_a_change_of_batch_within_a_run_is_one_full_step(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, interval=4, backend="eager")
    with torch.no_grad():
        for index, t in enumerate(TIMESTEPS[:8]):
            batch = 2 if index < 5 else 1
            out = unet(torch.ones(batch, 4, 8, 8), t.expand(batch), torch.ones(batch, 3, 6))
            assert out.shape[0] == batch
    assert report(unet).last_run == "FsssFFss"
    assert report(unet).forced_full == {"inputs or settings changed within a run": 1}


@thorough
def test_sizes_up_down_and_back_capture_once_each(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, **TO_THE_BIT)
    plain = CompVisUNet()
    for size in (8, 16, 8, 12, 16):
        assert denoise(unet, TIMESTEPS[:4], size=size).shape[-1] == size
        once = denoise(unet, TIMESTEPS[:1], size=size)
        assert torch.equal(once, denoise(plain, TIMESTEPS[:1], size=size))
    assert report(unet).captures == 3


@thorough
def test_captures_are_bounded_and_the_oldest_goes_first(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager", max_captures=2)
    for size in (8, 12, 16, 8):
        denoise(unet, TIMESTEPS[:2], size=size)
    assert report(unet).captures == 4
    assert len(report(unet).signatures) == 2


def test_two_calls_a_step_have_a_cache_each(unet: CompVisUNet) -> None:
    """Guidance done as two calls of batch one equals one call of batch two."""
    deepcache_fx.optimize(unet, backend="eager")
    torch.manual_seed(0)
    start, contexts = torch.randn(1, 4, 8, 8), torch.randn(2, 3, 6)

    @torch.no_grad()
    def loop(together: bool) -> torch.Tensor:
        x = start
        for t in TIMESTEPS:
            if together:
                first, second = unet(x.repeat(2, 1, 1, 1), t.expand(2), contexts).chunk(2)
            else:
                first, second = (unet(x, t.expand(1), contexts[i : i + 1]) for i in range(2))
            x = x - 0.1 * (first + 3 * (second - first))
        return x

    together, apart = loop(True), loop(False)
    assert report(unet).last_run == "FFssss" * 6 + "FFss"
    assert (together - apart).norm() / together.norm() < 1e-5


@pytest.mark.parametrize(
    "form",
    [
        lambda t, batch: t.expand(batch),
        lambda t, batch: torch.full((batch,), t.item()),
        lambda t, batch: t.repeat(batch),
    ],
    ids=["view", "full", "repeat"],
)
def test_every_form_of_timestep_gives_the_same_run(unet: CompVisUNet, form: Callable[[Any, int], Any]) -> None:
    deepcache_fx.optimize(unet, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            for t in TIMESTEPS[:7]:
                unet(INPUTS["x"], form(t, 2), timesteps_context := INPUTS["context"])
        assert report(unet).last_run == "FssFssF"
    assert timesteps_context is INPUTS["context"]


def test_a_call_that_pauses_does_not_come_back_to_its_old_feature(unet: CompVisUNet) -> None:
    """Guidance that stops and starts again: its second call has no fresh feature when it returns."""
    deepcache_fx.optimize(unet, backend="eager")
    with torch.no_grad():
        for index, t in enumerate(TIMESTEPS[:11]):
            x = torch.randn(1, 4, 8, 8)
            for _ in range(1 if 3 <= index < 7 else 2):
                unet(x, t.expand(1), INPUTS["context"][:1])
    assert report(unet).last_run == "FF" + "ss" + "ss" + "F" + "s" + "s" + "F" + "sF" + "ss" + "FF" + "ss"
    assert report(unet).forced_full == {"no cached feature for this call of the step": 1}


@thorough
def test_replaced_weights_are_let_go(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager")
    denoise(unet, TIMESTEPS[:2])
    old = [weakref.ref(p) for p in unet.parameters()]
    unet.load_state_dict({k: v.clone() for k, v in unet.state_dict().items()}, assign=True)
    denoise(unet, TIMESTEPS[:2])
    gc.collect()
    assert report(unet).captures == report(unet).rebound == 1
    assert [reference for reference in old if reference() is not None] == []


def test_gradients_run_the_model_itself_and_say_so_once(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager")
    with pytest.warns(UserWarning, match="CompVisUNet runs uncached: gradients are enabled and required"):
        out = unet(**INPUTS)
    out.sum().backward()
    assert unet.out[2].weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet(**INPUTS)
    assert report(unet).original_calls == 2
    assert report(unet).full_calls == 0


def test_new_weights_are_used_by_the_next_run(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager")
    denoise(unet, TIMESTEPS)
    plain = CompVisUNet()
    with torch.no_grad():
        for model in (unet, plain):
            model.out[2].weight.mul_(2)
            model.middle_block[0].in_layers[2].weight.add_(0.1)
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(deepcache_fx.optimize(plain, backend="eager"), TIMESTEPS))
    assert report(unet).captures == 1


@thorough
def test_a_replaced_layer_is_captured_anew(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, **TO_THE_BIT)
    denoise(unet, TIMESTEPS)
    torch.manual_seed(5)
    unet.out[2] = torch.nn.Conv2d(8, 4, 3, padding=1)
    once = denoise(unet, TIMESTEPS[:1])
    assert report(unet).captures == 2
    assert torch.equal(once, denoise(deepcache_fx.restore(unet), TIMESTEPS[:1]))


def test_a_call_waits_for_what_another_thread_captures() -> None:
    """While it lasts, PyTorch tells every thread that it compiles, and the model holds stand-ins of its weights."""
    within, go_on = threading.Event(), threading.Event()

    class Slow(CompVisUNet):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                within.set()
                assert go_on.wait(60)
            return super().forward(x, timesteps, context)

    unet = Slow()
    results: list[torch.Tensor] = []
    expected = denoise(CompVisUNet(), TIMESTEPS[:1])
    deepcache_fx.optimize(unet, backend="eager", disable="all")

    def work() -> None:
        results.append(denoise(unet, TIMESTEPS[:1]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert within.wait(60)
    threads[1].start()
    torch.testing.assert_close(denoise(CompVisUNet(), TIMESTEPS[:1]), expected)  # a model of its own need not wait
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert [type(result) for result in results] == [torch.Tensor] * 2
    for result in results:
        torch.testing.assert_close(result, expected)
    report = deepcache_fx.report(unet)
    assert (report.captures, report.full_calls, report.original_calls) == (1, 2, 0)


def test_threads_never_share_a_cache(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, backend="eager", example_inputs=INPUTS)
    expected = [denoise(unet, TIMESTEPS, seed=seed) for seed in range(4)]
    results: dict[int, list[torch.Tensor]] = {}
    gate, num_threads = threading.Barrier(4), torch.get_num_threads()

    def work(seed: int) -> None:
        torch.set_num_threads(num_threads)  # of this thread alone: the order of sums depends on it
        gate.wait()
        results[seed] = [denoise(unet, TIMESTEPS, seed=seed) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert len(results[seed]) == 3
        assert all(torch.equal(result, expected[seed]) for result in results[seed])


def test_a_schedule_that_needs_the_number_of_steps_says_so_and_leaves_the_model_alone(unet: CompVisUNet) -> None:
    cls = type(unet)
    deepcache_fx.optimize(unet, schedule=Power(3), backend="eager")
    with pytest.raises(ScheduleError, match="needs the number of denoising steps"), torch.no_grad():
        unet(INPUTS["x"], torch.tensor([5, 5]), INPUTS["context"])
    assert type(unet) is cls


def test_a_power_schedule_reads_the_number_of_steps_off_the_timesteps(unet: CompVisUNet) -> None:
    schedule = Power(4, center=6)
    deepcache_fx.optimize(unet, schedule=schedule, backend="eager")
    denoise(unet, TIMESTEPS)
    full = [i for i, letter in enumerate(report(unet).last_run) if letter == "F"]
    assert full == schedule.full_steps(20)


def test_steps_and_functions_are_schedules(unet: CompVisUNet) -> None:
    deepcache_fx.optimize(unet, schedule=Steps([2, 5]), backend="eager")
    denoise(unet, TIMESTEPS[:8])
    assert report(unet).last_run == "FsFssFss"
    deepcache_fx.optimize(unet, schedule=lambda step: step < 2, backend="eager")
    denoise(unet, TIMESTEPS[:5])
    assert report(unet).last_run == "FFsss"
    assert report(unet).captures == 1  # the programs do not depend on the schedule


def test_a_function_is_asked_once_a_step_however_many_calls_a_step_has(unet: CompVisUNet) -> None:
    asked = []
    deepcache_fx.optimize(unet, schedule=lambda step: asked.append(step) or step == 2, backend="eager")  # type: ignore[func-returns-value]
    one = {name: value[:1] for name, value in INPUTS.items() if name != "timesteps"}
    with torch.no_grad():
        for t in TIMESTEPS[:4]:
            for _ in range(2):
                unet(**one, timesteps=t.expand(1))
    assert report(unet).last_run == "FFssFFss"
    assert asked == [1, 2, 3]


class Adapted(CompVisUNet):
    """With a setting, and a weight that is used under that setting alone."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.shift = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, timesteps, context):  # type: ignore[no-untyped-def]
        out = super().forward(x, timesteps, context)
        return out + self.shift if self.factor == 1.0 else out * self.factor


def at(model: torch.nn.Module, step: int, batch: int) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(INPUTS["x"][:batch], TIMESTEPS[step].expand(batch), INPUTS["context"][:batch])
    return result


@thorough
def test_what_is_captured_within_a_run_goes_by_the_settings_of_that_moment() -> None:
    model, plain = Adapted(), Adapted()
    deepcache_fx.optimize(model, **TO_THE_BIT)
    at(model, 0, 2)
    model.factor = plain.factor = 0.5
    assert torch.equal(at(model, 1, 1), at(plain, 1, 1))  # the batch has changed as well
    assert report(model).captures == 2
    model.factor = plain.factor = 1.0
    assert torch.equal(at(model, 0, 1), at(plain, 0, 1))


@thorough
def test_a_weight_that_goes_with_a_setting_within_a_run_is_no_error() -> None:
    model, plain = Adapted(), Adapted()
    deepcache_fx.optimize(model, **TO_THE_BIT)
    at(model, 0, 2)
    model.factor = plain.factor = 0.5
    model.shift.data = torch.ones(7)  # fits nothing: an adapter of another rank
    assert torch.equal(at(model, 1, 2), at(plain, 1, 2))
    assert report(model).last_run == "FF"


def test_inputs_that_cannot_be_part_of_a_key_run_uncached(unet: CompVisUNet) -> None:
    class Wrapper(CompVisUNet):
        def forward(self, x, timesteps, context, extra=None):  # type: ignore[no-untyped-def]
            return super().forward(x, timesteps, context)

    model = deepcache_fx.optimize(Wrapper(), backend="eager")
    with pytest.warns(UserWarning, match="argument extra cannot be part of a key"), torch.no_grad():
        out = model(**INPUTS, extra=iter("ab"))
    with torch.no_grad():
        assert torch.equal(out, unet(**INPUTS))


def test_a_report_prints_and_converts() -> None:
    import json

    unet = deepcache_fx.optimize(CompVisUNet(), interval=2, backend="eager")
    denoise(unet, TIMESTEPS[:4])
    text = str(report(unet))
    assert "last run: FsFs" in text
    assert "2 full, 2 shallow" in text
    data = json.loads(json.dumps(report(unet).to_dict()))
    assert data["engaged"] is True
    assert data["signatures"][0]["cuts"][0]["shallow_macs"] < data["signatures"][0]["full_macs"]
    assert data["signatures"][0]["passes"][0]["name"] == "canonicalize"
