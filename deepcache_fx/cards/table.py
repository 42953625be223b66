"""The values to begin with, by family of models and preset, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PRESETS = ("fast", "balanced", "close")
"""What `optimize(preset=)` takes: from the fastest to the one closest to the uncached images."""

_PAPER = "DeepCache paper (arXiv 2312.00858)"
_README = "README of the published code"
_TABLE = "DeepCache page of diffusers' documentation"
_FORECAST = (
    "forecast: docs/fidelity.md, measured on two small models: auto, which is linear with deterministic samplers, is "
    "closer than repeating there"
)
_PUBLISHED_BRANCH = "the published pipelines' block 0, layer 0 is branch 1 here"


@dataclass(frozen=True)
class Choice:
    """Arguments of `optimize`, and where they come from."""

    interval: int
    branch: int
    source: str
    """For the interval and the branch."""
    forecast: str = "auto"

    def __str__(self) -> str:
        return f"interval {self.interval}, branch {self.branch}, forecast {self.forecast}"


@dataclass(frozen=True)
class Card:
    """A family of models."""

    title: str
    choices: Mapping[str, Choice]
    """By preset."""
    note: str = _FORECAST


def _choices(fast: Choice, balanced: Choice, close: Choice) -> Mapping[str, Choice]:
    return {"fast": fast, "balanced": balanced, "close": close}


_SD_PAPER = f"{_PAPER}, SD1.5, 50 PLMS steps on MS-COCO, CLIP score 30.24 uncached"

CARDS: Mapping[str, Card] = {
    "sd15": Card(
        "Stable Diffusion 1",
        _choices(
            Choice(5, 0, f"interval: {_SD_PAPER}, 30.23 at 1:5. Branch: {_TABLE}, 1:5 of SD2.1"),
            Choice(3, 0, f"{_README}, the example of its helper; {_SD_PAPER}, 30.34 at 1:3"),
            Choice(2, 1, f"interval: {_SD_PAPER}, 30.37 at 1:2. Branch: {_README}, where {_PUBLISHED_BRANCH}"),
        ),
    ),
    "sd21": Card(
        "Stable Diffusion 2",
        _choices(
            Choice(5, 0, f"{_TABLE}: SD2.1 at 512, 50 steps on an A5000, 3.24 times as fast"),
            Choice(3, 0, f"{_TABLE}: SD2.1 at 512, 50 steps on an A5000, 2.33 times as fast"),
            Choice(2, 1, "by analogy with Stable Diffusion 1; not measured"),
        ),
    ),
    "sdxl": Card(
        "Stable Diffusion XL",
        _choices(
            Choice(5, 0, "by analogy with Stable Diffusion 2; not measured"),
            Choice(3, 0, f"interval: {_README}, SDXL, 50 steps, 2.6 times as fast. Branch: the example of its helper"),
            Choice(
                2, 1, f"interval: NVIDIA's SDXL in MLPerf v4.0 (open). Branch: {_README}, where {_PUBLISHED_BRANCH}"
            ),
        ),
    ),
    "svd": Card(
        "Stable Video Diffusion",
        _choices(
            Choice(5, 1, "interval: the documentation of the published SVD pipeline, whose branch 0 is branch 1 here"),
            Choice(3, 1, "between the other two; not measured"),
            Choice(2, 1, "by analogy with Stable Diffusion 1; not measured"),
        ),
    ),
    "animatediff": Card(
        "AnimateDiff",
        _choices(
            Choice(5, 0, "its U-Net is that of Stable Diffusion 1 with motion modules: as there; not measured"),
            Choice(3, 0, "its U-Net is that of Stable Diffusion 1 with motion modules: as there; not measured"),
            Choice(2, 1, "its U-Net is that of Stable Diffusion 1 with motion modules: as there; not measured"),
        ),
    ),
    "ldm": Card(
        "Latent Diffusion",
        _choices(
            Choice(10, 0, f"{_PAPER}, LDM-4-G, ImageNet, 250 DDIM steps: FID 4.41, uncached 3.37"),
            Choice(5, 0, f"{_PAPER}, LDM-4-G, ImageNet, 250 DDIM steps: FID 3.59, uncached 3.37"),
            Choice(2, 0, f"{_PAPER}, LDM-4-G, ImageNet, 250 DDIM steps: FID 3.39, uncached 3.37"),
        ),
    ),
    "ddpm": Card(
        "DDPM",
        _choices(
            Choice(5, 0, f"{_PAPER}, CIFAR-10, 100 DDIM steps: FID 5.73, uncached 4.16"),
            Choice(3, 0, f"{_PAPER}, CIFAR-10, 100 DDIM steps: FID 4.70, uncached 4.16"),
            Choice(2, 0, f"{_PAPER}, CIFAR-10, 100 DDIM steps: FID 4.35, uncached 4.16"),
        ),
    ),
    "other": Card(
        "another U-Net",
        _choices(
            Choice(
                5, 0, "docs/fidelity.md, measured on two small models, not on this one: compare before you rely on it"
            ),
            Choice(
                3, 0, "docs/fidelity.md, measured on two small models, not on this one: compare before you rely on it"
            ),
            Choice(
                2, 0, "docs/fidelity.md, measured on two small models, not on this one: compare before you rely on it"
            ),
        ),
    ),
}
"""By the names that `family.family_of` gives."""
