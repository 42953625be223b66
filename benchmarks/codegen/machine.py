"""Triton kernels as machine code: registers, spills and shared memory, by Triton's own compilers. Nothing is loaded."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

AMD = "gfx942"
"""The architecture of an MI300, for which our own kernels are compiled beside those of `devices`."""


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one architecture."""

    kernel: str
    arch: str
    configuration: str
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Stored to memory and loaded again because registers ran out."""
    shared_bytes: int


def target(arch: str) -> Any:
    """Triton's name of an architecture: sm_90, gfx942."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_generated(kernels: Mapping[str, str], archs: Sequence[str]) -> Iterator[Compiled]:
    """Every configuration among which Inductor would choose by timing, of kernels that it wrote, within `pretended`."""
    from torch._inductor.codecache import PyCodeCache
    from triton.compiler import ASTSource

    for name, body in kernels.items():
        found = re.search(r"async_compile\.triton\('\w+', '''(.*?)'''", body, re.DOTALL)
        assert found is not None, f"{name} is no Triton kernel"
        tuner = getattr(PyCodeCache.load(found[1]), re.search(r"^def (\w+)\(", found[1], re.MULTILINE)[1])  # type: ignore[index]
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            for arch in archs:
                yield _compile(source, name, arch, str(config), tuner._create_compile_options(config, meta))


def compile_own(cases: Sequence[NormCase], archs: Sequence[str]) -> Iterator[Compiled]:
    """What `passes.kernels.group_norm_launch` launches for these feature maps."""
    from passes.kernels import group_norm_launch

    for case in cases:
        x, rest = case.tensors()
        launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        with _recorded(launches):
            group_norm_launch.normalize(
                x, *rest, num_groups=case.groups, eps=1e-5, silu=True, channels_last=case.channels_last
            )
        for function, args, options in launches:
            for arch in archs:
                source, chosen = _specialised(function, args, options, arch)
                yield _compile(source, function.__name__, arch, str(case), chosen)


@dataclass(frozen=True)
class NormCase:
    """A call of our GroupNorm."""

    channels: int
    positions: int
    """Height, and width, of the feature map."""
    groups: int = 32
    samples: int = 2
    cat: bool = False
    """True where it reads two halves."""
    addend: bool = False
    channels_last: bool = True
    dtype: torch.dtype = torch.float16

    def tensors(self) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The output, and (a, b, addend, weight, bias), without values."""
        shape = (self.samples, self.channels, self.positions, self.positions)
        out = torch.empty(shape, dtype=self.dtype, device="meta")
        half = out[:, : self.channels // 2]
        vector = torch.empty(self.channels, dtype=self.dtype, device="meta")
        column = torch.empty(self.samples, self.channels, dtype=self.dtype, device="meta") if self.addend else None
        return out, (half if self.cat else out, half if self.cat else None, column, vector, vector)


@contextmanager
def _recorded(launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """In the block launches of Triton kernels are written down, and do not happen."""
    from triton.runtime.jit import KernelInterface

    def remember(self: Any, grid: Any) -> Any:
        return lambda *args, **options: launches.append((self, args, options))

    with patch.object(KernelInterface, "__getitem__", remember):
        yield


def _specialised(
    function: Any, args: Sequence[Any], options: Mapping[str, Any], arch: str
) -> tuple[Any, dict[str, Any]]:
    """What Triton compiles for a call: types, constants, and what it knows of addresses and sizes."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    backend = make_backend(target(arch))
    given = [MockTensor(arg.dtype, list(arg.shape)) if isinstance(arg, torch.Tensor) else arg for arg in args]
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, chosen = binder(*given, **options, debug=False)
    chosen, signature, constants, attributes = function._pack_args(
        backend, {**options, "debug": False}, bound, specialization, chosen
    )
    return ASTSource(function, signature, constants, attributes), dict(chosen.__dict__)


def _compile(source: Any, name: str, arch: str, configuration: str, options: Mapping[str, Any]) -> Compiled:
    import triton

    made = triton.compile(source, target=target(arch), options=dict(options))
    shared = int(made.metadata.shared)
    if arch.startswith("sm_"):
        registers, spilled = _of_ptx(made.asm["ptx"], int(arch[3:]))
    else:
        text = made.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    return Compiled(name, arch, configuration, registers, spilled, shared)


def _of_ptx(ptx: str, number: int) -> tuple[int, int]:
    """Registers and spilled bytes, which ptxas tells; those in a loaded kernel need a device."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(number).path, "-v", f"--gpu-name={sm_arch_from_capability(number)}", str(path)]
        done = subprocess.run([*command, "-o", str(path.with_suffix(".o"))], capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert registers is not None, done.stderr
    assert spilled is not None, done.stderr
    return int(registers[1]), int(spilled[1])
