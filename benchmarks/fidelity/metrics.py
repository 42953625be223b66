"""Distances between images: in pairs, and between sets in a feature space. Fed batch by batch."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from deepcache_fx.comparing.comparison import ssim

NEIGHBOURS = 3
"""The k of precision and recall, as in the paper."""


class _Features(torch.nn.Module):
    """Stands where torchmetrics has a feature extractor: what it is given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class SetDistance:
    """FID, precision and recall of a growing set of features against a reference set.

    Precision and recall compare as many reference features as there are of the set, the first ones: they depend on the
    number of samples, and are defined for equal numbers.
    """

    def __init__(self, reference: torch.Tensor) -> None:
        self._reference = reference.float().cpu()
        width = reference.shape[1]
        self._fid = FrechetInceptionDistance(_Features(width), normalize=True).set_dtype(torch.float64)
        self._fid.update(self._reference.double(), real=True)
        self._added: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """Features (count, width)."""
        features = features.float().cpu()
        self._fid.update(features.double(), real=False)
        self._added.append(features)

    def fid(self) -> float | None:
        """None for fewer than two images: there is no covariance."""
        if sum(map(len, self._added)) < 2:
            return None
        return max(0.0, float(self._fid.compute()))

    def precision_recall(self) -> tuple[float, float] | None:
        """None where there are too few images to have `NEIGHBOURS` neighbours."""
        generated = torch.cat(self._added) if self._added else torch.empty(0, 1)
        reference = self._reference[: len(generated)]
        if min(len(generated), len(reference)) <= NEIGHBOURS:
            return None
        return coverage(generated, of=reference), coverage(reference, of=generated)


def coverage(points: torch.Tensor, *, of: torch.Tensor, neighbours: int = NEIGHBOURS, chunk: int = 2048) -> float:
    """The share of `points` that lie in the manifold estimated from the set `of`.

    The manifold is the union of the balls around each member that reach to its k-th nearest neighbour in the set
    (Kynkaanniemi et al. 2019, equations 1 and 2). Precision is the coverage of generated features by the manifold of
    real ones, recall the reverse.
    """
    radius = torch.cat([torch.cdist(part, of).kthvalue(neighbours + 1).values for part in of.split(chunk)])
    inside = sum(int((torch.cdist(part, of) <= radius).any(1).sum()) for part in points.split(chunk))
    return inside / len(points)


@dataclass(frozen=True)
class Pairs:
    """How close images are to their counterparts. PSNR is infinite where all are identical: then None."""

    psnr: float | None
    psnr_median: float | None
    ssim: float | None
    lpips: float | None
    identical: float


class PairDistance:
    """PSNR, SSIM and, where its network can be had, LPIPS of images against those of the same seeds."""

    def __init__(self, lpips: Any = None) -> None:
        """lpips: torchmetrics' metric, made by `load_lpips`; left out where None."""
        self._lpips = lpips
        self._count = self._pixels = self._same = 0
        self._ssim = self._distance = 0.0
        self._square: list[float] = []

    def add(self, images: torch.Tensor, reference: torch.Tensor) -> None:
        """Both (count, channels, height, width) in [0, 1]."""
        if images.shape != reference.shape:
            raise ValueError(f"images {tuple(images.shape)} have no counterparts {tuple(reference.shape)}")
        count = len(images)
        self._count += count
        self._pixels += images.numel()
        self._same += int((images == reference).flatten(1).all(1).sum())
        self._square += (images.double() - reference.double()).square().flatten(1).sum(1).tolist()
        self._ssim += ssim(images, reference) * count
        if self._lpips is not None:
            with torch.no_grad():
                both = (_rgb(side).to(self._lpips.device) for side in (images, reference))
                self._distance += float(self._lpips(*both)) * count

    def result(self) -> Pairs:
        error = sum(self._square) / self._pixels
        median = statistics.median(self._square) * self._count / self._pixels
        mean_ssim = self._ssim / self._count
        return Pairs(
            psnr=-10 * math.log10(error) if error > 0 else None,
            psnr_median=-10 * math.log10(median) if median > 0 else None,
            ssim=mean_ssim if math.isfinite(mean_ssim) else None,
            lpips=self._distance / self._count if self._lpips is not None else None,
            identical=self._same / self._count,
        )


def _rgb(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def load_lpips(device: torch.device) -> tuple[Any, str]:
    """(torchmetrics' LPIPS with AlexNet, "") or (None, why it cannot be had)."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device), ""
    except ModuleNotFoundError:
        return None, "no LPIPS: it needs torchvision (pip install torchvision)"
    except OSError as error:  # what urllib raises
        return None, f"no LPIPS: AlexNet's weights cannot be fetched ({str(error).splitlines()[0]})"
