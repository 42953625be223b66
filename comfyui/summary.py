"""What the report node says of a run."""

from __future__ import annotations

from collections import Counter

from deepcache_fx import Report

from .run import Run


def summary(run: Run, report: Report | None) -> str:
    """Which calls of the UNet were full, what that is worth, and why not more. `report` is None where none was cached.

    The bound counts multiply-accumulates: what no measured speed-up can exceed.
    """
    full, shallow = (report.full_calls, report.shallow_calls) if report is not None else (0, 0)
    reasons = run.bypassed + Counter(report.original_reasons if report is not None else {})
    uncached = sum(reasons.values())
    lines = [f"{run.evaluations} evaluations: {full} calls full, {shallow} shallow, {uncached} uncached"]
    if report is not None and full + shallow:
        lines.append(f"trace: {report.last_run} (F full, s shallow)")
        lines.append(f"forecast: {report.last_forecast}")
        lines.append(f"speed-up bound of this run, by its arithmetic: {_bound(report, uncached):.2f}")
        lines += [f"full beside the schedule: {count} x {reason}" for reason, count in report.forced_full.items()]
        last = report.signatures[-1]
        lines.append(f"backend: {last.backend}{f' in {last.precision}' if last.precision else ''}")
    lines += [f"uncached: {count} x {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)


def _bound(report: Report, uncached: int) -> float:
    """Of the signature that was used last; others differ in size, and little in their ratio."""
    last = report.signatures[-1]
    share = last.mean_shallow_macs(report.calls_by_branch) / last.full_macs
    calls = report.full_calls + report.shallow_calls + uncached
    return calls / (report.full_calls + uncached + report.shallow_calls * share)
