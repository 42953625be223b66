"""Attention kernels chosen by a timer; the kernels themselves need a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from passes import choose_attention, run_passes
from passes.choose_attention import KERNELS, ChooseAttention, fastest
from passes.shared.match import is_op, tensor

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    choose_attention._chosen.clear()
    yield
    choose_attention._chosen.clear()


@pytest.fixture(autouse=True)
def kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators refuse the CPU: plain attention in their place, each under its own name, and a wrong one."""

    def kernel(scale_error: float = 1.0) -> Callable[..., Any]:
        def build(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
            def run(q: Any, k: Any, v: Any, mask: Any, *, scale: float | None) -> tuple[torch.Tensor, None]:
                scale = scale or 1 / math.sqrt(q.shape[-1])
                logits = (q.float() @ k.float().mT * scale) + (0 if mask is None else mask)
                return (logits.softmax(-1) @ v.float() * scale_error).to(q.dtype), None

            return run, (q, k, v, mask)

        return build

    def refusing(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no such head dimension")

        return run, (q, k, v)

    replacements = {"flash": kernel(), "efficient": kernel(), "wrong": kernel(1.5), "refusing": refusing}
    monkeypatch.setattr(choose_attention, "KERNELS", replacements)


def graph(
    keys: int = 77,
    dim: int = 40,
    dtype: torch.dtype = torch.bfloat16,
    spell: Callable[..., Any] | None = None,
    **kw: Any,
) -> fx.GraphModule:
    """q, k, v -> attention -> transpose -> reshape, as attention processors write it."""
    mode = FakeTensorMode()
    g = fx.Graph()
    inputs = []
    for name, tokens in (("q", 64), ("k", keys), ("v", keys)):
        node = g.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(2, tokens, 8, dim, dtype=dtype).transpose(1, 2)
        inputs.append(node)
    attention = g.call_function(ATTENTION, tuple(inputs), kw)
    turned = g.call_function(aten.transpose.int, (attention, 1, 2))
    reshape = aten.reshape.default if spell is None else spell
    g.output((g.call_function(reshape, (turned, [2, 64, 8 * dim])),))
    gm = fx.GraphModule(torch.nn.Module(), g)
    from passes.runner import refresh_metadata

    with mode:
        refresh_metadata(gm)
    return gm


def timer(preferred: str) -> Callable[[Callable[[], object], torch.device], float]:
    """The kernel of this name, by its place in the order of measurement, is fast; the first call is PyTorch's own."""
    order = ["default", *(name for name in choose_attention.KERNELS)]
    calls: list[str] = []

    def time(run: Callable[[], object], device: torch.device) -> float:
        run()
        tried = [name for name in order if name not in ("wrong", "refusing")]
        calls.append(tried[len(calls) % len(tried)])
        return 1.0 if calls[-1] == preferred else 2.0

    return time


def choose(gm: fx.GraphModule, preferred: str) -> tuple[fx.GraphModule, bool]:
    result, (record,) = run_passes(gm, [ChooseAttention(timer(preferred), device_types=("cpu",))])
    return result, record.modified


@pytest.mark.parametrize("preferred", ["flash", "efficient"])
def test_takes_the_kernel_that_the_timer_prefers(preferred: str) -> None:
    gm = graph()
    before = len(gm.graph.nodes)
    after, modified = choose(gm, preferred)
    assert modified
    assert len(after.graph.nodes) == before + 1  # the kernel and one item of what it returns, for attention
    assert not after.graph.find_nodes(op="call_function", target=ATTENTION)
    assert list(choose_attention._chosen.values()) == [preferred]
    assert all(tensor(node) is not None for node in after.graph.nodes if node.op == "placeholder")


def test_keeps_attention_where_nothing_beats_it_and_a_second_run_changes_nothing() -> None:
    gm = graph()
    after, modified = choose(gm, "default")
    assert after is gm
    assert not modified
    after, modified = choose(*choose(graph(), "flash")[:1], "flash")
    assert not modified


def test_what_the_graph_computes_stays() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 8, 40, dtype=torch.bfloat16).transpose(1, 2) for n in (64, 77, 77)]
    expected = graph()(*inputs)[0]
    after, _ = choose(graph(), "efficient")
    torch.testing.assert_close(after(*inputs)[0], expected, rtol=2e-2, atol=2e-2)


