"""The GroupNorm operators and their Triton kernels: in PyTorch, in Triton's interpreter, compiled for Hopper, on a GPU.

Triton reads TRITON_INTERPRET when it is imported, and what it then makes of kernels stays so for the process. So one
test starts this file again in a process of its own, where the tests marked `interpreted` run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import passes.kernels
from tests.families import examples

ours = torch.ops.deepcache_fx
operators: ModuleType = importlib.import_module("passes.kernels.group_norm")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_match_fp64_in_tritons_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs kernels that are not interpreted")


@dataclass(frozen=True)
class Case:
    """Inputs of a norm, made from a seed."""

    seed: int
    samples: int
    num_groups: int
    group: int
    positions: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    mean: float
    """Of the inputs, whose standard deviation is about one."""
    affine: bool
    silu: bool
    addend_rows: int
    """0 for no addend, 1 for one that all samples share, 2 for one per sample."""
    boundary: float
    """Where a concatenation is cut in two, as a share of the channels."""

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        channels = self.num_groups * self.group
        x = torch.randn(self.samples, channels, *self.positions, generator=generator)
        x = x * self.column(torch.rand(channels, generator=generator) + 0.5) + self.mean
        weight, bias = (torch.randn(channels, generator=generator).to(device) for _ in range(2))
        x = self.in_layout(x.to(device, self.dtype))
        return x, *((weight, bias) if self.affine else (None, None))

    def column(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers per channel, for broadcasting over positions."""
        return values[(..., *[None] * len(self.positions))]

    def in_layout(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else x.contiguous()

    def addend(self, device: str) -> torch.Tensor | None:
        if not self.addend_rows:
            return None
        rows = 1 if self.addend_rows == 1 else self.samples
        generator = torch.Generator().manual_seed(self.seed + 1)
        values = torch.randn(rows, self.num_groups * self.group, generator=generator)
        return self.column(values.to(device, self.dtype))


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    samples=st.integers(1, 2),
    num_groups=st.integers(1, 5),
    group=st.integers(1, 12),
    positions=st.sampled_from([(1,), (7,), (3, 5), (8, 8), (9, 13), (2, 3, 4)]),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    mean=st.sampled_from([0.0, -3.0, 100.0, 2000.0]),
    affine=st.booleans(),
    silu=st.booleans(),
    addend_rows=st.integers(0, 2),
    boundary=st.floats(0, 1),
)
QUICK: Any = dict(deadline=None, phases=(Phase.explicit, Phase.generate))
"""Settings without shrinking: in the interpreter it takes minutes, and cases are small as it is."""
SD = Case(0, 2, 32, 10, (8, 8), True, torch.bfloat16, 5.0, True, True, 2, 0.5)
"""The channels of Stable Diffusion's first level."""


def assert_normalised(
    got: torch.Tensor, case: Case, x: torch.Tensor, weight: Any, bias: Any, addend: torch.Tensor | None, silu: bool
) -> None:
    """Compare with fp64, allowing for fp32 arithmetic on these magnitudes and for one rounding to the storage type."""
    exact = x.double() if addend is None else x.double() + addend.double()
    values = exact.reshape(case.samples, case.num_groups, -1)
    variance, mean = torch.var_mean(values, dim=-1, correction=0, keepdim=True)
    deviation = (variance + 1e-5).sqrt()
    want = ((values - mean) / deviation).reshape(exact.shape)
    if weight is not None:
        want = want * case.column(weight.double()) + case.column(bias.double())
    want = F.silu(want) if silu else want
    gain = 1.0 if weight is None else max(1.0, float(weight.abs().max()))
    magnitude = float((values.abs().amax(-1, keepdim=True) / deviation).max())
    error = 32 * torch.finfo(torch.float32).eps * (1 + magnitude) * gain + 1e-7
    torch.testing.assert_close(got.double(), want, atol=error, rtol=torch.finfo(case.dtype).eps)
    assert got.dtype == x.dtype


def check_norm(case: Case, device: str = "cpu") -> None:
    x, weight, bias = case.tensors(device)
    addend = case.addend(device)
    before = x.clone()
    got = ours.group_norm(x, weight, bias, case.num_groups, 1e-5, case.silu, addend)
    assert_normalised(got, case, x, weight, bias, addend, case.silu)
    assert got.stride() == x.stride()
    assert torch.equal(x, before)
    assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def check_cat_norm(case: Case, device: str = "cpu") -> None:
    x, weight, bias = case.tensors(device)
    channels = x.shape[1]
    if channels == 1:
        return
    boundary = min(channels - 1, max(1, round(case.boundary * channels)))
    a, b = (case.in_layout(half) for half in torch.tensor_split(x, [boundary], dim=1))
    got = ours.cat_group_norm(a, b, weight, bias, case.num_groups, 1e-5, case.silu)
    assert_normalised(got, case, x, weight, bias, None, case.silu)
    if not (a.is_contiguous() and b.is_contiguous() and case.channels_last):  # single channels lie either way
        assert got.stride() == x.stride()


