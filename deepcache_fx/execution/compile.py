"""Turn a variant into the fastest callable for its device, without Dynamo's guards in the step path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from deepcache_fx.errors import CompileError
from deepcache_fx.options import Options

Program = Callable[..., Sequence[Any]]
"""Flat tensors in, flat outputs out."""


def pick_backend(options: Options, device: torch.device) -> str | Callable[..., Any]:
    """What "auto" stands for: Inductor on CUDA; elsewhere the graph as it is, which Inductor was measured to slow."""
    if options.backend == "auto":
        return "inductor" if device.type == "cuda" else "eager"
    return options.backend


def copies_weights(options: Options, device: torch.device) -> bool:
    """True where programs may hold copies of weights, or what follows from their values: else they read them anew.

    Dynamo hands the parameters of a graph to its backend as inputs, which are taken from the graph at every call. What
    a backend of someone else's makes of them nobody knows; Inductor folds them into its programs when it freezes.
    """
    return pick_backend(options, device) not in ("eager", "aot_eager", "inductor") or freezes(options, device)


def freezes(options: Options, device: torch.device) -> bool:
    """True where Inductor folds the values of weights into its programs."""
    if pick_backend(options, device) != "inductor":
        return False
    import torch._inductor.config as inductor  # slow to import, and only needed here

    return bool(dict(options.options or {}).get("freezing") or inductor.freezing)


def compile_variant(variant: fx.GraphModule, options: Options, device: torch.device) -> Program:
    """A callable for one variant. "eager" runs the graph's own operators, one after the other.

    Dynamo's guards are left out: the runtime calls a program only for the signature and settings it was made for.
    Inductor's own CUDA graphs, which some modes switch on, are left out too: they hand out memory that the next call
    overwrites, and the cached feature outlives it. The runtime records its own (see `recorded`).

    Raises:
        CompileError: torch.compile knows no such backend, or Inductor no such mode.
    """
    backend = pick_backend(options, device)
    if backend == "eager":
        return variant.forward
    if isinstance(backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise CompileError(f"backend {backend!r} is unknown: use auto, eager or one of {', '.join(known)}")
    settings = _settings(options, backend)
    mode = options.mode if settings is None else None  # torch.compile takes one of the two
    program: Program = torch.compile(
        _entry_point(variant), backend=backend, mode=mode, options=settings, fullgraph=True, dynamic=False
    )
    return _told_apart(program)


def _told_apart(program: Program) -> Program:
    """The program, which is given no tensor object twice: any call may be the one that is traced.

    Of a tensor that is given twice Dynamo makes one input, and leaves it to a guard that later calls do so too.
    """

    def call(*tensors: torch.Tensor) -> Sequence[Any]:
        if len({*map(id, tensors)}) == len(tensors):
            return program(*tensors)
        distinct: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            once = tensor.detach() if id(tensor) in distinct else tensor
            distinct[id(once)] = once
        return program(*distinct.values())

    return call


def _settings(options: Options, backend: str | Callable[..., Any]) -> dict[str, Any] | None:
    """The `options` for torch.compile; None where the mode must be passed instead."""
    settings: dict[str, Any] = {"guard_filter_fn": _no_guards}
    if backend == "inductor":
        settings |= _inductor_mode(options.mode)
    elif options.mode is not None:
        return None
    return settings | dict(options.options or {})


def _inductor_mode(mode: str | None) -> dict[str, Any]:
    """What an Inductor mode stands for, less its CUDA graphs."""
    if mode is None:
        return {}
    import torch._inductor as inductor  # slow to import, and only needed here

    known = inductor.list_mode_options()
    if mode not in known:
        raise CompileError(f"mode {mode!r} is unknown to Inductor: use one of {', '.join(known)}")
    return {key: value for key, value in known[mode].items() if key != "triton.cudagraphs"}


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    return [False] * len(guards)


def _entry_point(variant: fx.GraphModule) -> Program:
    """A function with a code object of its own.

    Dynamo keeps what it compiled with the code object, and without guards the first program found there is run. It
    would wrap a GraphModule, or its `forward`, into a function whose code all of them share.
    """

    def step(*tensors: torch.Tensor) -> Sequence[Any]:
        result: Sequence[Any] = variant(*tensors)
        return result

    step.__code__ = step.__code__.replace(co_name=step.__name__)  # a new object, though equal
    return step
