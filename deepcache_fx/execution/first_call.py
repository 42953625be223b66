"""A program that torch.compile makes at its first call: what happens where it cannot be made.

The compiler, and what it needs (Triton, ptxas, a C++ compiler), is heard of only then. Where the backend was our choice
the graph runs as it is, with a warning; else it is an error that names the remedy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deepcache_fx.errors import CompileError

_COMPILERS = ("torch._dynamo.", "torch._inductor.", "triton.")
"""Whose errors say that there is no program; any other is the program's own."""


@dataclass
class Toolchain:
    """What the programs of one signature have in common: what one finds missing the others need not look for."""

    backend: str
    may_fall_back: bool
    refused: str | None = None
    """Why programs that were not compiled by then run as graphs."""


@dataclass
class CompiledAtFirstCall:
    """A program, and the graph that it is compiled from."""

    program: Callable[..., Sequence[Any]]
    graph: Callable[..., Sequence[Any]]
    toolchain: Toolchain
    is_compiled: bool = False
    refused: str | None = None
    """Why the graph runs instead."""

    def __call__(self, *tensors: Any) -> Sequence[Any]:
        if self.is_compiled:
            return self.program(*tensors)
        if self.toolchain.refused is not None:
            return self._fall_back(self.toolchain.refused)(*tensors)
        try:
            leaves = self.program(*tensors)
        except Exception as error:
            if not _is_a_compilers(error):
                raise
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            if not self.toolchain.may_fall_back:
                raise CompileError(
                    f"backend {self.toolchain.backend!r} cannot compile the graph: {reason}. Take backend='eager', or "
                    "'auto', which runs the graph as it is where it cannot be compiled"
                ) from error
            self.toolchain.refused = reason
            warnings.warn(
                f"backend='auto' has taken {self.toolchain.backend}, which cannot compile here, and the graphs run as "
                f"they are: {reason}",
                stacklevel=2,
            )
            return self._fall_back(reason)(*tensors)
        self.is_compiled = True
        return leaves

    def _fall_back(self, reason: str) -> Callable[..., Sequence[Any]]:
        self.refused, self.program, self.is_compiled = reason, self.graph, True
        return self.graph


def _is_a_compilers(error: Exception) -> bool:
    return any(f"{cls.__module__}.".startswith(_COMPILERS) for cls in type(error).__mro__)
