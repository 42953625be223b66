"""Small real models: diffusers UNets and pipelines with random weights, and U-Nets written outside diffusers."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TEXT = 16


def sd_unet(**changes: object) -> UNet2DConditionModel:
    """SD-shaped: three cross-attention levels and a plain one would be the original; here two and one."""
    torch.manual_seed(0)
    config: dict[str, object] = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return UNet2DConditionModel(**{**config, **changes}).eval()


def sdxl_unet(**changes: object) -> UNet2DConditionModel:
    """SDXL-shaped: no attention at the top level, several transformer layers below, size and text embeddings added."""
    config: dict[str, object] = dict(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
    )
    return sd_unet(**{**config, **changes})


def tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=12)


def text_config(tokens: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=TEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd_pipeline(unet: torch.nn.Module | None = None) -> StableDiffusionPipeline:
    tokens = tokenizer()
    torch.manual_seed(2)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokens)).eval(),
        tokenizer=tokens,
        unet=unet or sd_unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline(unet: torch.nn.Module | None = None) -> StableDiffusionXLPipeline:
    tokens = tokenizer()
    torch.manual_seed(2)
    config = text_config(tokens)
    # As in SDXL, the hidden states of both encoders are concatenated: the UNet sees twice the width.
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet or sdxl_unet(cross_attention_dim=2 * TEXT),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: object, steps: int = 10, seed: int = 0, **arguments: object) -> torch.Tensor:
    """Latents of one generation with classifier-free guidance."""
    generator = torch.Generator().manual_seed(seed)
    call = dict(
        prompt="a cat", num_inference_steps=steps, generator=generator, guidance_scale=5.0, output_type="latent"
    )
    return pipe(**{**call, **arguments}).images  # type: ignore[operator]
