"""The models whose images are compared: the two trained here, and any pipeline of diffusers."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import deepcache_fx
from benchmarks import fashion
from benchmarks.fidelity import class_conditional
from benchmarks.fidelity.clock import CallTimer
from benchmarks.fidelity.samplers import seed_noise, use_sampler
from deepcache_fx.comparing.loading import LoadError, load_pipeline, pick_device, pick_dtype, read_prompts

MODELS = Path(__file__).parents[1] / "models"
DIRECTORIES = {"t2i": MODELS / "fashion-t2i", "ddpm": MODELS / "fashion-ddpm"}
"""The embedded models, both of Fashion-MNIST, by their short names."""
GUIDANCE = {"t2i": 4.0}
"""Of the embedded models; the others leave it to the pipeline."""


@dataclass(frozen=True)
class UNetCost:
    """Multiply-accumulates of one UNet call for one image, all samples of guidance included; as `plan` counts them."""

    full: float
    """Of the model as it is."""
    shallow: float
    """As `optimize` runs it: what depends on the cached feature alone is part of the full step."""
    block: int
    layer: int
    """Where the cached feature enters, in the published numbering."""

    @property
    def share(self) -> float:
        return self.shallow / self.full

    def of(self, calls: str) -> float:
        """Of a run with these calls, F full and s shallow."""
        return calls.count("F") * self.full + calls.count("s") * self.shallow


@dataclass(frozen=True)
class Model:
    """A pipeline and what to ask it for."""

    name: str
    pipe: Any
    prompts: tuple[str, ...]
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of every pipeline call beside prompts, steps and seeds."""
    scheduler: Any = field(init=False)
    """The pipeline's own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler", self.pipe.scheduler)

    def use_sampler(self, name: str) -> None:
        """Sample in this way, configured as the pipeline's own scheduler is, whatever came between."""
        self.pipe.scheduler = self.scheduler
        use_sampler(self.pipe, name)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipe.device
        return device

    @property
    def dtype(self) -> str:
        return str(self.pipe.unet.dtype).removeprefix("torch.")

    def prompts_of(self, indexes: Sequence[int]) -> list[str]:
        return [self.prompts[index % len(self.prompts)] for index in indexes]

    def labels_of(self, indexes: Sequence[int]) -> torch.Tensor:
        return torch.tensor([index % len(self.prompts) for index in indexes])

    def generate(self, indexes: Sequence[int], *, steps: int, seed: int) -> torch.Tensor:
        """Images (count, channels, height, width) in [0, 1], float32 on the CPU; the seeds are seed + index.

        The noise that a sampler draws at its steps is that of the same seeds: it depends on the image alone, not on the
        batch, nor on how the UNet's output comes about.
        """
        seeds = [seed + index for index in indexes]
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        seed_noise(self.pipe.scheduler, seeds)
        images: torch.Tensor = self.pipe(
            self.prompts_of(indexes), num_inference_steps=steps, generator=generators, output_type="pt", **self.call
        ).images
        return images.float().cpu()

    def fingerprint(self) -> str:
        """Equal for equal weights and settings: of every tensor the shape, the sum and the first values."""
        digest = hashlib.sha256(repr(sorted(self.call.items())).encode())
        for name, part in sorted(self.pipe.components.items()):
            if isinstance(part, torch.nn.Module):
                for key, value in part.state_dict().items():
                    head = value.flatten()[:64].double().cpu()
                    total = value.double().sum().cpu() if value.is_floating_point() else value.sum().cpu()
                    digest.update(f"{name}.{key} {tuple(value.shape)} {float(total):.6e}".encode())
                    digest.update(head.numpy().tobytes())
        return digest.hexdigest()[:10]

    def cost(self, branch: int) -> UNetCost:
        """Counted by `deepcache_fx.plan` on a call that this pipeline really makes."""
        timer = CallTimer(self.device)
        with timer.attached(self.pipe.unet):
            self.generate([0], steps=4, seed=0)
        args, kwargs = timer.arguments
        bound = inspect.signature(type(self.pipe.unet).forward).bind(self.pipe.unet, *args, **kwargs).arguments
        example = {name: value for name, value in list(bound.items())[1:] if value is not None}
        branches = deepcache_fx.plan(self.pipe.unet, example_inputs=example).branches
        if branch >= len(branches):
            raise LoadError(f"{self.name} has skip connections 0 to {len(branches) - 1}, not {branch}")
        found = branches[branch]
        return UNetCost(found.full.total, found.hoisted.total, found.block, found.layer)


def load_model(name: str, *, device: str | None = None, dtype: str | None = None, prompts: Path | None = None) -> Model:
    """t2i, ddpm, or a text-to-image pipeline by directory or name on the Hub.

    Raises:
        LoadError: it is not there, cannot be fetched, or there are no prompts for it.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    directory = str(DIRECTORIES.get(name, name))
    if name == "ddpm":
        return Model(name, class_conditional.load(Path(directory), dtype=kind, device=where), fashion.PROMPTS)
    pipe = load_pipeline(directory, dtype=kind, device=where)
    texts = read_prompt_file(prompts) if prompts is not None else read_prompts(directory)
    if not texts:
        raise LoadError(f"{name} suggests no prompts of its own: pass a file of them, one a line, with --prompts")
    call = {"guidance_scale": GUIDANCE[name]} if name in GUIDANCE else {}
    return Model(name if name in DIRECTORIES else Path(name).name, pipe, texts, call)


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """Prompts, one a line; empty lines do not count.

    Raises:
        LoadError: the file is missing or empty.
    """
    if not path.is_file():
        raise LoadError(f"there is no file of prompts {path}")
    texts = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not texts:
        raise LoadError(f"{path} holds no prompts: one a line is needed")
    return texts
