"""Which graph passes run on a captured call, and in which order: before the split, and on each variant after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.only import Only
from deepcache_fx.graph.split import RATES, Variants
from deepcache_fx.options import Options
from passes import (
    Canonicalize,
    ChooseAttention,
    FoldConstants,
    MergeEqual,
    Pass,
    PassError,
    PassRecord,
    pass_name,
    run_passes,
)

DEFAULT_PASSES: tuple[Pass, ...] = (Canonicalize(), FoldConstants(), MergeEqual())
"""Exact passes, in order, applied to the captured graph before the split."""

POST_SPLIT_PASSES: tuple[Pass, ...] = (ChooseAttention(),)
"""Those that run on each variant's step: after the user's passes, which match the plain operators."""


def default_names() -> list[str]:
    """What `disable` takes: the default passes and the rates."""
    return [*map(pass_name, (*DEFAULT_PASSES, *POST_SPLIT_PASSES)), *RATES]


def post_split_passes(options: Options) -> list[Pass]:
    """Those of `POST_SPLIT_PASSES` that are not disabled."""
    return [item for item in POST_SPLIT_PASSES if options.uses(pass_name(item))]


def check_disabled(options: Options) -> None:
    """Raise a DeepCacheError where `disable` names neither a default pass nor a rate."""
    known = default_names()
    unknown = set(options.disable) - {*known, "all"}
    if unknown:
        raise DeepCacheError(
            f"disable names no default pass: {', '.join(sorted(unknown))}; there are: {', '.join(known)}"
        )


def apply_passes(captured: Captured, options: Options) -> tuple[Captured, tuple[PassRecord, ...]]:
    """Run the default passes that are not disabled, then those of the user's that come before the split.

    Raises:
        DeepCacheError: a pass failed (named), or `disable` names no default pass.
    """
    check_disabled(options)
    first = [item for item in DEFAULT_PASSES if options.uses(pass_name(item))]
    own = [item for item in options.passes if not _comes_after_split(item)]
    try:
        graph, records = run_passes(captured.graph, (*first, *own))
    except PassError as error:
        raise DeepCacheError(str(error)) from error
    return captured.with_graph(graph), records


def _comes_after_split(item: Pass) -> bool:
    """True for a pass for one variant alone, and for one that says `after_split = True`.

    The split takes apart the plain operators around a concatenation; what such a pass had fused it would leave whole,
    and the shallow steps would compute the cached half again.
    """
    return isinstance(item, Only) or getattr(item, "after_split", False) is True


def _is_for(item: Pass, kind: str) -> bool:
    return item.variant == kind if isinstance(item, Only) else _comes_after_split(item)


def finish(variants: Variants, options: Options) -> tuple[Variants, tuple[PassRecord, ...]]:
    """Run the user's passes that come after the split, and the last default ones, on each variant's step.

    Raises:
        DeepCacheError: a pass failed (named).
    """
    steps: dict[str, fx.GraphModule] = {}
    records: list[PassRecord] = []
    for name, variant in variants.named().items():
        kind = "full" if name == "full" else "shallow"
        own = [item.item if isinstance(item, Only) else item for item in options.passes if _is_for(item, kind)]
        steps[name], more = run_on_step(name, variant.step, (*own, *post_split_passes(options)))
        records += more
    return variants.with_steps(steps), tuple(records)


def run_on_step(
    name: str, step: fx.GraphModule, passes: Sequence[Pass]
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """Run passes on the step of the variant of that name, which their records and errors tell.

    Raises:
        DeepCacheError: a pass failed (named).
    """
    try:
        step, records = run_passes(step, passes)
    except PassError as error:
        raise DeepCacheError(f"{name} variant: {error}") from error
    return step, tuple(replace(record, name=f"{record.name} ({name})") for record in records)
