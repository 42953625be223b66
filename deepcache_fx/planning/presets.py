"""UNets of published models by name: configuration, and the inputs of one call. For use without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.planning.example_inputs import example_inputs


@dataclass(frozen=True)
class Preset:
    """A published UNet: what builds it, and the sizes of one call as its pipeline makes it.

    Example:
        >>> unet = preset("sd15").build(device="cuda", dtype=torch.float16)
        >>> noise = unet(**preset("sd15").inputs(unet)).sample
    """

    name: str
    source: str
    """Where the configuration was published: a repository of the hub, or a file in one of GitHub."""
    config: Mapping[str, Any]
    """As in the repository's config.json: `_class_name` is the class of diffusers."""
    batch: int
    """Samples in one call for one image: 2 with classifier-free guidance."""
    height: int
    width: int
    """In latent pixels."""
    tokens: int | None = None
    """Length of the conditioning sequence where it is not the usual one."""
    scale: int = 8
    """Pixels of the picture per latent pixel."""

    def build(self, *, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The UNet in eval mode, with random weights; on the meta device with none.

        Raises:
            DeepCacheError: this version of diffusers has no such class, or refuses the configuration.
        """
        return build_unet(self.config, device=device, dtype=dtype)

    def inputs(
        self, unet: torch.nn.Module, *, batch: int | None = None, height: int | None = None, width: int | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of one call of `unet`, on its device and in its dtype; sizes in latent pixels."""
        return example_inputs(
            unet,
            batch=self.batch if batch is None else batch,
            height=self.height if height is None else height,
            width=self.width if width is None else width,
            tokens=self.tokens,
        )


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        DeepCacheError: there is none; lists the names.
    """
    if name not in PRESETS:
        raise DeepCacheError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


def build_unet(
    config: Mapping[str, Any], *, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """A model of diffusers from its config.json, in eval mode, with random weights; on the meta device with none.

    Raises:
        DeepCacheError: this version of diffusers has no such class, or refuses the configuration.
    """
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise DeepCacheError(f"the configuration's _class_name is {name!r}: diffusers has no model of that name")
    try:
        with torch.device(device):
            model = cls.from_config(dict(config))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise DeepCacheError(f"{name} refuses its configuration: {' '.join(str(error).split())}") from error
    assert isinstance(model, torch.nn.Module)
    # Some layers put a parameter on the CPU, whatever the device. diffusers' own .to() warns about any change of dtype.
    return torch.nn.Module.to(model, device=device, dtype=dtype).eval()


_CROSS_DOWN, _CROSS_UP = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
_DOWN, _UP = ("DownBlock2D",), ("UpBlock2D",)

# Options that have the default value of diffusers are left out, except where they say what the model is.
# attention_head_dim of UNet2DConditionModel is, by a mistake that became an interface, the number of heads.
_SD15 = dict(
    _class_name="UNet2DConditionModel",
    sample_size=64,
    in_channels=4,
    out_channels=4,
    down_block_types=_CROSS_DOWN * 3 + _DOWN,
    up_block_types=_UP + _CROSS_UP * 3,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
)

_SD21 = dict(
    _SD15,
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
    upcast_attention=True,
)

_SDXL = dict(
    _SD15,
    sample_size=128,
    down_block_types=_DOWN + _CROSS_DOWN * 2,
    up_block_types=_CROSS_UP * 2 + _UP,
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=6 * 256 + 1280,
)

_SDXL_REFINER = dict(
    _SDXL,
    down_block_types=_DOWN + _CROSS_DOWN * 2 + _DOWN,
    up_block_types=_UP + _CROSS_UP * 2 + _UP,
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,
    attention_head_dim=(6, 12, 24, 24),
    projection_class_embeddings_input_dim=5 * 256 + 1280,
)

_SVD = dict(
    _class_name="UNetSpatioTemporalConditionModel",
    sample_size=96,
    num_frames=14,
    in_channels=8,
    out_channels=4,
    down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
    up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    transformer_layers_per_block=1,
    cross_attention_dim=1024,
    num_attention_heads=(5, 10, 20, 20),
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=768,
)

# The published class is openaimodel.UNetModel with model_channels 192, channel_mult 1 2 3 5, attention_resolutions
# 8 4 2 and num_heads 1: the same layers. Its condition is one class embedding of 512 numbers.
_LDM4 = dict(
    _SD15,
    in_channels=3,
    out_channels=3,
    down_block_types=_DOWN + _CROSS_DOWN * 3,
    up_block_types=_CROSS_UP * 3 + _UP,
    block_out_channels=(192, 384, 576, 960),
    cross_attention_dim=512,
    attention_head_dim=1,
)

_DDPM_CIFAR10 = dict(
    _class_name="UNet2DModel",
    sample_size=32,
    in_channels=3,
    out_channels=3,
    flip_sin_to_cos=False,
    freq_shift=1,
    down_block_types=_DOWN + ("AttnDownBlock2D",) + _DOWN * 2,
    up_block_types=_UP * 2 + ("AttnUpBlock2D",) + _UP,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    downsample_padding=0,
    attention_head_dim=None,  # one head
    norm_eps=1e-6,
)

_DDPM_LSUN = dict(
    _DDPM_CIFAR10,
    sample_size=256,
    down_block_types=_DOWN * 4 + ("AttnDownBlock2D",) + _DOWN,
    up_block_types=_UP + ("AttnUpBlock2D",) + _UP * 4,
    block_out_channels=(128, 128, 256, 256, 512, 512),
)

_ALL = (
    Preset("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", _SD15, 2, 64, 64),
    Preset("sd21", "stabilityai/stable-diffusion-2-1", _SD21, 2, 96, 96),
    Preset("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", _SDXL, 2, 128, 128),
    Preset("sdxl-refiner", "stabilityai/stable-diffusion-xl-refiner-1.0", _SDXL_REFINER, 2, 128, 128),
    Preset("svd", "stabilityai/stable-video-diffusion-img2vid", _SVD, 2, 72, 128),
    Preset("ldm4-imagenet", "CompVis/latent-diffusion: cin256-v2.yaml", _LDM4, 1, 64, 64, tokens=1, scale=4),
    Preset("ddpm-church", "google/ddpm-church-256", _DDPM_LSUN, 1, 256, 256, scale=1),
    Preset("ddpm-bedroom", "google/ddpm-bedroom-256", _DDPM_LSUN, 1, 256, 256, scale=1),
    Preset("ddpm-cifar10", "google/ddpm-cifar10-32", _DDPM_CIFAR10, 1, 32, 32, scale=1),
)

PRESETS: Mapping[str, Preset] = {item.name: item for item in _ALL}
"""Every preset by name. LDM-4-G is given per sample, as its MACs are published; guided sampling calls it with 2."""