@pytest.mark.hypothesis
def test_both_operators_in_pytorch_match_fp64() -> None:
    @examples(10)
    @given(CASES)
    def check(case: Case) -> None:
        check_norm(case)
        check_cat_norm(case)

    check()
    check_norm(SD)


def test_a_large_mean_leaves_the_variance_alone() -> None:
    x = (torch.randn(2, 32, 16, 16) + 1000).contiguous(memory_format=torch.channels_last)
    want = F.group_norm(x.double(), 8)
    torch.testing.assert_close(ours.group_norm(x, None, None, 8, 1e-5, False).double(), want, rtol=0, atol=1e-3)


def test_fp64_inputs_are_normalised_in_fp64() -> None:
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.group_norm(x, None, None, 4, 1e-5, False), F.group_norm(x, 4), rtol=0, atol=1e-13)


X = torch.randn(2, 12, 4, 4)
HALVES = X[:, :5].contiguous(), X[:, 5:].contiguous()
LAST = X.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (ours.group_norm, (X, None, None, 4, 1e-5, True)),
        (ours.group_norm, (LAST, torch.randn(12), torch.randn(12), 4, 1e-5, False, torch.randn(2, 12, 1, 1))),
        (ours.group_norm, (X.bfloat16()[..., ::2], torch.randn(12), None, 3, 1e-5, True, torch.randn(12)[None])),
        (ours.cat_group_norm, (*HALVES, torch.randn(12), None, 4, 1e-5, True)),
        (ours.cat_group_norm, (LAST, LAST, None, torch.randn(24), 4, 1e-5, False)),
    ],
)
def test_operators_keep_the_rules_of_torch_library(operator: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator.default, args)


