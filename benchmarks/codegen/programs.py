"""A model's full and shallow steps as graphs over fake CUDA tensors, by the library's own stages."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from benchmarks.speed.subjects import find_preset
from deepcache_fx.execution.assemble import divided
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.signature import CallReader
from deepcache_fx.options import Options
from passes.runner import refresh_metadata
from passes.shared.operators import argument
from passes.shared.rewrite import add_call

aten = torch.ops.aten


@dataclass(frozen=True)
class Program:
    """One kind of step."""

    name: str
    graph: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    """Fake."""
    macs: int


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """One mode for the weights and for what torch.export traces, which takes that of a trace it finds itself in."""
    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True, export=True)
    with mode, tracing(TracingContext(mode)), torch.no_grad():
        yield


def programs(
    model: str,
    steps: Sequence[str],
    *,
    dtype: torch.dtype = torch.float16,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> list[Program]:
    """The steps of these names ("full", "shallow") of a preset, with classifier-free guidance.

    To be called within `pretended`. Attention is pinned to the flash kernel: which one is fastest only a device tells.

    Args:
        model: Of `benchmarks.speed.subjects.KINDS`.
        steps: "full", "shallow".
        dtype: Of the model.
        batch: Images; the UNet sees two samples of each.
        height, width: In latent pixels; the published ones where left out.
        options: As of `optimize`.
    """
    preset = find_preset(model)
    unet = preset.build(dtype=dtype)
    inputs = preset.inputs(unet, batch=2 * batch, height=height, width=width)
    reader = CallReader(type(unet).forward)
    call = reader.read(unet, (), {**inputs, "return_dict": False})  # on the meta device: fake tensors are no call
    made = Options.make(**{**options, "disable": (*options.get("disable", ()), "choose_attention")})
    with _fake_tensors():
        _to_cuda(unet)
        tensors = tuple(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in call.tensors)
        sample = next(fake for fake, like in zip(tensors, call.tensors, strict=True) if like is call.sample)
        call = replace(call, tensors=tensors, sample=sample)
        variants = divided(capture(unet, call, reader), call, made, type(unet).__name__).finished(made).variants
        found = []
        for name, variant in variants.named().items():
            if name in steps:
                _pin_attention(variant.step)
                values = tuple(node.meta["val"] for node in variant.step.graph.find_nodes(op="placeholder"))
                found.append(Program(name, variant.step, values, variant.macs.total))
    return found


def _to_cuda(module: torch.nn.Module) -> None:
    """Let a model without weights have fake ones on a device, convolutions channels-last, as the library lays them."""
    for sub in module.modules():
        for tensors in (sub._parameters, sub._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                if isinstance(sub, torch.nn.Conv2d) and name == "weight":
                    fake = fake.contiguous(memory_format=torch.channels_last)
                is_weight = isinstance(tensor, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(fake, requires_grad=False) if is_weight else fake


def _pin_attention(step: fx.GraphModule) -> None:
    graph, flash = step.graph, aten._scaled_dot_product_flash_attention.default
    found = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    for node in found:
        operands = [argument(node, name) for name in ("query", "key", "value")]
        causal, scale = argument(node, "is_causal"), argument(node, "scale")
        several = add_call(flash, (*operands, 0.0, causal), {"scale": scale}, before=node, like=node)
        node.replace_all_uses_with(add_call(operator.getitem, (several, 0), before=node, like=node))
        graph.erase_node(node)
    if found:
        refresh_metadata(step)
        step.recompile()
