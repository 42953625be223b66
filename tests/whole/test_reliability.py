"""What goes wrong in cached diffusion, and does not here: failures 1 to 12 of docs/reliability.md, faults and load.

Where the published implementation fails and that is cheap to show, it is run beside ours in the same test.
"""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from DeepCache import DeepCacheSDHelper
from diffusers.models.attention_processor import AttnProcessor

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.execution import assemble, cuda_graphs
from deepcache_fx.runtime.attach import runtime_of
from tests import models, pipelines, small
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.oracles import TO_THE_BIT, CatOracle, published, specified

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TIMESTEPS = torch.arange(950, -1, -50)


def optimized(**options: Any) -> CompVisUNet:
    return deepcache_fx.optimize(CompVisUNet(), **{**TO_THE_BIT, **options})


def fresh(seed: int = 0, **loop: Any) -> torch.Tensor:
    """What an optimised model that nothing has happened to gives."""
    return denoise(optimized(), TIMESTEPS, seed, **loop)


def generate(pipe: Any, steps: int = 9, **arguments: Any) -> torch.Tensor:
    return models.generate(pipe, steps, **{**small.SIZE, **arguments})


def trace(target: Any) -> str:
    return deepcache_fx.report(target).last_run


def thirds(count: int) -> set[int]:
    return set(range(0, count, 3))


def specified_loop(full: set[int]) -> torch.Tensor:
    """The latents of the loop with the cached operand replaced, full at exactly these calls."""
    oracle, calls = CatOracle(CompVisUNet().forward, branch=0), itertools.count()
    return denoise(lambda *args: oracle(next(calls) in full, *args), TIMESTEPS)  # type: ignore[arg-type]


@contextmanager
def full_steps(pipe: Any) -> Iterator[list[int]]:
    """Counts the times that the middle of the UNet really runs, whatever has replaced the forward around it."""
    middle, count = pipe.unet.mid_block, [0]
    own = middle.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return own(*args, **kwargs)

    middle.forward = forward
    try:
        yield count
    finally:
        del middle.forward


def attempt(function: Callable[[], torch.Tensor]) -> torch.Tensor | Exception:
    try:
        return function()
    except Exception as error:
        return error


# Failures by their number in docs/reliability.md.


def image_to_image() -> Any:
    return pipelines.image_to_image().pipe


def test_1_another_strength_begins_at_its_own_first_step() -> None:
    def run(pipe: Any, strength: float) -> torch.Tensor:
        return models.generate(pipe, 10, image=pipelines.picture(), strength=strength)

    pipe = image_to_image()
    with specified(pipe, thirds(5), 0):
        expected = run(pipe, 0.5)
    with published(pipe, 3, 0):
        assert torch.equal(run(pipe, 0.5), expected)  # alone they agree
    with published(pipe, 3, 0):
        run(pipe, 1.0)
        assert not torch.equal(run(pipe, 0.5), expected)
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    for strength in (1.0, 0.5, 0.7, 0.5):
        latents = run(pipe, strength)
        assert trace(pipe)[0] == "F"
        assert strength != 0.5 or torch.equal(latents, expected)


@pytest.mark.parametrize("offload_first", [True, False])
def test_2_offload_hooks_do_not_tear_it_off(offload_first: bool) -> None:
    """As `enable_model_cpu_offload` does: hooked, and between two generations unhooked and hooked again."""
    pipe = small.pipeline()
    with specified(pipe, thirds(9), 0):
        expected = generate(pipe)
    if offload_first:
        _, hook = cpu_offload_with_hook(pipe.unet, "cpu")
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    if not offload_first:
        _, hook = cpu_offload_with_hook(pipe.unet, "cpu")
    for _ in range(3):
        assert torch.equal(generate(pipe), expected)
        assert trace(pipe) == "FssFssFss"
        hook.remove()
        _, hook = cpu_offload_with_hook(pipe.unet, "cpu")


def test_2_the_published_code_runs_no_full_step_once_the_hooks_were_renewed() -> None:
    pipe = small.pipeline()
    with full_steps(pipe) as count:
        cpu_offload_with_hook(pipe.unet, "cpu")
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()
        generate(pipe)
        assert count == [3]
        remove_hook_from_module(pipe.unet)
        cpu_offload_with_hook(pipe.unet, "cpu")
        generate(pipe)
        assert count == [3]  # all from the cache of the first image


