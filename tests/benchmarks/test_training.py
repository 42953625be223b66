"""What the scripts that train the embedded models share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.models import training


def test_the_average_moves_towards_the_weights_and_counts_are_copied() -> None:
    model = torch.nn.BatchNorm1d(2)
    mean = training.copies(model)
    with torch.no_grad():
        model.weight.add_(1.0)
        model.num_batches_tracked.add_(3)
    training.average(mean, model, 0.75)
    assert mean["weight"].tolist() == [1.25, 1.25]
    assert mean["num_batches_tracked"] == 3
    assert model.weight.tolist() == [2.0, 2.0]


def test_a_checkpoint_comes_back_as_it_was_and_a_broken_one_never_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "unet.pt"
    assert training.load_checkpoint(path, "cpu") is None
    training.save_checkpoint(path, {"step": 3, "mean": {"weight": torch.ones(2)}})
    with pytest.raises(AttributeError, match="local object"):
        training.save_checkpoint(path, {"step": lambda: 4})
    found = training.load_checkpoint(path, "cpu")
    assert found is not None
    assert (found["step"], found["mean"]["weight"].tolist()) == (3, [1.0, 1.0])
    training.save_checkpoint(path, {"step": 5})
    assert training.load_checkpoint(path, "cpu") == {"step": 5}
    assert list(tmp_path.iterdir()) == [path]


def test_garments_are_padded_with_black() -> None:
    padded = training.pad32(torch.ones(2, 1, 28, 28))
    assert padded.shape == (2, 1, 32, 32)
    assert padded[0, 0, 1, 1] == -1
    assert padded[0, 0, 2, 2] == 1
