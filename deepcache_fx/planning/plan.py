"""What each skip connection can save, before anything runs: multiply-accumulates, cache size, speed-up bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from deepcache_fx.errors import DeepCacheError, OptionError
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.macs import Macs, total_macs
from deepcache_fx.graph.pass_order import apply_passes
from deepcache_fx.graph.signature import CallReader, ExampleInputs
from deepcache_fx.graph.skips import SkipConnection, require_skip_connections
from deepcache_fx.graph.split import Cost, plain_cost, refresh_costs
from deepcache_fx.options import Options
from deepcache_fx.planning.example_inputs import example_inputs as make_example_inputs
from deepcache_fx.runtime.attach import original_class
from passes.shared.match import ancestors


@dataclass(frozen=True)
class BranchPlan:
    """What caching at one skip connection saves."""

    index: int
    """Counted from the output: 0 is the shallowest. `optimize(..., branch=index)`."""
    block: int
    layer: int
    """The published numbering."""
    full: Macs
    shallow: Macs
    """Of one call, for the whole batch."""
    cache_bytes: int
    """Kept from step to step, once for each UNet call of a step. As published: the deep feature itself is kept.

    Of one refresh: a forecast keeps as much again for each of its orders.
    """
    hoisted: Macs
    hoisted_cache_bytes: int
    """The same as `optimize` does it: what depends on the deep feature alone is computed by full steps and kept."""

    @property
    def share(self) -> float:
        """The shallow step's part of a full one's MACs, attention products included."""
        return self.shallow.total / self.full.total

    def speedup(self, interval: int) -> float:
        """The bound on a 1:interval schedule's speed-up of the UNet, were time proportional to MACs.

        Raises:
            DeepCacheError: the interval is less than 1.
        """
        _check_interval(interval)
        return bound(self.full.total, self.shallow.total, interval)


@dataclass(frozen=True)
class Plan:
    """What `plan(target)` returns; print() it, or read the fields."""

    model: str
    inputs: str
    """Names and shapes of the tensors of the call that was counted."""
    dtype: str
    full: Macs
    branches: tuple[BranchPlan, ...]
    """Shallowest first."""
    intervals: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        branches = [
            {
                "branch": branch.index,
                "block": branch.block,
                "layer": branch.layer,
                "shallow_macs": branch.shallow.total,
                "shallow_macs_without_attention": branch.shallow.dense,
                "share": branch.share,
                "cache_bytes": branch.cache_bytes,
                "hoisted_shallow_macs": branch.hoisted.total,
                "hoisted_cache_bytes": branch.hoisted_cache_bytes,
                "speedup_bound": {str(interval): branch.speedup(interval) for interval in self.intervals},
            }
            for branch in self.branches
        ]
        return {
            "model": self.model,
            "inputs": self.inputs,
            "dtype": self.dtype,
            "full_macs": self.full.total,
            "full_macs_without_attention": self.full.dense,
            "branches": branches,
        }

    @property
    def title(self) -> str:
        return f"{self.model} in {self.dtype}, one call: {self.inputs}"

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows for a reader."""
        heads = ("branch", "block", "full", "shallow", "share", "MiB", "hoisted", "MiB")
        rows = [
            (
                str(branch.index),
                f"{branch.block}/{branch.layer}",
                giga(branch.full.total),
                giga(branch.shallow.total),
                f"{branch.share:.1%}",
                f"{branch.cache_bytes / 2**20:.2f}",
                giga(branch.hoisted.total),
                f"{branch.hoisted_cache_bytes / 2**20:.2f}",
                *(f"{branch.speedup(interval):.2f}" for interval in self.intervals),
            )
            for branch in self.branches
        ]
        return (*heads, *(f"N={interval}" for interval in self.intervals)), rows

    @property
    def note(self) -> str:
        """What the table leaves open: what N= means, and the counts without the products inside attention."""
        shallow = ", ".join(giga(branch.shallow.dense) for branch in self.branches)
        return (
            "GMAC of one call; MiB of cache; block: up block/layer in it, as published\n"
            "hoisted: what depends on the cached feature alone is moved into full steps, as optimize does by default\n"
            "N=: the most that a 1:N schedule speeds up the UNet, were time proportional to MACs, without hoisting\n"
            f"without attention products: full {giga(self.full.dense)} GMAC; shallow, by branch: {shallow}"
        )

    def __str__(self) -> str:
        heads, rows = self.table()
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = ["  ".join(map(str.rjust, line, widths)) for line in (heads, *rows)]
        return "\n".join([self.title, *lines, self.note])


