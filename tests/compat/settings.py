"""Runs of the published pipelines that both the published code, with the diffusers of its time, and ours can make.

The networks are tiny, and every parameter is drawn by its name: they are the same in every version of diffusers.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from transformers import CLIPImageProcessor

RECORDED = Path(__file__).with_name("published.safetensors")
TEXT = 16
PIXELS = 8

_SD = dict(
    sample_size=PIXELS,
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=TEXT,
    attention_head_dim=2,
)
_SDXL = dict(
    _SD,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + TEXT,
)
_SVD = dict(
    sample_size=PIXELS,
    num_frames=2,
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
    up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
    cross_attention_dim=TEXT,
    num_attention_heads=2,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
)
_SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
}

_PUBLISHED = dict(cache_interval=5, cache_layer_id=0, cache_block_id=0)
_POWER = dict(_PUBLISHED, uniform=False, pow=1.4, center=15)
"""As in the published README."""


def _sd(**changes: Any) -> dict[str, Any]:
    return {**_PUBLISHED, **changes}


# A non-uniform schedule is a NameError in the published SDXL pipelines: numpy is not imported there.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sd": [
        *({"scheduler": "ddim", "steps": 50, **given} for given in ({}, _PUBLISHED, _POWER)),
        *({"scheduler": "pndm", "steps": 50, **given} for given in (_PUBLISHED, _POWER)),
        *({"scheduler": "pndm", "steps": 20, **_sd(cache_interval=interval)} for interval in (1, 2, 3, 10)),
        *(
            {"scheduler": "ddim", "steps": 10, **_sd(cache_interval=3, cache_layer_id=block, cache_block_id=module)}
            for block, module in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
        ),
        {"scheduler": "heun", "steps": 10, **_sd(cache_interval=3)},
        {"scheduler": "ddim", "steps": 10, "guidance_scale": 1.0, **_sd(cache_interval=3)},
        {"scheduler": "ddim", "steps": 10, "cache_interval": 3},
    ],
    "sdxl": [
        *({"scheduler": "euler", "steps": 50, **given} for given in ({}, _sd(cache_interval=3), _PUBLISHED)),
        *(
            {"scheduler": "ddim", "steps": 10, **_sd(cache_interval=3, cache_layer_id=block, cache_block_id=module)}
            for block, module in ((0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2))
        ),
        {"scheduler": "ddim", "steps": 20, "denoising_end": 0.6, **_sd(cache_interval=3)},
    ],
    "sdxl-img2img": [
        *({"scheduler": "ddim", "steps": 20, "strength": strength, **_sd(cache_interval=3)} for strength in (0.3, 0.8)),
        {"scheduler": "pndm", "steps": 20, "strength": 0.8, **_sd(cache_interval=2)},
    ],
    "svd": [
        *({"scheduler": "karras", "steps": 5, "cache_interval": 3, "cache_branch": one} for one in (0, 2, 8)),
        {"scheduler": "karras", "steps": 5},
    ],
}


def name(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def pipeline(kind: str, cls: Any, unet_cls: Any) -> Any:
    """A tiny pipeline of this class around a UNet of that one."""
    config = {"sd": _SD, "svd": _SVD}.get(kind, _SDXL)
    unet = _draw(unet_cls(**config))
    scheduler = diffusers.DDIMScheduler()
    if kind == "svd":
        parts = dict(
            vae=_draw(diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4)),
            image_encoder=_Encoder(),
            feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        )
    else:
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=PIXELS)
        parts = dict(vae=_draw(vae), text_encoder=None, tokenizer=None)
        if kind == "sd":
            parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        else:
            parts |= dict(text_encoder_2=_Encoder(), tokenizer_2=None, add_watermarker=False)
    pipe = cls(unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(kind: str, pipe: Any, setting: dict[str, Any]) -> torch.Tensor:
    """The result of a run: (1, 4, 8, 8), of a video (1, 2, 4, 8, 8)."""
    scheduler, options = _SCHEDULERS[setting["scheduler"]]
    cls = _remembering(getattr(diffusers, scheduler))
    pipe.scheduler = cls(beta_schedule="scaled_linear", steps_offset=1, **options)
    given = {key: value for key, value in setting.items() if key not in ("scheduler", "steps")}
    given["num_inference_steps"] = setting["steps"]
    given["output_type"] = "pt" if kind == "sd" else "latent"  # the published one has an error there
    if kind == "svd":
        given |= dict(image=_drawn("image", 1, 3, PIXELS, PIXELS).sigmoid(), height=PIXELS, width=PIXELS)
        given |= dict(num_frames=2, generator=torch.Generator().manual_seed(0))
        pipe(**given)
        return pipe.scheduler.latents
    given.setdefault("guidance_scale", 5.0)
    given |= {key: _drawn(key, 1, 6, TEXT) for key in ("prompt_embeds", "negative_prompt_embeds")}
    if kind != "sd":
        pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given |= {key: _drawn(key, 1, TEXT) for key in pooled}
    if kind == "sdxl-img2img":
        given |= dict(image=_drawn("latents", 1, 4, PIXELS, PIXELS), generator=torch.Generator().manual_seed(0))
    else:
        given["latents"] = _drawn("latents", 1, 4, PIXELS, PIXELS)
    pipe(**given)
    return pipe.scheduler.latents


def _remembering(scheduler: Any) -> Any:
    """A class of schedulers that keep the latents that their last step made."""

    @functools.wraps(scheduler.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = scheduler.step(self, *args, **kwargs)
        self.latents = result[0]
        return result

    return type(scheduler.__name__, (scheduler,), {"step": step})


class _Encoder(torch.nn.Module):
    """Of images; of texts it is only asked what it is like."""

    dtype = torch.float32
    device = torch.device("cpu")
    config = SimpleNamespace(projection_dim=TEXT)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> Any:
        return SimpleNamespace(image_embeds=self.scale * _drawn("image_embeds", 1, TEXT))


def _draw(module: Any) -> Any:
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            value = _drawn(key, *parameter.shape)
            if parameter.ndim > 1:
                value /= parameter[0].numel() ** 0.5
            else:
                value = 0.1 * value + (key.endswith("weight") and "norm" in key)
            parameter.copy_(value)
    return module.eval()


def _drawn(key: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
