"""What Inductor generates for a graph: the launches of one step, with the bytes and the arithmetic of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from benchmarks.codegen.devices import LAUNCH_SECONDS, Device

KINDS = ("triton", "own", "conv", "mm", "attention", "other")
"""Of launches: kernels that Inductor wrote, those of `passes.kernels`, and what is called of libraries."""


@dataclass(frozen=True)
class Launch:
    """One kernel, or one call of a library."""

    kind: str
    """One of `KINDS`."""
    name: str
    about: str
    """The operators it stands for."""
    bytes: int
    """Of every buffer it reads or writes, once."""
    flop: int
    hidden_bytes: int = 0
    """Read and written by copies that the library makes of operands which are not dense; they are launches, too."""

    def roof(self, device: Device) -> float:
        """Seconds below which no implementation of this launch stays on this device."""
        return max(self.bytes / device.bytes_per_second, self.flop / device.flop_per_second)

    def floor(self, device: Device) -> float:
        """The same, where a launch takes some time whatever it does."""
        copies = LAUNCH_SECONDS if self.hidden_bytes else 0.0
        return max(LAUNCH_SECONDS, self.roof(device)) + copies


@dataclass(frozen=True)
class Generated:
    """The code of one step."""

    launches: tuple[Launch, ...]
    source: str
    """The module that Inductor would import."""
    kernels: dict[str, str]
    """Source of the Triton kernels, by name."""


class _Stop(BaseException):
    """Code is generated; there is nothing to run it on. No Exception, for Inductor would wrap it."""

    def __init__(self, generated: Generated) -> None:
        super().__init__()
        self.generated = generated


def generate(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Generated:
    """Let AOTAutograd and Inductor make code of a graph over fake tensors, within `pretended`."""
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    kernels: dict[str, str] = {}
    define_kernel = PythonWrapperCodegen.define_kernel

    def remember(self: Any, kernel_name: str, kernel_body: str, *rest: Any, **named: Any) -> Any:
        kernels[kernel_name] = kernel_body
        return define_kernel(self, kernel_name, kernel_body, *rest, **named)

    def stop(lowering: Any) -> Any:
        with patch.object(PythonWrapperCodegen, "define_kernel", remember):
            code = lowering.codegen()[0].value
        raise _Stop(Generated(tuple(_launches(lowering, code)), code, kernels))

    # pad_mm times both forms on the device; a cache would spare the code generation that is asked for.
    settings = dict(compile_threads=1, force_disable_caches=True, shape_padding=False)
    with patch.object(GraphLowering, "compile_to_module", stop), config.patch(settings), torch.no_grad():
        try:
            compile_fx(graph, list(inputs))
        except _Stop as done:
            return done.generated
    raise AssertionError("Inductor compiled nothing")


_RUN = re.compile(r"^\s*(triton_\w+)\.run\(", re.MULTILINE)


def _launches(lowering: Any, code: str) -> list[Launch]:
    """In their order. The scheduler knows what each moves, the code what each is called."""
    from torch._inductor.scheduler import NopKernelSchedulerNode

    called = iter(_RUN.findall(code))
    found: list[Launch] = []
    for node in lowering.scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode) or _is_selection(node):
            continue
        if node.is_extern():
            found += _of_library(node)
        else:
            name = next(called)
            about = "+".join(sorted({_operator(origin) for inner in node.get_nodes() for origin in inner.node.origins}))
            found.append(Launch("triton", name, about, node.get_read_write_buffers_sizes(), 0))
    left = list(called)
    assert not left, f"launches that belong to no node of the scheduler: {left}"
    return found


def _is_selection(node: Any) -> bool:
    from torch._inductor import ir

    return isinstance(node.node, ir.MultiOutput)


def _operator(origin: fx.Node) -> str:
    return str(getattr(origin.target, "_overloadpacket", origin.target)).removeprefix("aten.")


def _of_library(node: Any) -> list[Launch]:
    inner = node.node
    target = inner.op_overload if getattr(inner, "op_overload", None) is not None else inner.get_kernel_name()
    name = str(target).removeprefix("extern_kernels.").removeprefix("aten.")
    operands = list(inner.inputs)
    read, written = sum(map(_bytes, operands)), node.get_write_buffer_sizes()
    if "deepcache_fx" in name:
        return _own(name.split(".")[1], operands, inner.constant_args, read, written)
    if "conv" in name:
        flop = 2 * _count(_size(inner)) * _count(_size(operands[1])[1:])
        hidden = sum(2 * _bytes(operand) for operand in operands[:2] if not _is_dense(operand))
        return [Launch("conv", name, "convolution", read + written, flop, hidden)]
    if "attention" in name:
        query, key, value = (_size(operand) for operand in operands[:3])
        flop = 2 * _count(query[:-1]) * key[-2] * (query[-1] + value[-1])
        return [Launch("attention", name, name, read + written, flop)]
    if "mm" in name:
        return [Launch("mm", name, name, read + written, 2 * _count(_size(inner)) * _size(operands[-1])[-2])]
    return [Launch("other", name, name, read + written, 0)]


def _own(name: str, operands: Sequence[Any], constants: Sequence[Any], read: int, written: int) -> list[Launch]:
    """Our kernels read the feature map twice where no program can hold a group of it."""
    from passes.kernels.group_norm_launch import reads_once

    maps = [size for size in map(_size, operands) if len(size) > 2 and _count(size[2:]) > 1]
    channels = sum(size[1] for size in maps)
    groups = next(value for value in constants if type(value) is int)
    if reads_once(_count(maps[0][2:]), channels, groups):
        return [Launch("own", name, name, read + written, 0)]
    return [Launch("own", f"{name}: statistics", name, read, 0), Launch("own", name, name, read + written, 0)]


def _size(operand: Any) -> list[int]:
    return [int(size) for size in operand.get_size()]


def _count(size: Sequence[int]) -> int:
    return math.prod(size)


def _bytes(operand: Any) -> int:
    from torch._inductor import ir

    if not isinstance(operand, ir.IRNode) or not operand.has_tensor_output():
        return 0
    return _count(_size(operand)) * int(operand.get_dtype().itemsize)


def _is_dense(operand: Any) -> bool:
    """True where a convolution reads an operand as it is."""
    example = torch.empty_strided(_size(operand), [int(stride) for stride in operand.get_stride()], device="meta")
    formats = [torch.contiguous_format, *([torch.channels_last] if example.ndim == 4 else [])]
    return any(example.is_contiguous(memory_format=format_) for format_ in formats)
