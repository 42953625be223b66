"""Turn a variant into the fastest callable for its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from deepcache_fx.config import Options
from deepcache_fx.errors import CompileError

Program = Callable[..., Sequence[Any]]
"""Flat tensors in, flat outputs out."""


def pick_backend(options: Options, device: torch.device) -> str | Callable[..., Any]:
    """What "auto" stands for: Inductor on CUDA; elsewhere the graph as it is, which Inductor was measured to slow."""
    if options.backend == "auto":
        return "inductor" if device.type == "cuda" else "eager"
    return options.backend


def compile_variant(variant: fx.GraphModule, options: Options, device: torch.device) -> Program:
    """A callable for one variant. "eager" runs the graph's own operators, one after the other.

    Raises:
        CompileError: torch.compile knows no such backend.
    """
    backend = pick_backend(options, device)
    if backend == "eager":
        return variant.forward
    if isinstance(backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise CompileError(f"backend {backend!r} is unknown: use auto, eager or one of {', '.join(known)}")
    extra = None if options.options is None else dict(options.options)
    compiled: Program = torch.compile(
        variant, backend=backend, mode=options.mode, options=extra, fullgraph=True, dynamic=False
    )
    return compiled
