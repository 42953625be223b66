"""Whether a UNet call is full or shallow, and why: from what was observed of it, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from deepcache_fx.schedules.branch import Branch


@dataclass(frozen=True)
class StepDecision:
    """What a UNet call does."""

    is_full: bool
    branch: Branch | None = None
    """Where a shallow step begins, as the schedule names it; None is the branch of `optimize`."""
    reason: str | None = None
    """Why the step is full although the schedule says shallow; None where it says full."""


SCHEDULED = StepDecision(is_full=True)
_SHALLOW = StepDecision(is_full=False)


def decide(is_scheduled: bool, branch: Branch | None, doubt: str | None, missing: str | None) -> StepDecision:
    """The decision.

    Args:
        is_scheduled: Whether the schedule makes this step full.
        branch: Where the schedule lets a shallow step begin.
        doubt: Why the step cannot be placed in a run with certainty, if so.
        missing: Why there is no cached feature that this call may read, if so.
    """
    if is_scheduled:
        return SCHEDULED
    reason = doubt or missing
    if reason is not None:
        return StepDecision(is_full=True, reason=reason)
    return _SHALLOW if branch is None else StepDecision(is_full=False, branch=branch)
