"""The real pipeline classes of diffusers around a UNet, with random weights and everything else kept out of the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from PIL import Image

from benchmarks.speed.subjects import Subject

VAE_SCALE = 8
"""Pixels per latent pixel and side: four levels of resolution."""

REAL_VAE: dict[str, Any] = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
TINY_VAE: dict[str, Any] = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


class _Called(Exception):
    """Carries the arguments of a UNet call out of a pipeline."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__("the UNet was called")
        self.arguments = arguments


class Stage:
    """Makes pipelines around UNets of one subject; they share a VAE.

    With `decode` the VAE has its real size (that of Stable Diffusion), else it is a stand-in that is never run.
    Text encoders are left out: prompt embeddings are passed in.
    """

    def __init__(self, subject: Subject, decode: bool) -> None:
        self.subject = subject
        self.name = subject.kind.pipeline
        self.decodes = decode and self.name not in (None, "DDIMPipeline")
        self._extra: dict[str, Any] = {}
        if self.name == "StableVideoDiffusionPipeline":
            self._extra = self._video_parts()
        elif self.name is not None and self.name != "DDIMPipeline":
            self._extra = self._image_parts()
        if self.name is not None:
            subject.arguments = self._called_with()

    def pipeline(self, unet: Any) -> Any:
        """The pipeline, or None for a model that diffusers has no pipeline class for."""
        if self.name is None:
            return None
        pipe = getattr(diffusers, self.name)(unet=unet, scheduler=self.subject.kind.scheduler(), **self._extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, steps: int, decode: bool = False) -> torch.Tensor:
        """One generation: latents, or images where `decode` is set."""
        generator = torch.Generator(self.subject.device).manual_seed(0)
        arguments: dict[str, Any] = dict(num_inference_steps=steps, generator=generator, return_dict=False)
        output = pipe(**arguments, **self._arguments(decode))[0]
        assert isinstance(output, torch.Tensor)
        return output

    def _called_with(self) -> dict[str, Any]:
        """What the pipeline passes to its UNet beside the sample and the timestep.

        The bare loop passes the very same: to a compiler, another way to pass the same is another call.
        """
        unet = self.subject.clone()

        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _Called(kwargs)

        unet.forward = forward
        try:
            self.run(self.pipeline(unet), 2)
        except _Called as call:
            return {**call.arguments}
        raise AssertionError(f"{self.name} did not call its UNet")

    # What each class wants.

    def _arguments(self, decode: bool) -> dict[str, Any]:
        subject = self.subject
        case = subject.case
        output = "pt" if decode else "latent"
        if self.name == "DDIMPipeline":
            return dict(batch_size=case.batch, output_type="pt")
        size = dict(height=VAE_SCALE * case.height, width=VAE_SCALE * case.width)
        if self.name == "StableVideoDiffusionPipeline":
            return dict(image=self._images(case.batch), decode_chunk_size=2, output_type=output, **size)
        negative, positive = subject.inputs["encoder_hidden_states"].chunk(2)
        arguments = dict(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            guidance_scale=subject.kind.guidance,
            output_type=output,
        )
        added = subject.inputs.get("added_cond_kwargs")
        if added is not None:
            negative, positive = added["text_embeds"].chunk(2)
            arguments |= dict(pooled_prompt_embeds=positive, negative_pooled_prompt_embeds=negative)
        if self.name == "StableDiffusionXLImg2ImgPipeline":
            return arguments | dict(image=subject.latents, strength=1.0)
        return arguments | dict(latents=subject.latents) | size

    def _image_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = dict(vae=self._place(AutoencoderKL, latent_channels=4), tokenizer=None)
        if self.name == "StableDiffusionPipeline":
            return parts | dict(
                text_encoder=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        parts |= dict(text_encoder=None, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
        if self.name == "StableDiffusionXLImg2ImgPipeline":
            parts["requires_aesthetics_score"] = True
        return parts

    def _video_parts(self) -> dict[str, Any]:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

        width = self.subject.inputs["encoder_hidden_states"].shape[-1]
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=224,
            patch_size=56, projection_dim=width,
        )  # fmt: skip
        encoder = CLIPVisionModelWithProjection(config).eval().to(self.subject.device, self.subject.dtype)
        vae = self._place(AutoencoderKLTemporalDecoder)
        return dict(image_encoder=encoder, feature_extractor=CLIPImageProcessor(), vae=vae)

    def _place(self, make: Callable[..., Any], **config: Any) -> Any:
        sizes = REAL_VAE if self.decodes else TINY_VAE
        if make is AutoencoderKLTemporalDecoder:
            sizes = {name: value for name, value in sizes.items() if name != "norm_num_groups"}
            if not self.decodes:
                sizes["block_out_channels"] = (32, 32, 32, 32)  # its groups are always 32
        blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4)
        if make is AutoencoderKL:
            blocks["up_block_types"] = ("UpDecoderBlock2D",) * 4
        with torch.device(self.subject.device):
            vae = make(**blocks, **sizes, **config)
        # The video pipeline hands its encoder float32 images unless the weights are float16.
        video = make is AutoencoderKLTemporalDecoder
        dtype = torch.float32 if video and self.subject.dtype is torch.bfloat16 else self.subject.dtype
        return torch.nn.Module.to(vae.eval(), dtype)

    def _images(self, count: int) -> Any:
        size = (VAE_SCALE * self.subject.case.height, VAE_SCALE * self.subject.case.width, 3)
        noise = np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8)
        return [Image.fromarray(pixels) for pixels in noise]
