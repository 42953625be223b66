"""A diffusers pipeline around a class-conditional `UNet2DModel` in pixel space, which diffusers has no class for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from benchmarks import fashion
from benchmarks.fidelity.samplers import takes_generator
from deepcache_fx.comparing.loading import load_pipeline


class ClassConditionalPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Called like a text-to-image pipeline; a prompt is one of the names in `prompts`, its index the class."""

    prompts: tuple[str, ...] = fashion.PROMPTS

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
    ) -> ImagePipelineOutput:
        """Images (count, channels, height, width) in [0, 1] for output_type "pt"; in [-1, 1] for "latent".

        Raises:
            ValueError: a prompt names no class, or the output type is another.
        """
        if output_type not in ("pt", "latent"):
            raise ValueError(f"output_type is pt or latent here, got {output_type!r}")
        names = [prompt] if isinstance(prompt, str) else list(prompt)
        unknown = sorted(set(names) - set(self.prompts))
        if unknown:
            raise ValueError(f"no such class: {', '.join(unknown)}; there are: {', '.join(self.prompts)}")
        labels = torch.tensor([self.prompts.index(name) for name in names], device=self.device)
        config = self.unet.config
        shape = (len(names), config.in_channels, config.sample_size, config.sample_size)
        sample = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        sample = sample * self.scheduler.init_noise_sigma
        drawn = {"generator": generator} if takes_generator(self.scheduler) else {}
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for t in self.scheduler.timesteps:
                noise = self.unet(self.scheduler.scale_model_input(sample, t), t, class_labels=labels).sample
                sample = self.scheduler.step(noise, t, sample, **drawn).prev_sample
                progress.update()
        return ImagePipelineOutput(images=sample if output_type == "latent" else (sample / 2 + 0.5).clamp(0, 1))


def load(directory: Path, *, dtype: torch.dtype, device: torch.device) -> ClassConditionalPipeline:
    """The pipeline of a directory that `benchmarks.models.train_ddpm` wrote.

    Raises:
        LoadError: there is none, or it cannot be read.
    """
    plain = load_pipeline(str(directory), dtype=dtype, device=device)
    pipe = ClassConditionalPipeline(plain.unet.eval(), plain.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