def without_guidance_from(step: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    return callback


def test_3_a_batch_that_changes_within_a_run_is_one_full_step() -> None:
    """Guidance cut off after step 3, as diffusers' documentation shows it."""
    cut = {"callback_on_step_end": without_guidance_from(3), "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe = small.pipeline()
    with published(pipe, 3, 0):
        theirs = attempt(lambda: generate(pipe, **cut))
    assert isinstance(theirs, RuntimeError)
    assert "size" in str(theirs).lower()
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    for _ in range(2):
        latents = generate(pipe, **cut)
        assert trace(pipe) == "FssFFsFss"
    deepcache_fx.restore(pipe)
    with specified(pipe, {0, 3, 4, 6}, 0):
        assert torch.equal(generate(pipe, **cut), latents)


@torch.no_grad()
def test_4_two_calls_a_step_have_a_cache_each() -> None:
    """Guidance as two calls of batch one equals one call of batch two."""
    pipe = small.pipeline()
    contexts = torch.randn(2, 12, models.TEXT, generator=torch.Generator().manual_seed(0))

    def run(together: bool) -> torch.Tensor:
        pipe.scheduler.set_timesteps(9)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        for t in pipe.scheduler.timesteps:
            if together:
                noise = pipe.unet(torch.cat([x, x]), t, contexts).sample
            else:
                noise = torch.cat([pipe.unet(x, t, context[None]).sample for context in contexts])
            first, second = noise.chunk(2)
            x = pipe.scheduler.step(first + 5 * (second - first), t, x).prev_sample
        return x

    def apart() -> float:
        together = run(True)
        return float((run(False) - together).norm() / together.norm())

    with published(pipe, 3, 0):
        assert apart() > 1e-3
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    assert apart() < 1e-5
    assert trace(pipe) == "FFssss" * 3


def test_5_sizes_up_down_and_back_are_neither_an_error_nor_stale() -> None:
    sizes = ((16, 16), (24, 16), (16, 24), (20, 12), (16, 16))

    def run(pipe: Any, index: int) -> torch.Tensor:
        height, width = sizes[index]
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(index))
        return models.generate(pipe, 10, image=image, strength=1.0 if index % 2 else 0.5)

    pipe = image_to_image()
    expected = []
    for index in range(5):
        with specified(pipe, thirds(10 if index % 2 else 5), 0):
            expected.append(run(pipe, index))
    with published(pipe, 3, 0):
        run(pipe, 1)
        assert isinstance(attempt(lambda: run(pipe, 2)), RuntimeError)
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    assert all(torch.equal(run(pipe, index), wanted) for index, wanted in enumerate(expected))
    assert deepcache_fx.report(pipe).captures == 4


def test_6_a_step_is_a_step_although_its_timestep_is_repeated() -> None:
    """Heun; all the other schedulers are in tests/whole/test_schedulers.py."""
    pipe = small.pipeline()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with specified(pipe, thirds(11), 0):
        expected = generate(pipe, 6)
    with full_steps(pipe) as count, published(pipe, 3, 0):
        assert not torch.equal(generate(pipe, 6), expected)
    assert count == [5]
    with full_steps(pipe) as count, published(pipe, 2, 0):
        generate(pipe, 6)
    assert count == [1]  # of 6: all others reuse the first
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    assert torch.equal(generate(pipe, 6), expected)
    assert trace(pipe) == "FssFssFssFs"


@torch.no_grad()
def test_6_a_timestep_by_keyword_is_a_timestep() -> None:
    pipe = small.pipeline()
    pipe.scheduler.set_timesteps(4)
    x, context = torch.ones(1, 4, 16, 16), torch.ones(1, 12, models.TEXT)

    def run() -> list[torch.Tensor]:
        return [pipe.unet(x, timestep=t, encoder_hidden_states=context).sample for t in pipe.scheduler.timesteps]

    with specified(pipe, thirds(4), 0):
        expected = run()
    with published(pipe, 3, 0), pytest.raises(IndexError):
        run()
    deepcache_fx.optimize(pipe.unet, **TO_THE_BIT)
    assert all(map(torch.equal, run(), expected))
    assert trace(pipe) == "FssF"


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int": int,
    "float": float,
    "view": lambda t: t,
    "0-d": lambda t: t.clone(),
    "one": lambda t: t.reshape(1),
    "one for each sample": lambda t: t.expand(2),
    "one for each sample, in memory of its own": lambda t: t.repeat(2),
}


@thorough
@torch.no_grad()
def test_6_a_timestep_in_any_form_by_position_or_keyword_is_a_step_of_a_loop_of_ones_own() -> None:
    unet, context = pipelines.unet(), torch.ones(2, 12, models.TEXT)

    def run(form: Callable[[torch.Tensor], Any], named: bool) -> torch.Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in TIMESTEPS.clone()[:5]:
            arguments = {"timestep": form(t), "encoder_hidden_states": context}
            x = x - 0.1 * (unet(x, **arguments) if named else unet(x, *arguments.values())).sample
        return x

    with specified(SimpleNamespace(unet=unet), thirds(5), 0):
        expected = run(FORMS["view"], False)
    deepcache_fx.optimize(unet, **TO_THE_BIT)
    for name, form in FORMS.items():
        for named in (False, True):
            assert torch.equal(run(form, named), expected), name
            assert trace(unet) == "FssFs", name
    assert deepcache_fx.report(unet).captures == 5


