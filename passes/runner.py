"""Run an ordered tuple of passes: time, call, lint, refresh metadata, record."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassResult

Pass = Callable[[fx.GraphModule], Any]
"""A `torch.fx` PassBase object, or a function GraphModule -> GraphModule (or PassResult)."""


class PassError(RuntimeError):
    """A pass failed, or left a graph that does not hold together; the message names the pass."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    seconds: float
    declined: tuple[str, ...] = ()
    """Places that the pass looked at and left as they were, and why; of passes that say so (`declined`)."""

    def __str__(self) -> str:
        left = f"; left {len(self.declined)} as they were" if self.declined else ""
        return f"{self.name}: {self.nodes_before} -> {self.nodes_after} nodes, {self.seconds * 1e3:.1f} ms{left}"


def pass_name(item: Pass) -> str:
    """The name a pass goes by: `canonicalize` for an object of class Canonicalize, a function's own name."""
    if hasattr(item, "__name__"):
        return str(item.__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(item).__name__).lower()


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass]) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """Apply the passes in order.

    After a pass that changed something, `meta["val"]` of every node is computed anew, unless the pass says
    `keeps_metadata = True`.

    Raises:
        PassError: naming the pass that raised, returned no graph or broke the graph.
    """
    records = []
    for item in passes:
        name = pass_name(item)
        before = len(gm.graph.nodes)
        started = time.perf_counter()
        try:
            gm, modified = _outcome(item(gm), gm)
            if modified:
                gm.graph.lint()
                gm.recompile()
                if not getattr(item, "keeps_metadata", False):
                    refresh_metadata(gm)
        except Exception as error:
            raise PassError(f"pass {name!r} failed: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
        declined = tuple(map(str, getattr(item, "declined", ())))
        records.append(PassRecord(name, modified, before, len(gm.graph.nodes), seconds, declined))
    return gm, tuple(records)


def _outcome(result: object, before: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    if isinstance(result, PassResult):
        return result.graph_module, result.modified
    if isinstance(result, fx.GraphModule):
        return result, True  # a plain function does not say: assume it did
    if result is None:
        return before, False
    raise TypeError(f"a pass returns a GraphModule, a PassResult or None (not applicable), got {type(result).__name__}")


def refresh_metadata(gm: fx.GraphModule) -> None:
    """Recompute `meta["val"]` of every node from those of the placeholders."""
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    fake_mode = detect_fake_mode(inputs)
    if fake_mode is not None:
        with torch.no_grad():
            FakeTensorProp(gm, fake_mode).propagate_dont_convert_inputs(*inputs)
