"""What the scripts that train the embedded models have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def options(script: str, *, out: str, work: str, lr: float) -> argparse.ArgumentParser:
    """The options of every script.

    Args:
        script: Its docstring.
        out: A directory beside this file.
        work: A directory below build/.
        lr: The learning rate.
    """
    parser = argparse.ArgumentParser(description=script.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / out, help="where the model is saved")
    parser.add_argument("--work", type=Path, default=Path("build", work), help="checkpoints; a rerun resumes here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=lr)
    return parser


def begin(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)


def pad32(images: torch.Tensor) -> torch.Tensor:
    """(count, 1, 28, 28) in [0, 1] to (count, 1, 32, 32) in [-1, 1]."""
    return F.pad(images, (2, 2, 2, 2)) * 2 - 1


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights as they are now: what an average begins with."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def average(mean: Mapping[str, torch.Tensor], model: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's; whole numbers, as counts are, are copied."""
    for key, value in model.state_dict().items():
        mean[key].lerp_(value, 1 - decay) if value.is_floating_point() else mean[key].copy_(value)


def save_checkpoint(path: Path, values: Mapping[str, Any]) -> None:
    """Write it as a whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(dict(values), part)
    part.replace(path)


def load_checkpoint(path: Path, device: str) -> dict[str, Any] | None:
    """None where there is none yet."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """How the model was trained, beside it."""
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
