"""The models under test: real configurations with random weights, and the denoising loop around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from benchmarks.speed.cases import Case
from benchmarks.speed.measure import UNetCall
from deepcache_fx.planning.presets import Preset, build_unet, preset

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TINY = Preset(
    name="tiny",
    source="none: for trying the suite out",
    config=dict(
        _class_name="UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    ),
    batch=2,
    height=8,
    width=8,
)


def find_preset(name: str) -> Preset:
    """A preset of the library, or "tiny"."""
    return TINY if name == "tiny" else preset(name)


@dataclass(frozen=True)
class Kind:
    """How a model is sampled."""

    pipeline: str | None
    """The pipeline class of diffusers that runs it; None where there is none."""
    guidance: float | None = 5.0
    """Of classifier-free guidance: the UNet sees a batch twice as large. None: without."""
    scheduler: Callable[[], Any] = DDIMScheduler


def _ddim() -> Any:
    """Reads every timestep back from the device: only where no other scheduler is used with the model."""
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _euler() -> Any:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def _euler_video() -> Any:
    return EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0,
        timestep_spacing="leading", use_karras_sigmas=True, steps_offset=1,
    )  # fmt: skip


KINDS = {
    "tiny": Kind("StableDiffusionPipeline", scheduler=_euler),
    "sd15": Kind("StableDiffusionPipeline", scheduler=_euler),
    "sd21": Kind("StableDiffusionPipeline", scheduler=_euler),
    "sdxl": Kind("StableDiffusionXLPipeline", scheduler=_euler),
    "sdxl-refiner": Kind("StableDiffusionXLImg2ImgPipeline", scheduler=_euler),
    "svd": Kind("StableVideoDiffusionPipeline", guidance=3.0, scheduler=_euler_video),
    "ldm4-imagenet": Kind(None, guidance=1.5, scheduler=_ddim),
    "ddpm-church": Kind("DDIMPipeline", guidance=None),
    "ddpm-bedroom": Kind("DDIMPipeline", guidance=None),
    "ddpm-cifar10": Kind("DDIMPipeline", guidance=None),
}
"""By the names of deepcache_fx.presets, and "tiny"."""


class Subject:
    """One model at one size, on its device, with what a run of it needs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.kind = KINDS[case.model]
        self.device = torch.device(case.device)
        self.dtype = DTYPES[case.dtype]
        self.preset = find_preset(case.model)
        self.unet = self._random_unet()
        rows = case.batch * (1 if self.kind.guidance is None else 2)
        inputs = self.preset.inputs(self.unet, batch=rows, height=case.height, width=case.width)
        self._sample, self._timestep = inputs.pop("sample"), inputs.pop("timestep")
        self.inputs: dict[str, Any] = inputs
        """Of a UNet call, beside the sample and the timestep."""
        self.arguments: dict[str, Any] = {**inputs, "return_dict": False}
        """The same, as the real pipeline passes them; without one, as its loop would."""
        sample = self._sample
        self._axis = 1 if sample.ndim == 4 else 2  # a video is (batch, frames, channels, height, width)
        channels = int(self.unet.config.out_channels)
        self.latents = sample[: case.batch].narrow(self._axis, 0, channels).contiguous()
        self._given = sample.narrow(self._axis, channels, sample.shape[self._axis] - channels)
        """Channels that stay as they are: the encoded image of a video model."""

    def meta_unet(self) -> torch.nn.Module:
        """The model without weights."""
        config = {**self.preset.config, "sample_size": self._sample_size}
        return build_unet(config, device="meta", dtype=self.dtype).requires_grad_(False)

    @property
    def _sample_size(self) -> Any:
        """What a pipeline without a VAE takes the size of its images from."""
        case = self.case
        return case.height if case.height == case.width else (case.height, case.width)

    def clone(self) -> Any:
        """Another module over the same weights: patching or converting it leaves the others alone."""
        clone = self.meta_unet()
        clone.load_state_dict(self.unet.state_dict(), assign=True)
        unset = [name for name, tensor in [*clone.named_parameters(), *clone.named_buffers()] if tensor.is_meta]
        assert not unset, f"not part of the state: {unset}"
        return clone.requires_grad_(False)

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.unet.parameters())

    @property
    def timestep_device(self) -> torch.device | None:
        """Where the real pipeline puts the timesteps."""
        return None if self.kind.pipeline == "DDIMPipeline" else self.device

    def example_call(self) -> dict[str, Any]:
        """The arguments of one UNet call, as the denoising loop makes it."""
        return {"sample": self._sample, "timestep": self._timestep, **self.arguments}

    def denoise(self, unet: Any, scheduler: Any, steps: int, call: UNetCall) -> torch.Tensor:
        """The latents that a run of the denoising loop makes, as in the pipelines, of the same noise every time."""
        scheduler.set_timesteps(steps, device=self.timestep_device)
        latents: torch.Tensor = self.latents * scheduler.init_noise_sigma
        guidance = self.kind.guidance
        with torch.no_grad():
            for index, timestep in enumerate(scheduler.timesteps):
                sample = latents if guidance is None else torch.cat([latents, latents])
                sample = scheduler.scale_model_input(sample, timestep)
                if self._given.numel():
                    sample = torch.cat([sample, self._given], dim=self._axis)
                output = call(index, self._bind(unet, sample, timestep))[0]
                if guidance is not None:
                    plain, guided = output.chunk(2)
                    output = plain + guidance * (guided - plain)
                latents = scheduler.step(output, timestep, latents).prev_sample
        return latents

    def _bind(self, unet: Any, sample: torch.Tensor, timestep: torch.Tensor) -> Callable[[], Any]:
        return lambda: unet(sample, timestep, **self.arguments)

    def _random_unet(self) -> Any:
        """The model on its device with weights of the usual magnitudes; nothing is loaded."""
        unet = self.meta_unet()
        assert not list(unet.buffers()), "its buffers would be undefined"
        unet = unet.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return unet
