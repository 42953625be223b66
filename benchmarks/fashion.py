"""Fashion-MNIST: the data, the prompts that name its classes, and a small classifier to judge samples."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn

DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the four idx files."""

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PROMPTS = (
    "a t-shirt",
    "a trouser",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a grayscale photo of {}")


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path, "rb") as file:
        data = file.read()
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(split: str, data_dir: Path = DATA_DIR) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as float32 (count, 1, 28, 28) in [0, 1] and labels as int64 (count,); split is "train" or "t10k"."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir} does not exist: install Debian's package dataset-fashion-mnist")
    images = _read_idx(data_dir / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(data_dir / f"{split}-labels-idx1-ubyte.gz")
    return torch.from_numpy(images.astype(np.float32) / 255.0)[:, None], torch.from_numpy(labels.astype(np.int64))


class Classifier(nn.Module):
    """A small convolutional classifier of 28x28 garments; `features` is its 128-wide penultimate layer."""

    def __init__(self) -> None:
        super().__init__()

        def block(cin: int, cout: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

        self.body = nn.Sequential(
            block(1, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64), nn.MaxPool2d(2), block(64, 128)
        )
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(128, len(CLASSES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images * 2 - 1).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (count, 10) of images (count, 1, 28, 28) in [0, 1]."""
        return self.head(self.drop(self.features(images)))
