"""The smallest pipelines that cache: captured in a second or two, 16x16 pixels, two levels, one cross-attention."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from deepcache_fx.comparing.comparison import Comparison, UNetCalls
from tests import models

SIZE = {"height": 16, "width": 16}
LEVELS = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
"""Of a UNet: attention in the deeper half."""
ATTENTION_ON_TOP = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    mid_block_type=None,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
"""Of a UNet: two transformer blocks in the last up block. The second belongs to the shallow step."""


def pipeline() -> StableDiffusionPipeline:
    return models.sd_pipeline(models.sd_unet(**LEVELS))


def _sdxl_unet() -> torch.nn.Module:
    return models.sdxl_unet(**LEVELS, transformer_layers_per_block=1, cross_attention_dim=2 * models.TEXT)


def base() -> StableDiffusionXLPipeline:
    return models.sdxl_pipeline(_sdxl_unet())


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    parts = models.sdxl_pipeline(_sdxl_unet()).components
    pipe = StableDiffusionXLImg2ImgPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")},
        requires_aesthetics_score=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def comparison(before: torch.Tensor, after: torch.Tensor, **changes: object) -> Comparison:
    """A result as `compare` returns it, without running anything; images are (count, channels, height, width)."""
    values: dict[str, object] = dict(
        prompts=tuple(f"prompt {i}" for i in range(len(before))),
        steps=10,
        seed=0,
        baseline_seconds=(4.0, 5.0, 9.0),
        optimized_seconds=(2.0, 2.0, 3.0),
        preparation_seconds=1.0,
        calls=(UNetCalls(full=4, shallow=6, uncached=0, full_macs=100, shallow_macs=10),),
        reports=(),
        baseline_images=before,
        optimized_images=after,
    )
    return Comparison(**{**values, **changes})  # type: ignore[arg-type]
