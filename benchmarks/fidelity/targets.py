"""The targets that a cached arm has to reach, and whether it does: read off the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.fidelity.cases import Row

PUBLISHED = "repeat"
CONTROL = "fewer-steps"
OURS = ("calibrated-nested", "calibrated", "nested", "forecast-2", "forecast-1")
GAIN_DB = 8.0
TIME_RATIO = 1.03
FID_RATIO = 1.02


@dataclass(frozen=True)
class Target:
    """One target of one arm."""

    arm: str
    wanted: str
    met: bool


def psnr(row: Row | None) -> float | None:
    """In dB; infinite where all images are identical, None where it was not measured."""
    if row is None or row.outcome is None:
        return None
    return float("inf") if row.scores.identical == 1.0 else row.scores.psnr


def find(rows: Sequence[Row], arm: str, interval: int) -> Row | None:
    """The measured row of an arm at an interval."""
    return next((r for r in rows if r.case.arm == arm and r.case.interval == interval and r.outcome is not None), None)


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of every arm of ours among the rows of one group."""
    arms = [arm for arm in OURS if any(row.case.arm == arm and row.outcome is not None for row in rows)]
    return [target for arm in arms for target in _targets_of(arm, rows)]


def _targets_of(arm: str, rows: Sequence[Row]) -> Iterator[Target]:
    for interval in (3, 5):
        ours, base = find(rows, arm, interval), find(rows, PUBLISHED, interval)
        mine, theirs = psnr(ours), psnr(base)
        if mine is not None and theirs is not None:
            yield Target(arm, f"N={interval}: {GAIN_DB:+.0f} dB over {PUBLISHED}", mine - theirs >= GAIN_DB)
        ratio = _time_ratio(ours, base)
        if ratio is not None:
            wanted = f"N={interval}: at most {TIME_RATIO - 1:.0%} slower than {PUBLISHED}"
            yield Target(arm, wanted, ratio <= TIME_RATIO)
    mine, theirs = psnr(find(rows, arm, 5)), psnr(find(rows, PUBLISHED, 3))
    if mine is not None and theirs is not None:
        yield Target(arm, f"N=5 at least as close as {PUBLISHED} at N=3", mine >= theirs)
    ours, plain = find(rows, arm, 5), find(rows, "uncached", 1)
    if ours is not None and plain is not None and ours.scores.fid is not None and plain.scores.fid is not None:
        wanted = f"N=5: FID within {FID_RATIO - 1:.0%} of uncached"
        yield Target(arm, wanted, ours.scores.fid <= FID_RATIO * plain.scores.fid)
    gains = list(_gains(arm, rows))
    if gains:
        yield Target(arm, f"closer than {CONTROL} at every N up to 10", all(gain > 0 for gain in gains))


def _gains(arm: str, rows: Sequence[Row]) -> Iterator[float]:
    for interval in sorted({row.case.interval for row in rows if row.case.arm == arm and row.case.interval <= 10}):
        mine, theirs = psnr(find(rows, arm, interval)), psnr(find(rows, CONTROL, interval))
        if mine is not None and theirs is not None:
            yield mine - theirs


def _time_ratio(ours: Row | None, base: Row | None) -> float | None:
    """Each is taken relative to its own full calls: drift between the two cancels."""
    if ours is None or base is None or ours.outcome is None or base.outcome is None:
        return None
    if ours.outcome.time_share is None or not base.outcome.time_share:
        return None
    return ours.outcome.time_share / base.outcome.time_share