class Norms(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = passes.kernels.cat_group_norm(a, b, None, None, 4, 1e-5, True)
        return ours.group_norm(y, None, None, 4, 1e-5, True, t)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_takes_the_operators_in_one_graph(dynamic: bool) -> None:
    inputs = (*HALVES, torch.randn(2, 12, 1, 1))
    function = torch.compile(Norms(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(function(*inputs), Norms()(*inputs))


@pytest.mark.parametrize("decomposed", [False, True])
def test_torch_export_keeps_the_operators(decomposed: bool) -> None:
    inputs = (*HALVES, torch.randn(2, 12, 1, 1))
    program = torch.export.export(Norms(), inputs, strict=False)
    if decomposed:
        program = program.run_decompositions()
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [ours.cat_group_norm.default, ours.group_norm.default]
    assert torch.equal(program.module()(*inputs), Norms()(*inputs))


def test_parts_in_different_layouts_give_a_contiguous_result() -> None:
    a, b = HALVES[0].contiguous(memory_format=torch.channels_last), HALVES[1]
    got = ours.cat_group_norm(a, b, None, None, 4, 1e-5, False)
    assert got.is_contiguous()
    torch.testing.assert_close(got, F.group_norm(X, 4), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_stays_empty() -> None:
    assert ours.group_norm(X[:0], None, None, 4, 1e-5, True).shape == (0, 12, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.group_norm(X, None, None, 5, 1e-5, False), "must divide the 12 channels, got 5"),
        (lambda: ours.group_norm(X[..., 0, 0], None, None, 4, 1e-5, False), r"positions\), got .*\(2, 12\)"),
        (lambda: ours.group_norm(X.long(), None, None, 4, 1e-5, False), r"floating .*int64"),
        (
            lambda: ours.group_norm(X, X[0, :3, 0, 0], None, 4, 1e-5, False),
            r"weight must have shape \(12,\), got \(3,\)",
        ),
        (lambda: ours.group_norm(X, None, None, 4, 1e-5, False, X), r"addend must be .*C = 12, got \(2, 12, 4, 4\)"),
        (lambda: ours.group_norm(X, None, None, 4, 1e-5, False, X[:, :3, 0, 0]), r"addend .*got \(2, 3\)"),
        (lambda: ours.cat_group_norm(X, X[:1], None, None, 4, 1e-5, False), "differ in channels only"),
    ],
)
def test_arguments_that_do_not_fit_together_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def forget_kernels() -> Iterator[None]:
    operators._kernels.cache_clear()
    yield
    operators._kernels.cache_clear()


@pytest.mark.usefixtures("forget_kernels")
def test_without_triton_the_operators_say_so_and_run_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith("passes.kernels.group_norm_"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("group_norm_launch", "group_norm_triton"):
        monkeypatch.delattr(passes.kernels, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="runs as plain PyTorch: triton cannot be imported"):
        assert operators._kernels() is None


# Tiles: no kernel runs.


@needs_triton
@pytest.mark.parametrize(
    ("group", "groups", "channels"), [(10, 12, 120), (20, 6, 120), (40, 3, 120), (60, 2, 120), (80, 1, 80), (1, 32, 32)]
)
def test_tiles_are_whole_groups_in_16_byte_steps(group: int, groups: int, channels: int) -> None:
    from passes.kernels.group_norm_launch import tiles

    found = tiles(group, 32, 128)
    assert (found.groups, found.groups * group) == (groups, channels)
    assert found.block_c >= channels
    assert found.count * groups >= 32 > (found.count - 1) * groups


@needs_triton
@examples(50)
@given(st.integers(1, 20000), st.sampled_from([1, 4, 32]), st.integers(0, 200))
def test_programs_share_all_rows_and_none_is_idle(size: int, block: int, most: int) -> None:
    from passes.kernels.group_norm_launch import share

    programs, steps = share(size, block, most)
    assert programs <= max(1, most)
    assert (programs - 1) * steps * block < size <= programs * steps * block


# The kernels: interpreted, compiled, run.


@needs_triton
@compiled
def test_kernels_match_fp64_in_tritons_interpreter() -> None:
    """Runs the tests below in a process whose Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--noconftest"]
    result = subprocess.run(
        [*command, "-o", "addopts=", "-q", "-k", "interpreted", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\n4 passed, \d+ deselected", result.stdout), result.stdout


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The launching module, which the operators are made to use on the CPU."""
    launch = importlib.import_module("passes.kernels.group_norm_launch")
    monkeypatch.setattr(operators, "_launcher", lambda x, group: launch if launch.supports(x, group) else None)
    return launch


@interpreted
def test_interpreted_small_feature_maps_match_fp64(kernels: ModuleType) -> None:
    @settings(max_examples=12, **QUICK)
    @given(CASES)
    def check(case: Case) -> None:
        check_norm(case)

    check()


@interpreted
def test_interpreted_large_feature_maps_match_fp64(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HELD", 0)
    monkeypatch.setattr(kernels, "TILE", 1024)
    monkeypatch.setattr(kernels, "RUN", 24)

    @settings(max_examples=8, **QUICK)
    @given(CASES)
    def check(case: Case) -> None:
        check_norm(case)

    check()


@interpreted
def test_interpreted_concatenations_match_fp64(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", 512)

    @settings(max_examples=5, **QUICK)
    @given(CASES)
    def check(case: Case) -> None:
        check_cat_norm(case)

    check()


@interpreted
def test_interpreted_kernels_take_the_channels_of_stable_diffusion(kernels: ModuleType) -> None:
    check_norm(SD)
    check_cat_norm(SD)


class Compile:
    """Stands in for a kernel: compiles it for a Hopper GPU with the arguments of the launch, and runs nothing."""

    def __init__(self, kernel: Any, ptx: dict[str, str]) -> None:
        self.kernel = kernel
        self.ptx = ptx

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constants
        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
        signature, fixed, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if name in constants or value is None or (type(value) is int and value == 1):
                signature[name], fixed[(place,)] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = types[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
            if is_tensor or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, fixed, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        self.ptx[self.kernel.__name__] = built.asm["ptx"]


@needs_triton
@compiled
@pytest.mark.parametrize("channels_last", [True, False])
def test_kernels_compile_for_hopper_and_read_in_16_byte_vectors(
    kernels: ModuleType, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptx: dict[str, str] = {}
    for name in ("whole_groups", "statistics", "normalize"):
        monkeypatch.setattr(kernels.kernels, name, Compile(getattr(kernels.kernels, name), ptx))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    large, small = (
        torch.empty(2, 320, size, size, dtype=torch.bfloat16).contiguous(memory_format=layout) for size in (64, 4)
    )
    ours.group_norm(small, None, None, 32, 1e-5, True, torch.empty(2, 320, 1, 1))
    ours.cat_group_norm(large, large, torch.empty(640), torch.empty(640), 32, 1e-5, True)
    assert set(ptx) == {"whole_groups", "statistics", "normalize"}
    for name in ("statistics", "normalize"):
        assert not re.search(r"ld\.global(\.v2)?\.b16", ptx[name]), name
        assert "ld.global.v4.b32" in ptx[name], name
    assert "st.global.v4.b32" in ptx["normalize"]


@needs_triton
@compiled
@pytest.mark.gpu
def test_both_operators_on_a_gpu_match_fp64() -> None:
    @examples(60)
    @given(CASES)
    def check(case: Case) -> None:
        check_norm(case, "cuda")
        check_cat_norm(case, "cuda")

    check()
    for channels, size in ((320, 64), (640, 64), (1280, 32), (960, 64)):
        for channels_last in (True, False):
            case = Case(0, 2, 32, channels // 32, (size, size), channels_last, torch.bfloat16, 5, True, True, 2, 0.51)
            check_norm(case, "cuda")
            check_cat_norm(case, "cuda")


@needs_triton
@compiled
@pytest.mark.gpu
def test_inductor_runs_the_operators_on_a_gpu() -> None:
    inputs = [x.cuda() for x in (*HALVES, torch.randn(2, 12, 1, 1))]
    function = torch.compile(Norms(), fullgraph=True)
    torch.testing.assert_close(function(*inputs), Norms()(*inputs), rtol=1e-5, atol=1e-5)
