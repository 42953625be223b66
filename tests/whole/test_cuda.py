"""What only a GPU can show: skipped where there is none."""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor

import deepcache_fx
from passes import choose_attention
from tests import models
from tests.compvis import CompVisUNet

pytestmark = pytest.mark.gpu

STEPS = 9


@torch.no_grad()
def denoise(unet: Any, seed: int = 0, size: int = 8, device: str = "cuda") -> torch.Tensor:
    """As `tests.compvis.denoise`, on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, size, size, generator=generator).to(device)
    context = torch.randn(2, 3, 6, generator=generator).to(device)
    for t in torch.arange(950, -1, -50, device=device)[:STEPS]:
        x = x - 0.1 * unet(x, t.expand(2), context)
    return x


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float((actual - expected).norm() / expected.norm()) < tolerance


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return denoise(deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager"))


def test_recorded_graphs_of_the_eager_backend_are_exact(expected: torch.Tensor) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True)
    for _ in range(3):
        assert torch.equal(denoise(unet), expected)
    assert deepcache_fx.report(unet).signatures[0].cuda_graphs == "recorded"


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("cuda_graphs", ["auto", False])
def test_compiled_programs_agree_with_eager_ones(mode: str | None, cuda_graphs: Any, expected: torch.Tensor) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), mode=mode, cuda_graphs=cuda_graphs)
    for _ in range(3):
        close(denoise(unet), expected)
    recorded = deepcache_fx.report(unet).signatures[0].cuda_graphs
    assert recorded == ("recorded" if cuda_graphs == "auto" else "off: cuda_graphs=False")


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_no_step_waits_for_the_device(cuda_graphs: bool) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=cuda_graphs)
    denoise(unet)
    x, context = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 3, 6, device="cuda")
    timesteps = torch.arange(950, -1, -50, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for t in timesteps[:STEPS]:
                x = x - 0.1 * unet(x, t.expand(2), context)
            for number in (900, 800, 700):  # on the CPU
                x = x - 0.1 * unet(x, torch.full((2,), number), context)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert deepcache_fx.report(unet).timestep_syncs == 0


def test_weights_that_went_to_the_cpu_and_back_are_recorded_anew(expected: torch.Tensor) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True)
    denoise(unet)
    unet.to("cpu")
    filler = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]  # where the weights were
    unet.to("cuda")
    assert torch.equal(denoise(unet), expected)
    del filler
    assert "anew because weights had moved" in deepcache_fx.report(unet).signatures[0].cuda_graphs


def test_streams_take_turns_in_the_buffers(expected: torch.Tensor) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True)
    denoise(unet)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(denoise(unet))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_memory_does_not_grow_with_runs() -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True, max_captures=2)
    sizes = (8, 16, 12)

    def once() -> int:
        for size in sizes:
            denoise(unet, size=size)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    once()
    first = once()
    assert [once() for _ in range(5)] == [first] * 5


def test_a_half_precision_pipeline_is_as_close_as_its_compiled_self() -> None:
    plain = models.sd_pipeline(models.sd_unet()).to("cuda", torch.float16)
    cached = copy.deepcopy(plain)
    deepcache_fx.optimize(plain, interval=2, forecast=0, backend="eager", disable="all")
    deepcache_fx.optimize(cached, interval=2, forecast=0)

    def images(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        result: torch.Tensor = pipe("a", num_inference_steps=6, generator=generator, output_type="latent").images
        return result.float()

    for _ in range(2):
        close(images(cached), images(plain), 3e-2)
    assert deepcache_fx.report(cached).last_run == "FsFsFs"


def test_a_shallow_step_takes_the_host_less_than_60_microseconds() -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), interval=1000, backend="eager", cuda_graphs=True)
    x, context = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 3, 6, device="cuda")
    times = []
    with torch.no_grad():
        for t in torch.arange(999, -1, -1, device="cuda")[:300]:
            now = t.expand(2)
            torch.cuda.synchronize()
            started = time.perf_counter()
            unet(x, now, context)
            times.append(time.perf_counter() - started)
    assert sorted(times[10:])[len(times) // 2] < 60e-6


def waits(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A pass after which a step reads a value: recording it fails."""

    def read(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, FakeTensor):
            x.flatten()[0].item()
        return x.clone()

    node = next(iter(graph.graph.find_nodes(op="placeholder")))
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(read, (node,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    graph.recompile()
    return graph


def test_a_recording_that_fails_leaves_the_process_as_it_was(expected: torch.Tensor) -> None:
    before = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True)
    denoise(before)
    broken = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True, passes=[waits])
    for _ in range(2):
        close(denoise(broken), expected)
    assert deepcache_fx.report(broken).signatures[0].cuda_graphs.startswith("not recorded: full step: ")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()
    assert torch.equal(denoise(before), expected)
    after = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True)
    assert torch.equal(denoise(after), expected)
    assert torch.equal(denoise(before), expected)
    assert deepcache_fx.report(after).signatures[0].cuda_graphs == "recorded"


def test_memory_is_back_when_restore_returns() -> None:
    unet = CompVisUNet().cuda()

    def optimized() -> tuple[int, int]:
        deepcache_fx.optimize(unet, backend="eager", cuda_graphs=True)
        denoise(unet, size=64)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    optimized()
    deepcache_fx.restore(unet)  # what PyTorch keeps for itself is there now
    gc.collect()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    gc.disable()
    try:
        during = optimized()
        deepcache_fx.restore(unet)
        after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    finally:
        gc.enable()
    for used, free, left in zip(during, before, after, strict=True):
        assert used > free
        assert left - free <= 0.05 * (used - free)


def test_alternating_records_nothing_again() -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda())
    denoise(unet)
    addresses = [weight.data_ptr() for weight in unet.parameters()]
    for interval in (2, 3, 4):
        deepcache_fx.optimize(unet, interval=interval)
        denoise(unet)
        with deepcache_fx.optimized(unet, interval=5):
            denoise(unet)
    assert [weight.data_ptr() for weight in unet.parameters()] == addresses
    assert deepcache_fx.report(unet).signatures[0].cuda_graphs == "recorded"
    assert deepcache_fx.report(unet).captures == 1


def test_switches_of_arithmetic_are_followed(expected: torch.Tensor) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager", cuda_graphs=True)
    assert torch.equal(denoise(unet), expected)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with_tf32 = denoise(deepcache_fx.optimize(CompVisUNet().cuda(), backend="eager"))
        assert torch.equal(denoise(unet), with_tf32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(denoise(unet), expected)


def test_attention_is_chosen_alike_by_another_process(tmp_path: Path) -> None:
    """Timed within a recorded graph, and remembered: the second one measures nothing."""
    call = choose_attention.AttentionCall(
        torch.device("cuda", 0), torch.float16, ((2, 8, 64, 40),) * 3, ((20480, 2560, 40, 1),) * 3, None, False, None
    )
    choose_attention._chosen.clear()
    first = choose_attention.ChooseAttention(directory=tmp_path)._choose(call)
    choose_attention._chosen.clear()

    def never(run: Any, device: torch.device) -> float:
        raise AssertionError("measured again")

    assert choose_attention.ChooseAttention(never, directory=tmp_path)._choose(call) == first
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_used_while_the_first_is_current(expected: torch.Tensor) -> None:
    unet = deepcache_fx.optimize(CompVisUNet().to("cuda:1"))
    close(denoise(unet, device="cuda:1").to("cuda:0"), expected)
    assert torch.cuda.current_device() == 0