@pytest.mark.parametrize("how", family(["flag", "callback", "unet"], "unet"))
def test_7_after_an_interruption_at_any_step_the_next_run_is_as_fresh(how: str) -> None:
    """`pipe._interrupt`, a callback that raises, and Ctrl-C in the midst of the UNet."""
    pipe = small.pipeline()
    with specified(pipe, thirds(5), 0):
        expected = generate(pipe, 5)
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    stop = 0

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == stop:
            if how == "callback":
                raise InterruptedError
            pipe._interrupt = True
        return values

    for stop in range(7):
        if how == "unet":
            with pressing_control_c(pipe.unet, stop), pytest.raises(KeyboardInterrupt):
                generate(pipe, 7, seed=1)
        elif how == "callback":
            with pytest.raises(InterruptedError):
                generate(pipe, 7, seed=1, callback_on_step_end=callback)
        else:
            generate(pipe, 7, seed=1, callback_on_step_end=callback)
        assert torch.equal(generate(pipe, 5), expected)
        assert trace(pipe) == "FssFs"
    assert deepcache_fx.report(pipe).captures == 1


@contextmanager
def pressing_control_c(unet: torch.nn.Module, call: int) -> Iterator[None]:
    """KeyboardInterrupt from within the program that runs at this UNet call, after it has computed."""
    held = runtime_of(unet)
    assert held is not None
    if not held._entries:
        with torch.no_grad():
            unet(torch.ones(2, 4, 16, 16), torch.tensor(1), torch.ones(2, 12, models.TEXT), return_dict=False)
    (entry,) = held._entries.values()
    own, calls = entry.programs, [0]

    class Programs:
        def __getattr__(self, name: str) -> Any:
            method = getattr(own, name)
            if name not in ("full", "shallow"):
                return method

            def run(*args: Any) -> Any:
                result = method(*args)
                calls[0] += 1
                if calls[0] == call + 1:
                    raise KeyboardInterrupt
                return result

            return run

    entry.programs = Programs()  # type: ignore[assignment]
    try:
        yield
    finally:
        entry.programs = own


@pytest.mark.parametrize("stop", family(range(1, 6), 2))
def test_7_an_abandoned_generator_leaves_nothing_to_the_next(stop: int) -> None:
    """A loop of one's own that yields after each step and is never finished."""
    unet = optimized()

    @torch.no_grad()
    def steps() -> Iterator[None]:
        x = torch.ones(2, 4, 8, 8)
        for t in TIMESTEPS:
            x = x - 0.1 * unet(x, t.expand(2), torch.ones(2, 3, 6))
            yield

    abandoned = steps()
    for _ in range(stop):
        next(abandoned)
    # After one step of a bare UNet nothing yet tells a new run from a second call of the step: one more is full.
    full = {0, 1, *thirds(20)} if stop == 1 else thirds(20)
    assert torch.equal(denoise(unet, TIMESTEPS), specified_loop(full))
    deepcache_fx.reset(unet)
    assert torch.equal(denoise(unet, TIMESTEPS), fresh())
    abandoned.close()


def test_8_switching_on_and_off_in_any_order_is_harmless_and_exact() -> None:
    pipe = small.pipeline()
    plain = generate(pipe)
    helper = DeepCacheSDHelper(pipe=pipe)
    with pytest.raises(AttributeError):
        helper.disable()
    other = small.pipeline()
    helper = DeepCacheSDHelper(pipe=other)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    helper.enable()
    with pytest.raises(RecursionError):
        generate(other)
    deepcache_fx.restore(pipe)
    for _ in range(2):
        for _ in range(2):
            deepcache_fx.optimize(pipe, **TO_THE_BIT)
            assert not torch.equal(generate(pipe), plain)
        for _ in range(2):
            deepcache_fx.restore(pipe)
            assert torch.equal(generate(pipe), plain)


def test_8_a_copy_is_a_model_of_its_own() -> None:
    def silenced(pipe: Any) -> torch.Tensor:
        """What a copy of the UNet gives whose last convolution is zeroed."""
        duplicate = copy.deepcopy(pipe.unet)
        with torch.no_grad():
            for parameter in duplicate.conv_out.parameters():
                parameter.zero_()
            return duplicate(torch.ones(1, 4, 16, 16), torch.tensor(1), torch.ones(1, 12, models.TEXT)).sample

    pipe = small.pipeline()
    pipe.scheduler.set_timesteps(1000)
    pipe.scheduler.timesteps[0] = 1
    with published(pipe, 3, 0):
        assert silenced(pipe).any()  # the copy runs the original
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    assert not silenced(pipe).any()


@thorough
def test_8_two_pipelines_that_share_a_unet_do_not_share_their_steps() -> None:
    """Step by step in turn: each pipeline's scheduler begins runs, and ends steps, of the one UNet."""
    first = small.pipeline()
    second = diffusers.StableDiffusionPipeline(
        **{**first.components, "scheduler": diffusers.EulerDiscreteScheduler(steps_offset=1)},
        requires_safety_checker=False,
    )
    second.set_progress_bar_config(disable=True)
    with specified(first, thirds(7), 0):
        expected = generate(first, 7), generate(first, 7, seed=3)
    with specified(second, thirds(5), 0):
        other = generate(second, 5)
    for pipe in (first, second):
        deepcache_fx.optimize(pipe, **TO_THE_BIT)
    assert torch.equal(generate(first, 7), expected[0])
    assert torch.equal(generate(second, 5), other)
    assert torch.equal(generate(first, 7), expected[0])


