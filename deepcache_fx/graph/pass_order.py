"""Which graph passes run on a captured call, and in which order: before the split, and on each variant after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.only import Only
from deepcache_fx.graph.split import RATES, Variants
from deepcache_fx.options import Options
from passes import (
    Canonicalize,
    ChooseAttention,
    FoldConstants,
    FuseLinears,
    MergeEqual,
    Pass,
    PassError,
    PassRecord,
    pass_name,
    run_passes,
)
from passes.fuse_linears import sibling_parameters
from passes.weight_layout import Joined, WeightLayout

DEFAULT_PASSES: tuple[Pass, ...] = (Canonicalize(), FoldConstants(), MergeEqual())
"""Exact passes, in order, applied to the captured graph before the split."""


def last_passes(layout: WeightLayout | None = None) -> tuple[FuseLinears, ChooseAttention]:
    """Those that run on each variant's step: after the user's passes, which match the plain operators."""
    return FuseLinears(layout), ChooseAttention()


@dataclass(frozen=True)
class ToLayOut:
    """The weights of a model that may be laid out (see `FuseLinears`)."""

    layout: WeightLayout
    model: torch.nn.Module
    in_use: bool
    """True where a program reads them, maybe at this moment: they then stay where they are."""


def default_names() -> list[str]:
    """What `disable` takes: the default passes and the rates."""
    passes: tuple[Pass, ...] = (*DEFAULT_PASSES, *last_passes())
    return [*map(pass_name, passes), *RATES]


def check_disabled(options: Options) -> None:
    """Raise a DeepCacheError where `disable` names neither a default pass nor a rate."""
    known = default_names()
    unknown = set(options.disable) - {*known, "all"}
    if unknown:
        raise DeepCacheError(
            f"disable names no default pass: {', '.join(sorted(unknown))}; there are: {', '.join(known)}"
        )


def apply_passes(captured: Captured, options: Options) -> tuple[Captured, tuple[PassRecord, ...]]:
    """Run the default passes that are not disabled, then the user's, on what was captured.

    Raises:
        DeepCacheError: a pass failed (named), or `disable` names no default pass.
    """
    check_disabled(options)
    first = [item for item in DEFAULT_PASSES if options.uses(pass_name(item))]
    own = [item for item in options.passes if not isinstance(item, Only)]
    try:
        graph, records = run_passes(captured.graph, (*first, *own))
    except PassError as error:
        raise DeepCacheError(str(error)) from error
    return captured.with_graph(graph), records


def finish(
    variants: Variants, options: Options, weights: ToLayOut | None = None
) -> tuple[Variants, tuple[PassRecord, ...], Mapping[str, tuple[Joined, ...]]]:
    """Run the user's passes for one variant alone, and the last default ones, on each variant's step.

    Returns:
        The variants, what the passes did, and by variant the weights that its step takes as further inputs.

    Raises:
        DeepCacheError: a pass failed (named).
    """
    steps = {name: variant.step for name, variant in variants.named().items()}
    records: dict[str, list[PassRecord]] = {name: [] for name in steps}

    def run(name: str, passes: Sequence[Pass]) -> None:
        try:
            steps[name], more = run_passes(steps[name], passes)
        except PassError as error:
            raise DeepCacheError(f"{name} variant: {error}") from error
        records[name] += [replace(record, name=f"{record.name} ({name})") for record in more]

    for name in steps:
        kind = "full" if name == "full" else "shallow"
        run(name, [item.item for item in options.passes if isinstance(item, Only) and item.variant == kind])
    if weights is not None and options.uses("fuse_linears") and not weights.in_use:
        # The few of the shallowest step first: then those lie together for all.
        groups = [group for name in [*list(steps)[1:], "full"] for group in sibling_parameters(steps[name])]
        weights.layout.lay_out(groups, within=weights.model)
    last = {name: last_passes(weights.layout if weights is not None else None) for name in steps}
    for name in steps:
        run(name, [item for item in last[name] if options.uses(pass_name(item))])
    return (
        variants.with_steps(steps),
        tuple(chain.from_iterable(records.values())),
        {name: fuse.joined for name, (fuse, _) in last.items()},
    )