def plan(
    target: object,
    *,
    example_inputs: ExampleInputs | None = None,
    batch: int = 2,
    height: int | None = None,
    width: int | None = None,
    intervals: Sequence[int] = (2, 3, 5, 10),
) -> Plan:
    """Count what each skip connection of a UNet would save, from one captured call. Runs and changes nothing.

    Needs no weights: a model on the meta device will do, and one that is optimised already is planned as it was.

    Args:
        target: A UNet module, or a diffusers pipeline with a `.unet`.
        example_inputs: Arguments of a UNet call, by name or position; made up from the UNet's configuration where left
            out, with the three sizes below.
        batch: Samples in a call; 2 is one image with classifier-free guidance.
        height: In latent pixels; from the configuration where left out.
        width: In latent pixels; from the configuration where left out.
        intervals: Those that printing and `to_dict` give the bound for.

    Raises:
        DeepCacheError: no inputs can be made up, they do not fit, or the model cannot be captured.
        BranchError: the model has no skip connection.

    Example:
        >>> with torch.device("meta"):
        ...     unet = UNet2DConditionModel.from_config(config)
        >>> print(plan(unet, height=64, width=64))
        >>> plan(unet, height=64, width=64).branches[0].speedup(3)
        2.59
    """
    intervals = tuple(map(_check_interval, intervals))
    unet = target if isinstance(target, torch.nn.Module) else getattr(target, "unet", None)
    if not isinstance(unet, torch.nn.Module):
        raise DeepCacheError(f"plan takes a UNet or a diffusers pipeline with a .unet, got {type(target).__name__}")
    if example_inputs is None:
        example_inputs = make_example_inputs(unet, batch=batch, height=height, width=width)
    model_class = original_class(unet)
    reader = CallReader(model_class.forward)
    call = reader.read_example(unet, example_inputs)
    captured, _ = apply_passes(capture(unet, call, reader, model_class), Options())
    graph = captured.graph.graph
    full = total_macs(ancestors([graph.output_node()]))
    found = require_skip_connections(graph, model_class.__name__)
    branches = tuple(
        _branch_plan(graph, branch, full, hoisted)
        for branch, hoisted in zip(found, refresh_costs(captured, found), strict=True)
    )
    shapes = ", ".join(input_shapes(call.arguments))
    return Plan(model_class.__name__, shapes, str(call.sample.dtype).split(".")[-1], full, branches, intervals)


def _branch_plan(graph: fx.Graph, branch: SkipConnection, full: Macs, hoisted: Cost) -> BranchPlan:
    # Counted on the one graph: splitting a copy of it for every branch gives the same and takes minutes for SDXL.
    plain = plain_cost(graph, branch.deep)
    return BranchPlan(
        index=branch.index,
        block=branch.block,
        layer=branch.layer,
        full=full,
        shallow=plain.macs,
        cache_bytes=plain.cache_bytes,
        hoisted=hoisted.macs,
        hoisted_cache_bytes=hoisted.cache_bytes,
    )


def input_shapes(arguments: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found.append(f"{prefix}{name} {'x'.join(map(str, value.shape)) or 'scalar'}")
        elif isinstance(value, Mapping):
            found += input_shapes(value, f"{name}.")
    return found


def _check_interval(interval: int) -> int:
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise OptionError(f"an interval must be an integer of at least 1, got {interval!r}")
    return interval


def bound(full: int, shallow: int, interval: int) -> float:
    """The most that a 1:interval schedule speeds up the UNet, were time proportional to MACs."""
    return interval * full / (full + (interval - 1) * shallow)


def giga(macs: int) -> str:
    """Billions to four significant digits, or one place after the point."""
    value = macs / 1e9
    return f"{value:.1f}" if value >= 100 else f"{value:#.4g}"