def test_8_a_generation_within_a_step_of_another_spoils_neither() -> None:
    """Nested pipelines on one UNet: the outer run goes on with a full step."""
    outer = small.pipeline()
    inner = diffusers.StableDiffusionPipeline(
        **{**outer.components, "scheduler": models.scheduler()}, requires_safety_checker=False
    )
    inner.set_progress_bar_config(disable=True)
    with specified(inner, thirds(5), 0):
        wanted = generate(inner, 5)
    results = []

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index in (1, 4):
            results.append(generate(inner, 5))
        return values

    for pipe in (outer, inner):
        deepcache_fx.optimize(pipe, **TO_THE_BIT)
    after = []
    for _ in range(2):
        after.append(generate(outer, 7, callback_on_step_end=callback))
        assert trace(outer)[0] == "F"
    assert len(results) == 4
    assert all(torch.equal(result, wanted) for result in results)
    assert torch.equal(*after)
    deepcache_fx.restore(outer)
    # What the outer run must give: its cache starts anew after each inner generation.
    with specified(outer, {0, 2, 5}, 0):
        assert torch.equal(generate(outer, 7), after[0])


SETTINGS: dict[str, Callable[[Any], object]] = {
    "freeu": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "freeu, another factor": lambda unet: unet.enable_freeu(0.9, 0.2, 1.6, 1.4),
    "freeu off": lambda unet: unet.disable_freeu(),
    "attention processors": lambda unet: unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
    "double precision": lambda unet: unet.to(torch.float64),
    "weights loaded": lambda unet: unet.load_state_dict({k: 0.9 * v for k, v in unet.state_dict().items()}),
    "single precision": lambda unet: unet.to(torch.float32),
}
KNOWN = {"freeu off", "weights loaded", "single precision"}
"""Changes that lead to a graph that is there already: no new capture."""


@thorough
def test_9_settings_of_the_model_are_not_baked_in_for_good() -> None:
    """One optimised UNet through all changes; each equals a plain one that was changed alike."""
    pipe, plain = (
        pipelines.like_sd(diffusers.StableDiffusionPipeline, pipelines.attentive(), requires_safety_checker=False)
        for _ in range(2)
    )
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    inputs = torch.ones(1, 4, 16, 16), torch.tensor(1), torch.ones(1, 12, models.TEXT)

    @torch.no_grad()
    def once(unet: Any) -> torch.Tensor:
        deepcache_fx.reset(pipe)
        like = [v.to(unet.dtype) if v.is_floating_point() else v for v in inputs]
        return unet(*like).sample

    assert torch.equal(once(pipe.unet), once(plain.unet))
    captures = deepcache_fx.report(pipe).captures
    for name, change in SETTINGS.items():
        change(pipe.unet)
        change(plain.unet)
        assert torch.equal(once(pipe.unet), once(plain.unet)), name
        assert torch.equal(once(pipe.unet), once(plain.unet)), name
        report = deepcache_fx.report(pipe)
        assert report.captures - captures == (name not in KNOWN), name
        captures = report.captures
    assert report.original_calls == 0


WITHIN: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "ip-adapter off": (lambda pipe: pipe.set_ip_adapter_scale(0.8), lambda pipe: pipe.set_ip_adapter_scale(0.0)),
    "freeu on": (lambda pipe: pipe.disable_freeu(), lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    "another processor": (
        lambda pipe: pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor()),
        lambda pipe: pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(Halved()),
    ),
}


class Halved(AttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) / 2


@pytest.mark.parametrize("what", family(WITHIN, next(iter(WITHIN))))
def test_9_a_setting_that_changes_within_a_run_shows_at_the_next_step(what: str) -> None:
    """As diffusers' IPAdapterScaleCutoffCallback changes it; one full step, and the schedule goes on."""
    case = pipelines.ip_adapter()
    before, change = WITHIN[what]
    case.pipe.set_ip_adapter_scale(0.8)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            change(pipe)
        return values

    def run() -> torch.Tensor:
        before(case.pipe)
        return case(pipelines.Run(pipelines.steps(7, callback_on_step_end=callback), 7))

    with specified(case.pipe, {0, 3, 4, 6}, 0):
        expected = run()
    deepcache_fx.optimize(case.pipe, **TO_THE_BIT)
    for _ in range(2):
        assert torch.equal(run(), expected)
        assert trace(case.pipe) == "FssFFsF"
    assert deepcache_fx.report(case.pipe).captures == 2


