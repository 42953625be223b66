"""The score of the embedded DDPM itself, uncached, and of real images, the best to hope for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import fashion
from benchmarks.fidelity import class_conditional
from benchmarks.fidelity.cases import Scores
from benchmarks.fidelity.judges import fashion_judge
from benchmarks.fidelity.models import Model
from benchmarks.fidelity.sweep import batches

SEED = 10_000
"""Of the first image: others than those that a sweep starts from by default."""


@torch.no_grad()
def own_score(directory: Path, samples: int, *, steps: int = 50, batch: int = 100) -> dict[str, Any]:
    """Scores of `samples` generated images, as many of each class, and of as many real training images."""
    device = torch.device("cpu")
    model = Model("ddpm", class_conditional.load(directory, dtype=torch.float32, device=device), fashion.PROMPTS)
    model.use_sampler("ddim")
    judge = fashion_judge(model)
    generated, real = judge.start(), judge.start()
    columns = (TextColumn("judging"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=samples)
        for part in batches(samples, batch):
            generated.add(model.generate(part, steps=steps, seed=SEED), part)
            progress.update(task, completed=part.stop)
    real.add(real_images(samples), range(samples))
    return {
        "about": f"{samples} images, {steps} DDIM steps. {judge.about}",
        "generated": _plain(generated.scores()),
        "real": _plain(real.scores()),
    }


def real_images(count: int) -> torch.Tensor:
    """Training images (count, 1, 32, 32) in [0, 1] whose classes come in turn, as those of generated ones do."""
    images, labels = fashion.load("train")
    of_class = [images[labels == label] for label in range(len(fashion.CLASSES))]
    picked = [of_class[i % len(of_class)][i // len(of_class)] for i in range(count)]
    return F.pad(torch.stack(picked), (2, 2, 2, 2))


def _plain(scores: Scores) -> dict[str, float]:
    return {name: value for name, value in asdict(scores).items() if value is not None}
