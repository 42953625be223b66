"""What `compare` found: times, speed-up and its bound, and how alike the images are."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from deepcache_fx.runtime.report import Report

SSIM_SIGMA = 1.5
"""Of the Gaussian window, in pixels (Wang et al. 2004)."""
WIDE = 1.5
"""Largest over smallest paired ratio from which on their median is no figure. On an idle machine: 1.1 to 1.2."""
BEYOND = 1.2
"""Speed-up over its bound from which on it is no figure either: a graph without Python in between may gain some."""


@dataclass(frozen=True)
class UNetCalls:
    """What one optimised run asked of one UNet."""

    full: int
    shallow: int
    uncached: int
    """Calls that ran the model's own forward."""
    full_macs: int
    shallow_macs: int
    """Of one call; the mean, where they begin at several skip connections."""

    @staticmethod
    def between(before: Report, after: Report) -> UNetCalls:
        """What happened between two reports. Of several signatures the one with the smallest shallow share counts."""
        calls = Counter(after.calls_by_branch) - Counter(before.calls_by_branch)
        macs = [(s.full_macs, s.mean_shallow_macs(calls)) for s in after.signatures if s.full_macs]
        full, shallow = min(macs, key=lambda pair: pair[1] / pair[0], default=(0, 0))
        return UNetCalls(
            full=after.full_calls - before.full_calls,
            shallow=after.shallow_calls - before.shallow_calls,
            uncached=after.original_calls - before.original_calls,
            full_macs=full,
            shallow_macs=shallow,
        )

    @property
    def macs_before(self) -> int:
        return (self.full + self.shallow + self.uncached) * self.full_macs

    @property
    def macs_after(self) -> int:
        return (self.full + self.uncached) * self.full_macs + self.shallow * self.shallow_macs


@dataclass(frozen=True)
class Comparison:
    """Times, images and counts of a baseline and an optimised pipeline. Seconds are of the whole pipeline call."""

    prompts: tuple[str, ...]
    steps: int
    seed: int
    baseline_seconds: tuple[float, ...]
    """One per repeat, in the order measured; `optimized_seconds[i]` was measured right after `baseline_seconds[i]`."""
    optimized_seconds: tuple[float, ...]
    """Without what `preparation_seconds` holds."""
    preparation_seconds: float
    """Paid once: what the first optimised run took longer than a later one (capture and compilation)."""
    calls: tuple[UNetCalls, ...]
    """Of one run; the base model first, then the refiner."""
    reports: tuple[Report, ...]
    baseline_images: torch.Tensor
    """(prompts, channels, height, width), float32 on the CPU, in [0, 1]."""
    optimized_images: torch.Tensor

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of two times measured one after the other: what else the machine does changes little in between."""
        return tuple(b / o for b, o in zip(self.baseline_seconds, self.optimized_seconds, strict=True))

    @property
    def speedup(self) -> float:
        """The median of the paired ratios. No figure to quote where there are `doubts`."""
        return statistics.median(self.ratios)

    @property
    def speedup_range(self) -> tuple[float, float]:
        """The smallest and the largest of the paired ratios."""
        return min(self.ratios), max(self.ratios)

    @property
    def bound(self) -> float:
        """The speed-up there would be if time went by the multiply-accumulates of the UNet alone."""
        after = sum(c.macs_after for c in self.calls)
        return sum(c.macs_before for c in self.calls) / after if after else 1.0

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the speed-up cannot be relied on; empty where it can."""
        found = []
        low, high = self.speedup_range
        if high / low > WIDE:
            found.append(
                f"the pairs disagree ({low:.2f} to {high:.2f}): the machine was busy, so run it again or repeat it more"
            )
        # A compiler saves what the count of multiply-accumulates does not show.
        if self.speedup > BEYOND * self.bound and all(item.backend == "eager" for item in self.reports):
            found.append(
                f"the times differ by {self.speedup:.3g}, the arithmetic by no more than {self.bound:.2f}: something "
                "else held the baseline up, or the model is so small that its Python code takes the time"
            )
        return tuple(found)

    @property
    def engaged(self) -> bool:
        """True where at least one shallow step ran."""
        return any(c.shallow for c in self.calls)

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of all images together in dB; infinite where every pixel is equal."""
        return psnr(self.optimized_images, self.baseline_images)

    @property
    def ssim(self) -> float:
        """Mean structural similarity; NaN for images too small to have one."""
        return ssim(self.optimized_images, self.baseline_images)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of the speed-up must know."""
        found = [] if self.engaged else ["the shallow variant never ran: this schedule cannot show a speed-up"]
        for item in self.reports:
            found += [f"{count} calls forced full: {reason}" for reason, count in item.forced_full.items()]
            found += [f"{count} calls uncached: {reason}" for reason, count in item.original_reasons.items()]
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: what is infinite or undefined is None, `identical` tells equal images."""
        return {
            "prompts": list(self.prompts),
            "steps": self.steps,
            "seed": self.seed,
            "baseline_seconds": list(self.baseline_seconds),
            "optimized_seconds": list(self.optimized_seconds),
            "preparation_seconds": self.preparation_seconds,
            "speedup": self.speedup,
            "speedup_range": list(self.speedup_range),
            "doubts": list(self.doubts),
            "bound": self.bound,
            "identical": bool(torch.equal(self.baseline_images, self.optimized_images)),
            "psnr": self.psnr if math.isfinite(self.psnr) else None,
            "ssim": self.ssim if math.isfinite(self.ssim) else None,
            "full_calls": [c.full for c in self.calls],
            "shallow_calls": [c.shallow for c in self.calls],
            "uncached_calls": [c.uncached for c in self.calls],
            "remarks": list(self.remarks),
            "reports": [item.to_dict() for item in self.reports],
        }


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of (count, channels, height, width) in [0, 1]; infinite where all are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(images, reference, data_range=1.0))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean structural similarity of (count, channels, height, width) in [0, 1]; NaN where the window does not fit."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    window = 2 * int(3.5 * SSIM_SIGMA + 0.5) + 1
    if min(images.shape[-2:]) < window:
        return math.nan
    return float(structural_similarity_index_measure(images, reference, sigma=SSIM_SIGMA, data_range=1.0))


def describe_psnr(value: float) -> str:
    """A PSNR for people: "31.2 dB", "identical" where it is infinite, "undefined" where it is NaN."""
    if math.isnan(value):
        return "undefined"
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def describe_ssim(value: float) -> str:
    """An SSIM for people: "0.983", "undefined" where it is NaN."""
    return "undefined" if math.isnan(value) else f"{value:.3f}"
