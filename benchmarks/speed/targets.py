"""What the project set out to reach, beside what was reached: computed from the measured rows, never typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.speed.cases import Result, over

Value = Callable[[Sequence[Result], "Target"], float | None]


@dataclass(frozen=True)
class Target:
    """A bound on a number of one arm at one interval."""

    what: str
    model: str
    device: str
    """The type: cuda or cpu."""
    arm: str
    interval: int
    value: Value
    limit: float
    at_most: bool = False
    latent: int | None = None
    """The height of the latents; None for any."""

    def applies(self, row: Result) -> bool:
        case = row.case
        is_size = self.latent in (None, case.height)
        return is_size and case.model == self.model and case.batch == 1 and case.device.startswith(self.device)

    def met(self, reached: float) -> bool:
        return reached <= self.limit if self.at_most else reached >= self.limit


def _row(rows: Sequence[Result], arm: str, interval: int) -> Result | None:
    for row in rows:
        if (row.case.arm, row.case.interval) == (arm, interval) and row.measured.loop is not None:
            return row
    return None


def _share(rows: Sequence[Result], target: Target) -> float | None:
    row = _row(rows, target.arm, target.interval)
    return row.derived.shallow_share if row is not None else None


def _cold(rows: Sequence[Result], target: Target) -> float | None:
    row = _row(rows, target.arm, target.interval)
    return row.measured.cold_seconds if row is not None else None


def _host(rows: Sequence[Result], target: Target) -> float | None:
    row = _row(rows, target.arm, target.interval)
    host = row.measured.host_shallow if row is not None else None
    return host.median * 1e6 if host is not None else None


def _over(other: str, interval: int | None = None) -> Value:
    def value(rows: Sequence[Result], target: Target) -> float | None:
        row = _row(rows, target.arm, target.interval)
        base = _row(rows, other, interval or target.interval)
        return over(row, base) if row is not None and base is not None else None

    return value


def _on_gpu(model: str, share: float, uncached: float, eager: float, helper: float, cold: float) -> list[Target]:
    arm, n = "ours-cuda-graphs", 3
    return [
        Target("shallow step / full step", model, "cuda", arm, n, _share, share, at_most=True),
        Target("loop over our own uncached arm", model, "cuda", arm, n, _over("ours-uncached", 1), uncached),
        Target("loop over eager", model, "cuda", arm, n, _over("eager", 1), eager),
        Target("loop over DeepCacheSDHelper", model, "cuda", arm, n, _over("helper"), helper),
        Target("first run with cold caches, s", model, "cuda", arm, n, _cold, cold, at_most=True),
        Target("host time of a shallow step, us", model, "cuda", arm, n, _host, 60.0, at_most=True),
    ]


def _on_cpu(latent: int, intervals: Sequence[int], eager: float, bf16: float) -> list[Target]:
    def target(what: str, arm: str, interval: int, value: Value, limit: float) -> Target:
        return Target(what, "sd15", "cpu", arm, interval, value, limit, latent=latent)

    return [
        target("loop over eager", "ours-eager", 3, _over("eager", 1), 2.3),
        *(target("loop over DeepCacheSDHelper", "ours-eager", n, _over("helper"), 1.0) for n in intervals),
        target("loop over eager", "ours-openvino", 3, _over("eager", 1), eager),
        *(target("loop over DeepCacheSDHelper", "ours-openvino", n, _over("helper"), 1.2) for n in intervals),
        *(target("loop over our eager arm", "ours-openvino", n, _over("ours-eager"), 1.0) for n in intervals),
        target("loop over eager", "ours-openvino-bf16", 3, _over("eager", 1), bf16),
    ]


TARGETS: tuple[Target, ...] = (
    *_on_gpu("sd15", share=0.12, uncached=2.4, eager=5.0, helper=2.2, cold=120.0),
    *_on_gpu("sdxl", share=0.04, uncached=2.75, eager=3.7, helper=1.4, cold=240.0),
    *_on_cpu(32, (2, 3, 6), eager=3.5, bf16=6.0),
    *_on_cpu(64, (3,), eager=3.2, bf16=5.3),
    Target(
        "loop over eager in bfloat16", "sd15", "cpu", "ours-openvino-bf16", 3, _over("eager-bf16", 1), 2.9, latent=32
    ),
    Target("first run with cold caches, s", "sd15", "cpu", "ours-openvino", 3, _cold, 30.0, at_most=True, latent=32),
)


def targets_table(groups: Sequence[Sequence[Result]]) -> str:
    """Markdown: every target, what was reached, and whether that is enough; a target without a row is not measured."""
    lines = ["| device | model | arm, 1:N | what | target | reached | |", "|" + " --- |" * 7]
    for target in TARGETS:
        found = [target.value(rows, target) for rows in groups if rows and target.applies(rows[0])]
        reached = next((value for value in reversed(found) if value is not None), None)
        bound = f"{'<=' if target.at_most else '>='} {target.limit:g}"
        verdict = "not measured" if reached is None else "met" if target.met(reached) else "**missed**"
        value = "" if reached is None else f"{reached:.3g}"
        size = f", {target.latent}x{target.latent}" if target.latent is not None else ""
        where = f"{target.arm}, 1:{target.interval}{size}"
        lines.append(f"| {target.device} | {target.model} | {where} | {target.what} | {bound} | {value} | {verdict} |")
    return "\n".join(lines)
