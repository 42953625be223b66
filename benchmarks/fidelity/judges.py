"""What judges sets of images: the Fashion-MNIST classifier for the models trained here, CLIP and Inception else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_model as load_weights

from benchmarks import fashion
from benchmarks.fidelity.cases import Scores
from benchmarks.fidelity.metrics import SetDistance
from benchmarks.fidelity.models import MODELS, Model
from deepcache_fx.comparing.loading import LoadError

CLASSIFIER = MODELS / "fashion-classifier.safetensors"
CLIP = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
"""Of DeepCache's tables for Stable Diffusion: CLIP score with ViT-g/14."""


class Tally(Protocol):
    """Scores one set of images, fed batch by batch."""

    def add(self, images: torch.Tensor, indexes: Sequence[int]) -> None:
        """Images (count, channels, height, width) in [0, 1]."""

    def scores(self) -> Scores: ...


@dataclass(frozen=True)
class Judge:
    """A way to score sets of images."""

    about: str
    """What the scores rest on; for the report."""
    start: Callable[[], Tally]
    notes: tuple[str, ...] = ()
    """What cannot be scored, and why."""


# The models trained here.


def garments(images: torch.Tensor) -> torch.Tensor:
    """What the classifier takes, (count, 1, 28, 28), of 32x32 images with one or three channels."""
    return images.mean(1, keepdim=True)[:, :, 2:30, 2:30]


class FashionTally:
    """FID, precision and recall in the classifier's 128-wide feature space, and its agreement with the prompts."""

    def __init__(self, model: Model, classifier: fashion.Classifier, reference: torch.Tensor) -> None:
        self._model, self._classifier = model, classifier
        self._distance = SetDistance(reference)
        self._right = self._count = 0

    @torch.no_grad()
    def add(self, images: torch.Tensor, indexes: Sequence[int]) -> None:
        features = self._classifier.features(garments(images))
        self._distance.add(features)
        self._right += int((self._classifier.head(features).argmax(1) == self._model.labels_of(indexes)).sum())
        self._count += len(images)

    def scores(self) -> Scores:
        precision, recall = self._distance.precision_recall() or (None, None)
        agreement = self._right / self._count
        return Scores(fid=self._distance.fid(), precision=precision, recall=recall, agreement=agreement)


@torch.no_grad()
def fashion_judge(model: Model, real: torch.Tensor | None = None) -> Judge:
    """Judges by the classifier; `real` images (count, 1, 28, 28) are the whole test set where left out."""
    classifier = fashion.Classifier()
    load_weights(classifier, CLASSIFIER)
    classifier.eval()
    images = fashion.load("t10k")[0] if real is None else real
    reference = torch.cat([classifier.features(part) for part in images.split(500)])
    about = (
        f"FID, precision and recall are in the feature space (128 wide) of a classifier trained on Fashion-MNIST's "
        f"training set, against {len(images)} images of its test set: comparable with one another, not with Inception's"
    )
    return Judge(about, lambda: FashionTally(model, classifier, reference))


# Any text-to-image model.


class HubTally:
    """CLIP score of images with their prompts; and FID, precision and recall where there are reference images."""

    def __init__(self, model: Model, clip: Any, features: torch.nn.Module | None, reference: Any) -> None:
        self._model, self._clip, self._features = model, clip, features
        self._distance = SetDistance(reference) if features is not None else None
        clip.reset()

    @torch.no_grad()
    def add(self, images: torch.Tensor, indexes: Sequence[int]) -> None:
        pixels = to_bytes(images).to(self._model.device)
        self._clip.update(list(pixels), self._model.prompts_of(indexes))
        if self._distance is not None and self._features is not None:
            self._distance.add(self._features(pixels))

    def scores(self) -> Scores:
        clip_score = float(self._clip.compute())
        if self._distance is None:
            return Scores(clip_score=clip_score)
        precision, recall = self._distance.precision_recall() or (None, None)
        return Scores(fid=self._distance.fid(), precision=precision, recall=recall, clip_score=clip_score)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """(count, 3, height, width), uint8, of images in [0, 1]."""
    return (images.expand(-1, 3, -1, -1) * 255).round().byte()


def hub_judge(
    model: Model,
    clip: str = CLIP,
    reference: Path | None = None,
    extractor: Callable[[], torch.nn.Module] | None = None,
) -> Judge:
    """Judges by CLIP, and by Inception against the images of a directory where one is given.

    Raises:
        LoadError: CLIP or Inception, or the directory, cannot be had.
    """
    score = load_clip(clip).to(model.device)
    if reference is None:
        notes = ("no FID: pass a directory of real images with --reference (the paper's: 5,000 of COCO 2017, val)",)
        return Judge(f"CLIP score by {Path(clip).name}", lambda: HubTally(model, score, None, None), notes)
    features = (extractor or load_inception)().to(model.device)
    size = tuple(model.generate([0], steps=4, seed=0).shape[-2:])
    with torch.no_grad():
        real = torch.cat([features(batch.to(model.device)) for batch in read_images(reference, size)])
    about = f"CLIP score by {Path(clip).name}; FID by Inception against {len(real)} images of {reference.name}"
    return Judge(about, lambda: HubTally(model, score, features, real))


def load_clip(name: str) -> Any:
    """torchmetrics' CLIP score with this model, by directory or name on the Hub."""
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    class Features(CLIPModel):  # type: ignore[misc]
        """torchmetrics wants tensors of these two; transformers 5 returns a structure with the tensor in it."""

        def get_image_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return _pooled(super().get_image_features(*args, **kwargs))

        def get_text_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return _pooled(super().get_text_features(*args, **kwargs))

    try:
        model, processor = Features.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoadError(f"the CLIP model {name!r} cannot be had: {str(error).splitlines()[0]}") from error
    return CLIPScore(lambda: (model, processor))


def _pooled(output: Any) -> torch.Tensor:
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found


def load_inception() -> torch.nn.Module:
    """Inception's 2048-wide features of bytes (count, 3, height, width), as torchmetrics' FID takes them."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network: torch.nn.Module = FrechetInceptionDistance(2048).inception
    except ModuleNotFoundError as error:
        raise LoadError("FID by Inception needs torch-fidelity: pip install torch-fidelity") from error
    except OSError as error:  # what urllib raises
        raise LoadError(f"Inception's weights cannot be fetched: {str(error).splitlines()[0]}") from error
    return network


def read_images(directory: Path, size: Sequence[int], batch: int = 32) -> Iterator[torch.Tensor]:
    """Every PNG or JPEG of a directory, in order of their names: bytes (count, 3, *size), cut square and resized.

    Raises:
        LoadError: there are none.
    """
    paths = sorted(p for p in directory.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise LoadError(f"{directory} holds no PNG or JPEG images")
    for start in range(0, len(paths), batch):
        pixels = [_read_image(path, size) for path in paths[start : start + batch]]
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def _read_image(path: Path, size: Sequence[int]) -> np.ndarray:
    from PIL import ImageOps

    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS))