@thorough
def test_9_lora_is_seen_at_every_turn_and_recaptures_are_counted() -> None:
    """Add, scale, a second adapter, both, fuse, unfuse, remove: each equals a plain UNet that was changed alike."""
    peft = pytest.importorskip("peft")

    def add(unet: Any, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        unet.add_adapter(config, adapter_name=name)
        unet.eval().requires_grad_(False)

    def new_values(unet: Any) -> None:
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_A" in name:
                    parameter.mul_(2)

    changes: list[tuple[str, Callable[[Any], object], int]] = [
        ("added", lambda u: add(u, "a", 1), 1),
        ("new values in place, as a hot swap does", new_values, 0),
        ("weaker", lambda u: u.set_adapters(["a"], [0.3]), 1),
        ("a second one", lambda u: add(u, "b", 2), 1),
        ("both", lambda u: u.set_adapters(["a", "b"], [0.5, 2.0]), 1),
        ("switched off", lambda u: u.disable_lora(), 1),
        ("removed", lambda u: u.delete_adapters(["a", "b"]), 1),
    ]
    unet, plain = (pipelines.unet().requires_grad_(False) for _ in range(2))
    deepcache_fx.optimize(unet, **TO_THE_BIT)
    inputs = torch.ones(1, 4, 16, 16), torch.tensor(1), torch.ones(1, 12, models.TEXT)
    seen = []
    with torch.no_grad():
        unet(*inputs)
        for name, change, recaptures in changes:
            before = deepcache_fx.report(unet).captures
            change(unet)
            change(plain)
            deepcache_fx.reset(unet)
            outputs = unet(*inputs).sample, plain(*inputs).sample
            assert torch.equal(*outputs), name
            assert deepcache_fx.report(unet).captures - before <= recaptures, name
            seen.append(outputs[0])
    assert torch.equal(seen[-1], seen[-2]), "switched off and removed are both the plain model"
    assert not any(map(torch.equal, seen[:-1], seen[1:-1])), "every other change must show"


def test_10_outputs_stay_while_others_of_the_same_buffers_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded programs, two sizes and two calls a step in turn, all outputs kept: none is overwritten."""
    recorders: list[FakeRecorder] = []

    def make(device: torch.device) -> FakeRecorder:
        recorders.append(FakeRecorder(device))
        return recorders[-1]

    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", make)
    unets = [deepcache_fx.optimize(CompVisUNet(), backend="eager", cuda_graphs=on) for on in (True, False)]
    outputs: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for unet, kept in zip(unets, outputs, strict=True):
            for size in (8, 12, 8):
                timesteps = TIMESTEPS.clone()
                for t in timesteps[:5]:
                    for scale in (1.0, 2.0):
                        x = torch.full((1, 4, size, size), scale)
                        kept.append(unet(x, t.expand(1), scale * torch.ones(1, 3, 6)))
    recorders[0].spoil_outputs()
    assert all(map(torch.equal, *outputs))
    assert [item.cuda_graphs for item in deepcache_fx.report(unets[0]).signatures] == ["recorded", "recorded"]
    assert sum(graph.replays for graph in recorders[0].graphs) == 30


def test_11_the_cache_engages_or_the_report_says_why_not() -> None:
    pipe = small.pipeline()
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    for count in range(1, 4):
        generate(pipe)
        report = deepcache_fx.report(pipe)
        assert report.engaged
        assert (report.full_calls, report.shallow_calls, report.original_calls) == (3 * count, 6 * count, 0)
    with torch.enable_grad(), pytest.warns(UserWarning, match="runs uncached: gradients are enabled"):
        pipe.unet(torch.ones(1, 4, 16, 16), torch.tensor(1), torch.ones(1, 12, models.TEXT))
    report = deepcache_fx.report(pipe)
    assert report.original_calls == 1
    assert [reason for reason in report.original_reasons if "gradients" in reason]
    assert "gradients" in str(report)


@thorough
def test_12_eight_threads_twenty_generations_each_on_two_unets() -> None:
    """Four threads on each; sizes, batches, numbers of steps and prompts differ, and so do the intervals."""
    unets = [optimized(interval=interval) for interval in (2, 3)]
    jobs = [
        [dict(seed=k, size=8 + 4 * (k % 2), batch=1 + k // 2 % 2) for k in range(t % 4, t % 4 + 4)] for t in range(8)
    ]

    def run(thread: int, job: dict[str, int]) -> torch.Tensor:
        return denoise(unets[thread // 4], TIMESTEPS[-6 - job["seed"] :], **job)

    expected = [[run(thread, job) for job in jobs[thread]] for thread in range(8)]
    results: list[list[bool]] = [[] for _ in range(8)]
    gate, num_threads = threading.Barrier(8), torch.get_num_threads()

    def work(thread: int) -> None:
        torch.set_num_threads(num_threads)
        gate.wait()
        for _ in range(5):
            for job, wanted in zip(jobs[thread], expected[thread], strict=True):
                results[thread].append(torch.equal(run(thread, job), wanted))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 20] * 8
    assert [deepcache_fx.report(unet).captures for unet in unets] == [4, 4]


@torch.no_grad()
def test_12_two_generations_in_turn_on_two_threads_are_two_generations() -> None:
    """Strictly alternating steps, so that the published code mixes the two every time."""
    pipe = small.pipeline()
    steps, context = 6, torch.ones(1, 12, models.TEXT)

    def run(seed: int, turn: Callable[[], Any] = lambda: None) -> torch.Tensor:
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        for t in timesteps:
            x = x - 0.1 * pipe.unet(x, t, context).sample
            turn()
        return x

    def in_turn() -> list[torch.Tensor]:
        results: list[torch.Tensor] = [torch.empty(0)] * 2
        turns = [threading.Semaphore(1), threading.Semaphore(0)]

        @torch.no_grad()
        def work(seed: int) -> None:
            turns[seed].acquire()

            def turn() -> None:
                turns[1 - seed].release()
                turns[seed].acquire()

            results[seed] = run(seed, turn)
            turns[1 - seed].release()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    pipe.scheduler.set_timesteps(steps)
    timesteps = pipe.scheduler.timesteps
    expected = []
    for seed in range(2):
        with specified(pipe, thirds(steps), 0):
            expected.append(run(seed))
    with published(pipe, 3, 0):
        assert not all(map(torch.equal, in_turn(), expected))
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    assert all(map(torch.equal, in_turn(), expected))


def test_12_new_weights_and_moved_ones_meet_no_cache_of_the_old() -> None:
    unet, plain = optimized(), CompVisUNet()
    denoise(unet, TIMESTEPS, stop=2)  # warm, and abandoned
    changes: list[Callable[[Any], object]] = [
        lambda u: u.load_state_dict({k: 1.1 * v for k, v in u.state_dict().items()}),
        lambda u: u.load_state_dict({k: v.clone() for k, v in u.state_dict().items()}, assign=True),
        lambda u: u.to(memory_format=torch.channels_last),
        lambda u: u.train(),
        lambda u: u.eval(),
    ]
    with torch.no_grad():
        for index, change in enumerate(changes):
            change(unet)
            change(plain)
            x, context = torch.ones(2, 4, 8, 8), torch.ones(2, 3, 6)
            outputs = [u(x, t.expand(2), context) for t in TIMESTEPS.clone()[:1] for u in (unet, plain)]
            assert outputs[0].isfinite().all()
            assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6), index
            assert trace(unet) == "F"


# Errors of every stage.


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected")


STAGES: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "capture": lambda patch: patch.setattr(torch.export, "export", broken) or {},
    "pass": lambda patch: {"passes": [broken]},
    "split": lambda patch: patch.setattr(assemble, "split", broken) or {},
    "compile": lambda patch: {"backend": broken},
}


@pytest.mark.parametrize("stage", family(STAGES, "capture"))
def test_an_error_in_any_stage_leaves_the_model_as_it_was_and_the_next_attempt_works(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = CompVisUNet()
    inputs = torch.ones(2, 4, 8, 8), torch.tensor([1, 1]), torch.ones(2, 3, 6)
    with torch.no_grad():
        expected = unet(*inputs)
    before = set(unet.__dict__), list(unet.state_dict())
    with monkeypatch.context() as patch:
        options = {**TO_THE_BIT, **STAGES[stage](patch)}
        deepcache_fx.optimize(unet, **options)
        with pytest.raises(Exception, match="injected"), torch.no_grad():
            unet(*inputs)
    assert (set(unet.__dict__), list(unet.state_dict())) == before
    deepcache_fx.optimize(unet, **TO_THE_BIT)
    with torch.no_grad():
        assert torch.equal(unet(*inputs), expected)
    assert torch.equal(denoise(unet, TIMESTEPS), fresh())


@thorough
def test_a_capture_that_fails_later_leaves_the_earlier_ones_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of luck at another size: a clear error, and the size before goes on as if nothing had happened."""
    unet = optimized()
    expected = denoise(unet, TIMESTEPS)
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", broken)
        with pytest.raises(DeepCacheError, match="could not be captured"):
            denoise(unet, TIMESTEPS, size=12)
        assert torch.equal(denoise(unet, TIMESTEPS), expected)
    assert torch.equal(denoise(unet, TIMESTEPS, size=12), fresh(size=12))


@pytest.mark.parametrize("recording", family([0, 1], 1))
def test_a_recording_that_fails_is_called_instead_and_the_report_says_why(
    recording: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(device: torch.device) -> FakeRecorder:
        recorder = FakeRecorder(device)
        recorder.fail = [*[""] * recording, "injected"]
        return recorder

    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", make)
    unet = optimized(cuda_graphs=True)
    expected = fresh(), fresh(1)
    for seed in (0, 1, 0):
        assert torch.equal(denoise(unet, TIMESTEPS, seed), expected[seed])
    assert "injected" in deepcache_fx.report(unet).signatures[0].cuda_graphs


NONSENSE: dict[str, dict[str, torch.Tensor]] = {
    "a channel too few": {"x": torch.ones(2, 3, 8, 8)},
    "a context that does not fit": {"context": torch.ones(2, 3, 5)},
    "another batch of context": {"context": torch.ones(3, 3, 6)},
    "another type": {"x": torch.ones(2, 4, 8, 8, dtype=torch.float64)},
    "no image but a row": {"x": torch.ones(2, 4, 8)},
    "another device": {"context": torch.ones(2, 3, 6, device="meta")},
}


@thorough
@pytest.mark.parametrize("nonsense", family(NONSENSE, "another batch of context"))
def test_inputs_that_make_no_sense_are_an_error_and_leave_nothing_behind(nonsense: str) -> None:
    """In the midst of a run: not one of them is answered from the cache, and the next run is as fresh."""
    unet = optimized()
    denoise(unet, TIMESTEPS, seed=1, stop=2)
    inputs = {"x": torch.ones(2, 4, 8, 8), "context": torch.ones(2, 3, 6), **NONSENSE[nonsense]}
    with pytest.raises(Exception, match=r"(?s)captured|size|shape|channels|dtype|device|meta"), torch.no_grad():
        unet(timesteps=TIMESTEPS[2].expand(2), **inputs)
    assert trace(unet).count("s") < 2
    assert torch.equal(denoise(unet, TIMESTEPS), fresh())


@thorough
def test_timesteps_that_are_no_numbers_are_full_and_give_what_the_model_gives() -> None:
    unet, plain = optimized(), CompVisUNet()
    inputs = torch.ones(2, 4, 8, 8), torch.full((2,), float("nan")), torch.ones(2, 3, 6)
    denoise(unet, TIMESTEPS, seed=1, stop=2)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(unet(*inputs), plain(*inputs)) or plain(*inputs).isnan().all()
            assert trace(unet)[-1] == "F"
    assert torch.equal(denoise(unet, TIMESTEPS), fresh())


@thorough
def test_an_empty_batch_gives_what_the_model_gives() -> None:
    unet, plain = optimized(), CompVisUNet()
    inputs = torch.ones(0, 4, 8, 8), torch.ones(0), torch.ones(0, 3, 6)
    denoise(unet, TIMESTEPS, seed=1, stop=2)
    with torch.no_grad():
        ours, own = (attempt(lambda unet=u: unet(*inputs)) for u in (unet, plain))
    if isinstance(own, torch.Tensor):
        assert isinstance(ours, DeepCacheError) or ours.shape == own.shape
    else:
        assert isinstance(ours, Exception)
    assert torch.equal(denoise(unet, TIMESTEPS), fresh())


# Load.


@thorough
def test_signatures_that_keep_changing_are_bounded_and_what_is_dropped_is_freed() -> None:
    """Round after round of sizes, with room for fewer."""
    unet = optimized(max_captures=2)
    sizes = [(8, 8), (8, 12), (12, 8)]
    context, alive = torch.ones(1, 3, 6), []

    @torch.no_grad()
    def round_trip() -> int:
        for height, width in sizes:
            for t in TIMESTEPS.clone()[:4]:
                unet(torch.ones(1, 4, height, width), t.expand(1), context)
            held = runtime_of(unet)
            assert held is not None
            assert len(held._entries) <= 2
            alive.append(weakref.ref(next(reversed(held._entries.values())).captured.graph))
        gc.collect()
        return sum(reference() is not None for reference in alive)

    living = [round_trip() for _ in range(3)]
    assert living == [2, 2, 2]
    assert deepcache_fx.report(unet).captures == 3 * len(sizes)


@thorough
def test_generation_after_generation_keeps_no_more_tensors() -> None:
    unet = optimized()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    counts = []
    for _ in range(4):
        for _ in range(5):
            for size in (8, 12):
                denoise(unet, TIMESTEPS.clone()[:4], size=size)
        counts.append(tensors())
    assert counts[1:] == [counts[1]] * 3


LOGGING = ("*/torch/_logging/*", "*/torch/utils/_traceback.py", "*/traceback.py", "*/logging/*")
"""Whose memory is not counted: pytest keeps what PyTorch logs."""


class TinyUNet(torch.nn.Module):
    """Captured in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.last = (torch.nn.Conv2d(i, 4, 3, padding=1) for i in (4, 4, 8))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        skip = self.first(x) + timesteps[:, None, None, None] * context.mean()
        return self.last(torch.cat([self.deep(self.deep(skip).relu()), skip], dim=1))


@thorough
def test_memory_does_not_grow_over_200_generations_of_twelve_signatures() -> None:
    """Room for eight: round after round is captured anew, and leaves nothing behind."""
    unet = deepcache_fx.optimize(TinyUNet(), 2, **TO_THE_BIT)
    shapes = [(size, batch) for size in (4, 6, 8, 12) for batch in (1, 2, 3)]
    timesteps = TIMESTEPS.clone()[:3]

    def generate_67_times() -> None:
        for k in range(67):
            size, batch = shapes[k if k < 12 else 4 + k % 8]
            denoise(unet, timesteps, size=size, batch=batch)  # type: ignore[arg-type]

    def traced() -> tuple[int, int]:
        gc.collect()
        found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, file) for file in LOGGING])
        return sum(trace.size for trace in found.traces), deepcache_fx.report(unet).captures

    tracemalloc.start()
    try:
        generate_67_times()
        before, captures = traced()
        generate_67_times()
        generate_67_times()
        after, captures_after = traced()
    finally:
        tracemalloc.stop()
    held = runtime_of(unet)
    assert held is not None
    assert len(held._entries) == 8
    assert captures_after - captures > 16
    assert after - before < 20_000 * (captures_after - captures)  # PyTorch itself keeps half as much of each


def test_a_thread_that_ends_takes_its_cache_along() -> None:
    unet = optimized()
    denoise(unet, TIMESTEPS[:1])
    features: list[weakref.ref[Any]] = []

    def work() -> None:
        denoise(unet, TIMESTEPS[:2])
        held = runtime_of(unet)
        assert held is not None
        features.extend(weakref.ref(slot.feature) for slot in held._state.slots)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert len(features) == 1
    assert features[0]() is None


# Offload.


def test_sequential_offload_is_refused_with_the_reason() -> None:
    """Its hooks bring each layer's weights in and out within a call: a graph of the whole would find none."""
    unet = cpu_offload(CompVisUNet(), execution_device=torch.device("cpu"))
    keys = set(unet.__dict__)
    with pytest.raises(DeepCacheError, match=r"(?i)sequential.*offload"):
        deepcache_fx.optimize(unet, **TO_THE_BIT)
    assert set(unet.__dict__) == keys


HOOKED: dict[str, Callable[[Any], object]] = {
    "group_offloading": lambda unet: unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "layerwise_casting": lambda unet: unet.enable_layerwise_casting(torch.float16, torch.float32),
}


@pytest.mark.parametrize("hook", HOOKED)
def test_what_moves_or_casts_weights_within_a_call_is_refused_with_the_reason(hook: str) -> None:
    """Before, by `optimize`; after, by the first call, and the model is then as it was."""
    unet = pipelines.unet()
    HOOKED[hook](unet)
    with pytest.raises(DeepCacheError, match=rf"diffusers' hook '{hook}'"):
        deepcache_fx.optimize(unet, **TO_THE_BIT)
    unet = deepcache_fx.optimize(pipelines.unet(), **TO_THE_BIT)
    HOOKED[hook](unet)
    with pytest.raises(DeepCacheError, match=rf"diffusers' hook '{hook}'"), torch.no_grad():
        unet(torch.ones(1, 4, 16, 16), torch.tensor(1), torch.ones(1, 12, models.TEXT))
    assert runtime_of(unet) is None


def test_a_users_own_hook_sees_every_call_and_may_change_the_output() -> None:
    from accelerate.hooks import ModelHook

    class Halve(ModelHook):
        calls = 0

        def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return output / 2

    unet, hook = optimized(), Halve()
    with torch.no_grad():
        inputs = torch.ones(2, 4, 8, 8), torch.tensor([1, 1]), torch.ones(2, 3, 6)
        whole = unet(*inputs)
        add_hook_to_module(unet, hook)
        deepcache_fx.reset(unet)
        assert torch.equal(unet(*inputs), whole / 2)
    assert hook.calls == 1


# Saving, and what is read.


@thorough
def test_what_is_written_bears_no_trace_and_what_is_read_back_works(tmp_path: Any) -> None:
    pipe = small.pipeline()
    plain = generate(pipe)
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    cached = generate(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    torch.save(pipe.unet.state_dict(), tmp_path / "weights.pt")
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"deepcache" not in file.read_bytes().lower(), file
    again = small.pipeline()
    with torch.no_grad():
        for parameter in again.unet.parameters():
            parameter.zero_()
    again.unet.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(generate(again), plain)
    deepcache_fx.optimize(again, **TO_THE_BIT)
    assert torch.equal(generate(again), cached)
    duplicate = pickle.loads(pickle.dumps(pipe.unet))
    assert type(duplicate) is diffusers.UNet2DConditionModel
    assert torch.equal(generate(pipe), cached)  # the original is none the worse


class Malicious:
    def __init__(self, marker: Any) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def test_a_malicious_pickle_beside_what_is_loaded_is_not_opened(tmp_path: Any) -> None:
    from deepcache_fx.comparing.loading import load_pipeline

    marker = tmp_path / "executed"
    payload = pickle.dumps(Malicious(marker))
    pickle.loads(payload).close()
    assert marker.exists(), "the payload works where somebody does open it"
    marker.unlink()
    directory = tmp_path / "model"
    small.pipeline().save_pretrained(directory)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "pytorch_model.bin"):
        (directory / name).write_bytes(payload)
    for name in ("schedule.json", "prompts.pkl", "unet/cache.pt", "unet/model.pt2"):
        (directory / name).write_bytes(payload)
    pipe = load_pipeline(str(directory), dtype=torch.float32, device=torch.device("cpu"))
    deepcache_fx.optimize(pipe, **TO_THE_BIT)
    generate(pipe, 2)
    assert not marker.exists()
    (directory / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Exception):  # noqa: B017 - whoever refuses it, nothing is executed
        load_pipeline(str(directory), dtype=torch.float32, device=torch.device("cpu"))
    assert not marker.exists()
