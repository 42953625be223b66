"""The node in ComfyUI itself: `COMFYUI=path make test-comfyui`. Its server runs on the CPU, with random models.

The oracle is a node of the tests: the model's own forward with the deep operand replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.comfyui.server import CHECKOUT, Done, Server, prepare
from tests.comfyui.workflows import Link, Workflow

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(CHECKOUT is None, reason="COMFYUI names no checkout of ComfyUI"),
]
Build = Callable[[Workflow], None]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui") / "base"
    prepare(base)
    running = Server(base)
    yield running
    running.stop()


def nothing(_: Workflow) -> None: ...


def run(server: Server, how: str, before: Build = nothing, after: Build = nothing, **sampler: object) -> Done:
    """A workflow with the node, with the oracle in its place, or with neither."""
    workflow = Workflow()
    before(workflow)
    if how == "cached":
        workflow.cache()
    elif how == "oracle":
        workflow.oracle()
    after(workflow)
    workflow.sample(**sampler)  # type: ignore[arg-type]
    if how == "cached":
        workflow.report()
    return server.run(workflow)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def lora(workflow: Workflow) -> None:
    workflow.patch("LoraLoaderModelOnly", lora_name="random.safetensors", strength_model=1.0)


def batch(workflow: Workflow) -> None:
    workflow.latent = workflow.add("EmptyLatentImage", width=64, height=64, batch_size=2)


def free_u(workflow: Workflow) -> None:
    workflow.patch("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)


def combined(workflow: Workflow, first: Link, second: Link) -> None:
    workflow.positive = workflow.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)


def areas(workflow: Workflow) -> None:
    workflow.latent = workflow.add("EmptyLatentImage", width=128, height=64, batch_size=1)
    cat = workflow.prompt("a cat")
    area = workflow.add("ConditioningSetArea", conditioning=cat, width=64, height=64, x=0, y=0, strength=1.0)
    combined(workflow, area, workflow.positive)


def prompts_in_turn(workflow: Workflow) -> None:
    cat = workflow.prompt("a cat")
    ranges = ((workflow.positive, 0.0, 0.4), (cat, 0.4, 1.0))
    parts = [
        workflow.add("ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end)
        for prompt, start, end in ranges
    ]
    combined(workflow, *parts)


def control(workflow: Workflow) -> None:
    net = workflow.add("ControlNetLoader", control_net_name="random.safetensors")
    picture = workflow.add("LoadImage", image="picture.png")
    applied = workflow.add(
        "ControlNetApplyAdvanced",
        positive=workflow.positive,
        negative=workflow.negative,
        control_net=net,
        image=picture,
        strength=0.8,
        start_percent=0.0,
        end_percent=0.6,
    )
    workflow.positive, workflow.negative = applied, [applied[0], 1]


def lora_for_one_prompt(workflow: Workflow) -> None:
    hook = workflow.add("CreateHookLora", lora_name="random.safetensors", strength_model=1.0, strength_clip=0.0)
    workflow.positive = workflow.add(
        "ConditioningSetProperties", cond_NEW=workflow.positive, strength=1.0, set_cond_area="default", hooks=hook
    )


def reading(name: str) -> Build:
    def patched(workflow: Workflow) -> None:
        workflow.patch("TestAttentionPatch", reads=name)

    return patched


def split(workflow: Workflow) -> None:
    workflow.patch("TestSplitCalls", alternately=True)


RIGHT: dict[str, tuple[Build, Build, dict[str, object]]] = {
    "plain": (nothing, nothing, {}),
    "batch of two": (batch, nothing, {}),
    "LoRA before": (lora, nothing, {}),
    "LoRA after": (nothing, lora, {}),
    "FreeU": (free_u, nothing, {}),
    "areas": (areas, nothing, {}),
    "prompts in turn": (prompts_in_turn, nothing, {}),
    "ControlNet to 60 %": (control, nothing, {}),
    "attention patch": (reading("cond_or_uncond"), nothing, {}),
    "calls split, in turns": (split, nothing, {}),
    "second order, karras": (nothing, nothing, {"sampler": "heun", "scheduler": "karras"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_workflow_is_right_to_the_oracle(server: Server, name: str) -> None:
    before, after, sampler = RIGHT[name]
    plain, expected, found = (run(server, how, before, after, **sampler) for how in ("plain", "oracle", "cached"))
    assert [plain.error, expected.error, found.error] == [None] * 3
    assert "0 uncached" in found.texts[0], found.texts[0]
    assert distance(found.latents[0], expected.latents[0]) < 1e-5
    assert distance(expected.latents[0], plain.latents[0]) > 1e-3  # so that the cache matters


def easy_cache(workflow: Workflow) -> None:
    workflow.patch("EasyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)


def self_attention_guidance(workflow: Workflow) -> None:
    workflow.patch("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0)


UNCACHED: dict[str, tuple[Build, Build, str]] = {
    "a patch that reads the sigma": (reading("sigmas"), nothing, "data-dependent"),
    "a patch that reads the run's sigmas": (reading("sample_sigmas"), nothing, "transformer_options['sample_sigmas']"),
    "a patch that keeps what it saw": (reading("keeps"), nothing, "keeps something of each call"),
    "a LoRA for one prompt": (lora_for_one_prompt, nothing, "a conditioning has weights of its own"),
    "EasyCache inside": (nothing, easy_cache, "another node wraps the UNet"),
}


@pytest.mark.parametrize("name", UNCACHED)
def test_what_cannot_be_cached_is_as_without_the_node_and_says_why(server: Server, name: str) -> None:
    before, after, reason = UNCACHED[name]
    plain, found = run(server, "plain", before, after), run(server, "cached", before, after)
    assert found.error is None
    assert reason in found.texts[0]
    assert torch.equal(found.latents[0], plain.latents[0])


def test_without_the_node_all_is_as_before_it(server: Server) -> None:
    before = run(server, "plain", seed=5)
    run(server, "cached", seed=5)
    assert torch.equal(run(server, "plain", seed=5, cfg=3.0).latents[0], before.latents[0])
    fresh = Workflow()
    fresh.patch("FreeU_V2", b1=1.0, b2=1.0, s1=1.0, s2=1.0)
    fresh.sample(seed=6)
    assert server.run(fresh).error is None


def test_an_interrupted_run_and_an_unloaded_model_leave_nothing(server: Server) -> None:
    expected = run(server, "cached", seed=7).latents[0]

    def interrupting(workflow: Workflow) -> None:
        workflow.patch("TestInterrupting", step=3)

    assert run(server, "cached", after=interrupting, seed=8).error is not None
    server.free()
    assert torch.equal(run(server, "cached", seed=7).latents[0], expected)
    assert "memory leak" not in server.text()


def test_two_samplers_of_one_model_are_two_runs(server: Server) -> None:
    found = {}
    for how in ("cached", "oracle"):
        workflow = Workflow()
        workflow.cache() if how == "cached" else workflow.oracle()
        workflow.sample(seed=9)
        workflow.latent = workflow.add(
            "LatentUpscale",
            samples=workflow.latent,
            upscale_method="nearest-exact",
            width=96,
            height=96,
            crop="disabled",
        )
        workflow.sample(seed=9, denoise=0.5, steps=6)
        found[how] = server.run(workflow).latents
    for cached, expected in zip(found["cached"], found["oracle"], strict=True):
        assert distance(cached, expected) < 1e-5


def test_a_model_without_skip_connections_and_bad_options_are_refused_with_the_remedy(server: Server) -> None:
    workflow = Workflow()
    workflow.cache(start_percent=0.9, end_percent=0.5)
    workflow.sample()
    assert "start_percent must be less than end_percent" in (server.run(workflow).error or "")


def test_every_input_has_a_tooltip(server: Server) -> None:
    for name in ("DeepCacheFX", "DeepCacheFXReport", "DeepCacheFXCalibratedSchedule"):
        node = server.get(f"/object_info/{name}")[name]
        for inputs in node["input"].values():
            assert all(options["tooltip"] for _, options in inputs.values())
        assert all(node["output_tooltips"])


def test_the_example_workflow_runs(server: Server) -> None:
    import json

    file = Path(__file__).parents[2] / "comfyui" / "example_workflows" / "deepcache_fx_api.json"
    workflow = json.loads(file.read_text())
    for node in workflow.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node["inputs"]["ckpt_name"] = "random.safetensors"
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=64, height=64)
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 6
    done = server.run(workflow)
    assert done.error is None
    assert done.images
    assert "shallow" in done.texts[0]


def test_where_a_checkout_is_named_it_is_one() -> None:
    assert (Path(os.environ["COMFYUI"]) / "main.py").is_file()
