"""Turn variants into the fastest callables for their device, without Dynamo's guards in the step path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from deepcache_fx.errors import CompileError
from deepcache_fx.execution import openvino
from deepcache_fx.execution.checked import Checked
from deepcache_fx.execution.first_call import CompiledAtFirstCall, Toolchain
from deepcache_fx.options import Options

Program = Callable[..., Sequence[Any]]
"""Flat tensors in, flat outputs out."""


def pick_backend(options: Options, device: torch.device) -> str | Callable[..., Any]:
    """What "auto" stands for: Inductor on CUDA, OpenVINO on a CPU where it is installed, else the graph as it is.

    Inductor was measured to slow the graph on a CPU. Where the choice is ours, OpenVINO may yet be left out for a graph
    (see `compile_variants`).
    """
    if options.backend != "auto":
        return options.backend
    if options.precision == "bf16":
        return "openvino"
    if device.type == "cuda":
        return "inductor"
    return "openvino" if device.type == "cpu" and openvino.is_available() else "eager"


def name_of(backend: str | Callable[..., Any]) -> str:
    """For a reader."""
    return backend if isinstance(backend, str) else getattr(backend, "__name__", repr(backend))


def copies_weights(options: Options, device: torch.device) -> bool:
    """True where programs may hold copies of weights, or what follows from their values: else they read them anew.

    Dynamo hands the parameters of a graph to its backend as inputs, which are taken from the graph at every call. What
    a backend of someone else's makes of them nobody knows; Inductor folds them into its programs when it freezes.
    """
    return pick_backend(options, device) not in ("eager", "aot_eager", "inductor") or freezes(options, device)


def freezes(options: Options, device: torch.device) -> bool:
    """True where values of weights are folded into programs: by OpenVINO always, by Inductor where it is told to."""
    backend = pick_backend(options, device)
    if backend != "inductor":
        return backend == "openvino"
    import torch._inductor.config as inductor  # slow to import, and only needed here

    return bool(dict(options.options or {}).get("freezing") or inductor.freezing)


@dataclass(frozen=True)
class Compilation:
    """What the variants of one signature, or a single graph, were compiled to."""

    programs: Mapping[str, Program]
    """By variant."""
    picked: str
    """The backend that made them."""

    @property
    def backend(self) -> str:
        """The one that they run by."""
        eager = [name for name, program in self.programs.items() if getattr(program, "refused", None) is not None]
        if not eager:
            return self.picked
        return "eager" if len(eager) == len(self.programs) else f"{self.picked} ({', '.join(eager)}: eager)"

    @property
    def precision(self) -> str | None:
        """Of arithmetic that is not PyTorch's: "fp32" or "bf16"."""
        return next((item.precision for item in self._checked().values() if item.refused is None), None)

    @property
    def error(self) -> float | None:
        """Relative, of the first full step in that arithmetic; None until it is made."""
        full = self._checked().get("full")
        return None if full is None or full.refused is not None else full.error

    def _checked(self) -> dict[str, Checked]:
        return {name: program for name, program in self.programs.items() if isinstance(program, Checked)}


def compile_variants(
    steps: Mapping[str, fx.GraphModule], num_outputs: int, options: Options, device: torch.device
) -> Compilation:
    """Compile all that belongs together. `num_outputs` of what a graph returns are outputs, the others are cached.

    Where "auto" has picked OpenVINO, models of float16 or of several types run as they are, and so do, with a warning,
    those that it cannot take.

    Raises:
        CompileError: see `compile_variant`.
    """
    backend = pick_backend(options, device)
    may_fall_back = backend == "openvino" and options.backend == "auto" and options.precision != "bf16"
    eager = Compilation({name: step.forward for name, step in steps.items()}, "eager")
    if may_fall_back:
        types = set().union(*map(openvino.own_types, steps.values()))
        if len(types) > 1 or not types <= {torch.float32, torch.bfloat16}:
            return eager
    try:
        programs = {name: compile_variant(step, options, device) for name, step in steps.items()}
    except CompileError as error:
        if not may_fall_back:
            raise
        warnings.warn(f"backend='auto' leaves OpenVINO out, and the graphs run as they are: {error}", stacklevel=2)
        return eager
    toolchain = Toolchain(name_of(backend), may_fall_back=options.backend == "auto")
    for name, program in programs.items():
        if isinstance(program, openvino.OpenVINOProgram):
            programs[name] = Checked(program, steps[name].forward, program.precision, num_outputs, may_fall_back)
        elif backend not in ("eager", "openvino"):
            programs[name] = CompiledAtFirstCall(program, steps[name].forward, toolchain)
    return Compilation(programs, name_of(backend))


def compile_variant(variant: fx.GraphModule, options: Options, device: torch.device) -> Program:
    """A callable for one variant. "eager" runs the graph's own operators, one after the other.

    Dynamo's guards are left out: the runtime calls a program only for the signature and settings it was made for.
    Inductor's own CUDA graphs, which some modes switch on, are left out too: they hand out memory that the next call
    overwrites, and the cached feature outlives it. The runtime records its own (see `cuda_graph_programs`).

    Raises:
        CompileError: torch.compile knows no such backend, Inductor no such mode, or OpenVINO cannot take the graph.
    """
    backend = pick_backend(options, device)
    if backend == "eager":
        return variant.forward
    if backend == "openvino":
        properties = options.options if options.backend == "openvino" else None  # else they are meant for torch.compile
        return openvino.compile_graph(variant, device, options.precision, properties or {}) or variant.forward
    if isinstance(backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            names = ", ".join(sorted({*known, "openvino"}))
            raise CompileError(f"backend {backend!r} is unknown: use auto, eager or one of {names}")
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
        # Also where the user has switched them on for the whole process.
        settings |= {**_inductor_mode(options.mode), _OWN_GRAPHS: False}
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
    return {key: value for key, value in known[mode].items() if key != _OWN_GRAPHS}


_OWN_GRAPHS = "triton.cudagraphs"
"""Inductor's setting for CUDA graphs of its own."""


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
