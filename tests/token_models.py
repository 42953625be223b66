"""Small transformers of diffusers with random weights, and a call of each: models that join tokens, not channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

Case = tuple[torch.nn.Module, dict[str, Any]]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _step(batch: int = 1) -> torch.Tensor:
    return torch.full((batch,), 500)


def flux(image: int = 16) -> Case:
    """Joint attention over text and image, then single-stream blocks over both; 4 tokens of text, 16 wide."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return model, {
        "hidden_states": _noise(1, image, 4),
        "encoder_hidden_states": _noise(1, 4, 16),
        "pooled_projections": _noise(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(image, 3),
        "txt_ids": torch.zeros(4, 3),
    }


def flux_with_as_many_tokens_as_channels() -> Case:
    return flux(image=12)


def chroma() -> Case:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    inputs = flux()[1]
    del inputs["pooled_projections"]
    return model, inputs


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": _noise(1, 4, 8, 8),
        "encoder_hidden_states": _noise(1, 5, 16),
        "pooled_projections": _noise(1, 16),
        "timestep": _step(),
    }


def auraflow() -> Case:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return model, {
        "hidden_states": _noise(1, 4, 8, 8),
        "encoder_hidden_states": _noise(1, 5, 16),
        "timestep": torch.tensor([0.5]),
    }


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    return model, {"hidden_states": _noise(1, 4, 8, 8), "timestep": _step(), "class_labels": torch.tensor([1])}


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": _noise(1, 4, 8, 8),
        "encoder_hidden_states": _noise(1, 5, 16),
        "timestep": _step(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def hunyuan_dit() -> Case:
    """Long skips, as in a U-ViT: tokens joined by width, on the last axis."""
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=4,
        text_len_t5=6,
        use_style_cond_and_image_meta_size=False,
    )
    return model, {
        "hidden_states": _noise(1, 4, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": _noise(1, 4, 16),
        "text_embedding_mask": torch.ones(1, 4, dtype=torch.bool),
        "encoder_hidden_states_t5": _noise(1, 6, 16),
        "text_embedding_mask_t5": torch.ones(1, 6, dtype=torch.bool),
        "image_rotary_emb": (_noise(16, 8), _noise(16, 8)),
    }


def uvit() -> Case:
    model = diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=16,
        vocab_size=34,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        sample_size=8,
    )
    return model, {
        "input_ids": torch.ones(1, 8, 8, dtype=torch.long),
        "encoder_hidden_states": _noise(1, 5, 16),
        "pooled_text_emb": _noise(1, 16),
        "micro_conds": _noise(1, 5),
    }


def cogvideox() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=5,
    )
    return model, {
        "hidden_states": _noise(1, 3, 4, 4, 4),
        "encoder_hidden_states": _noise(1, 5, 16),
        "timestep": _step(),
    }


def kandinsky_prior() -> Case:
    model = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=5,
        additional_embeddings=4,
    )
    return model, {
        "hidden_states": _noise(1, 16),
        "timestep": _step(),
        "proj_embedding": _noise(1, 16),
        "encoder_hidden_states": _noise(1, 5, 16),
    }


def stable_audio() -> Case:
    model = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=16,
    )
    return model, {
        "hidden_states": _noise(1, 4, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": _noise(1, 5, 16),
        "global_hidden_states": _noise(1, 1, 16),
        "rotary_embedding": (_noise(9, 4), _noise(9, 4)),
    }


def cogview3() -> Case:
    model = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    size = torch.tensor([[8, 8]])
    return model, {
        "hidden_states": _noise(1, 4, 8, 8),
        "encoder_hidden_states": _noise(1, 5, 16),
        "timestep": _step(),
        "original_size": size,
        "target_size": size,
        "crop_coords": size - 8,
    }


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return model, {
        "hidden_states": _noise(1, 16, 4),
        "encoder_hidden_states": _noise(1, 5, 16),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    }


CASES: tuple[Callable[[], Case], ...] = (
    flux,
    flux_with_as_many_tokens_as_channels,
    chroma,
    sd3,
    auraflow,
    dit,
    pixart,
    hunyuan_dit,
    uvit,
    cogvideox,
    kandinsky_prior,
    stable_audio,
    cogview3,
    qwen_image,
)