def test_measuring_draws_no_number_of_the_users() -> None:
    before = torch.get_rng_state()
    choose(graph(), "flash")
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_calls_are_measured_once() -> None:
    times = 0

    def count(run: Callable[[], object], device: torch.device) -> float:
        nonlocal times
        times += 1
        return 1.0

    for gm in (graph(), graph()):
        run_passes(gm, [ChooseAttention(count, device_types=("cpu",))])
    assert times == 3  # PyTorch's own and the two kernels that agree with it
    run_passes(graph(keys=64), [ChooseAttention(count, device_types=("cpu",))])
    assert times == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"dim": 36},
        {"dropout_p": 0.1},
        {"enable_gqa": True},
        {"spell": aten.view.default},
    ],
    ids=str,
)
def test_leaves_alone_what_no_kernel_takes_as_it_is(changes: dict[str, Any]) -> None:
    if changes.get("spell") is aten.view.default:
        gm = graph(dim=40)
        for node in gm.graph.find_nodes(op="call_function", target=aten.reshape.default):
            node.target = aten.view.default
    else:
        gm = graph(**changes)
    result, modified = choose(gm, "flash")
    assert result is gm
    assert not modified


def test_other_devices_are_left_alone() -> None:
    gm = graph()
    _, (record,) = run_passes(gm, [ChooseAttention(timer("flash"))])
    assert not record.modified


def choose_in(directory: Path, preferred: str) -> tuple[fx.GraphModule, str | None]:
    """As another process: nothing is known but what lies in the directory."""
    choose_attention._chosen.clear()
    chooser = ChooseAttention(timer(preferred), device_types=("cpu",), directory=directory)
    result, _ = run_passes(graph(), [chooser])
    return result, next(iter(choose_attention._chosen.values()))


def test_every_process_takes_the_kernel_that_the_first_one_chose(tmp_path: Path) -> None:
    assert choose_in(tmp_path / "choices", "efficient")[1] == "efficient"
    assert choose_in(tmp_path / "choices", "flash")[1] == "efficient"
    assert choose_in(tmp_path / "others", "default")[1] is None
    assert choose_in(tmp_path / "others", "flash")[1] is None


def test_kernels_that_are_switched_off_are_not_tried_and_ask_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_in(tmp_path, "flash")[1] == "flash"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert "flash" not in choose_attention.enabled()
        assert choose_in(tmp_path, "efficient")[1] != "flash"
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "flash" not in choose_attention.enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert choose_in(tmp_path, "efficient")[1] == "flash"
    monkeypatch.setattr(choose_attention, "SWITCHES", dict.fromkeys(choose_attention.KERNELS, lambda: False))
    assert choose_in(tmp_path, "flash")[1] is None
    assert set(KERNELS) == {"flash", "efficient", "cudnn"}


def test_other_shapes_versions_and_devices_ask_other_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    call = choose_attention.AttentionCall(
        torch.device("cpu"), torch.float16, ((1, 2, 3, 8),) * 3, ((48, 24, 8, 1),) * 3, None, False, None
    )
    asked = [choose_attention.question(call, ("flash",)), choose_attention.question(call, ())]
    asked.append(choose_attention.question(dataclasses.replace(call, causal=True), ("flash",)))
    monkeypatch.setattr(torch, "__version__", "2.0")
    asked.append(choose_attention.question(call, ("flash",)))
    assert len({json.dumps(item) for item in asked}) == 4


def test_a_kernel_that_is_wrong_or_refuses_is_never_chosen() -> None:
    with FakeTensorMode():
        call = ChooseAttention(device_types=("cpu",))._read(next(n for n in graph().graph.nodes if is_op(n, ATTENTION)))
    assert call is not None
    seen = 0

    def fast_in_the_end(run: Callable[[], object], device: torch.device) -> float:
        nonlocal seen
        seen += 1
        return 10.0 - seen

    assert fastest(call, fast_in_the_end) == "efficient"
    assert seen == 3


def test_the_operators_take_the_arguments_they_are_given() -> None:
    """The real table, on fake CUDA tensors: every operator accepts the call and returns attention's shape."""
    with FakeTensorMode():
        q, k = torch.empty(2, 8, 64, 40, device="cuda", dtype=torch.float16), None
        k = torch.empty(2, 8, 77, 40, device="cuda", dtype=torch.float16)
        for build in (choose_attention._flash, choose_attention._efficient, choose_attention._cudnn):
            built = build(q, k, k, None, False)
            assert built is not None
            operator, arguments = built
            assert operator(*arguments, scale=0.2)[0].shape == q.shape
        assert choose_attention._flash(q, k, k, torch.zeros(64, 77), False) is None
    assert list(KERNELS) == ["flash", "efficient", "cudnn"]
