"""The arguments of one UNet call, made up from the UNet's configuration and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.attach import original_class


def example_inputs(
    unet: torch.nn.Module,
    *,
    batch: int = 2,
    height: int | None = None,
    width: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of a UNet of diffusers: `unet(**example_inputs(unet))` runs.

    The tensors are noise from a fixed seed, in the UNet's dtype and on its device (which may be meta); the timestep is
    a 0-d integer tensor. Optional arguments appear where the configuration asks for them: text and size embeddings
    (SDXL), class labels, image embeddings (Kandinsky), the guidance embedding of distilled models.

    Args:
        unet: A model of diffusers.
        batch: Samples in the call; 2 is one image with classifier-free guidance.
        height: In latent pixels; from the configuration where left out.
        width: In latent pixels; from the configuration where left out.
        tokens: Length of the sequence attended to: where left out, 77 (CLIP text), or 1 (an image) for SVD.
        frames: Of a video model; from the configuration or 16 where left out.

    Raises:
        DeepCacheError: the module has no configuration, or one that does not tell everything; names what to pass.

    Example:
        >>> unet = UNet2DConditionModel.from_pretrained("stabilityai/stable-diffusion-2-1", subfolder="unet")
        >>> {name: tuple(value.shape) for name, value in example_inputs(unet).items()}
        {'sample': (2, 4, 96, 96), 'timestep': (), 'encoder_hidden_states': (2, 77, 1024)}
    """
    name = original_class(unet).__name__
    config = getattr(unet, "config", None)
    if not isinstance(config, Mapping) or "in_channels" not in config:
        raise DeepCacheError(f"{name} has no configuration of diffusers that tells its inputs: pass example_inputs=")
    parameter = next((p for p in unet.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise DeepCacheError(f"{name} has no floating-point parameter to tell the dtype: pass example_inputs=")
    sizes = dict(batch=batch, height=height, width=width, tokens=tokens, frames=frames)
    for key, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise DeepCacheError(f"{key} must be an integer of at least 1, got {size!r}")
    request = _Request(name, config, batch, height, width, tokens, frames, parameter.device, parameter.dtype)
    inputs: dict[str, Any] = {}
    for item in list(inspect.signature(original_class(unet).forward).parameters.values())[1:]:  # without self
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            continue
        required = item.default is item.empty
        maker = _MAKERS.get(item.name)
        value = None if maker is None else maker(request)
        if maker is None and required:
            raise request.unknown(f"argument {item.name}")
        if value is not None or required:
            inputs[item.name] = value
    return inputs


@dataclass(frozen=True)
class _Request:
    name: str
    config: Mapping[str, Any]
    batch: int
    height: int | None
    width: int | None
    tokens: int | None
    frames: int | None
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu").manual_seed(0))

    def noise(self, *shape: int) -> torch.Tensor:
        # Drawn on the CPU: there every device can have the same.
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.device, self.dtype)

    def get(self, key: str) -> Any:
        """A value of the configuration that must be there."""
        value = self.config.get(key)
        if value is None:
            raise self.unknown(f"a value of config.{key}")
        return value

    def unknown(self, what: str) -> DeepCacheError:
        return DeepCacheError(f"no example of {what} can be made up for {self.name}: pass example_inputs=")

    @property
    def num_frames(self) -> int:
        return int(self.frames or self.config.get("num_frames") or 16)

    def blocks(self, word: str) -> bool:
        """True where the kind of block that the UNet is built of has this in its name."""
        return any(word in str(block) for block in self.config.get("down_block_types") or ())


def _sample(request: _Request) -> torch.Tensor:
    if request.blocks("1D"):
        raise request.unknown("a sequence")
    height, width = request.height, request.width
    if height is None or width is None:
        size = request.config.get("sample_size")
        if size is None:
            raise DeepCacheError(
                f"the configuration of {request.name} has no sample_size: pass height= and width= in latent pixels, or "
                "example_inputs="
            )
        usual_height, usual_width = (size, size) if isinstance(size, int) else size
        height, width = height or usual_height, width or usual_width
    channels = request.get("in_channels")
    if request.blocks("SpatioTemporal"):
        return request.noise(request.batch, request.num_frames, channels, height, width)
    if request.blocks("3D") or request.blocks("Motion"):
        return request.noise(request.batch, channels, request.num_frames, height, width)
    return request.noise(request.batch, channels, height, width)


def _timestep(request: _Request) -> torch.Tensor:
    return torch.tensor(500, device=request.device)


def _encoder_hidden_states(request: _Request) -> torch.Tensor | None:
    """What cross-attention attends to, before any projection; None where that is made of image embeddings alone."""
    kind = request.config.get("encoder_hid_dim_type")
    if kind == "image_proj":
        return None
    if kind not in (None, "text_proj", "text_image_proj"):
        raise request.unknown(f"conditioning of the kind {kind}")
    width = request.config.get("encoder_hid_dim") or request.get("cross_attention_dim")
    if not isinstance(width, int):  # one for each block: of the same sequence, so the same
        width = width[0]
    tokens = request.tokens or (1 if request.blocks("SpatioTemporal") else 77)
    repeats = request.num_frames if request.blocks("Motion") else 1  # which wants the text once for each frame
    return request.noise(request.batch * repeats, tokens, width)


def _class_labels(request: _Request) -> torch.Tensor | None:
    kind = request.config.get("class_embed_type")
    if kind is None and request.config.get("num_class_embeds") is None:
        return None
    if kind in (None, "timestep"):
        return torch.zeros(request.batch, dtype=torch.int64, device=request.device)
    if kind == "identity":
        width = request.config.get("time_embedding_dim") or 4 * request.get("block_out_channels")[0]
        return request.noise(request.batch, width)
    return request.noise(request.batch, request.get("projection_class_embeddings_input_dim"))


def _timestep_cond(request: _Request) -> torch.Tensor | None:
    width = request.config.get("time_cond_proj_dim")
    return None if width is None else request.noise(request.batch, width)


def _added_cond_kwargs(request: _Request) -> dict[str, torch.Tensor] | None:
    kind, projection = request.config.get("addition_embed_type"), request.config.get("encoder_hid_dim_type")
    if kind not in (None, "text", "text_time", "text_image", "image"):
        raise request.unknown(f"conditioning of the kind {kind}")
    added = {}
    if kind == "text_time":
        total, each = request.get("projection_class_embeddings_input_dim"), request.get("addition_time_embed_dim")
        # Six sizes and the pooled text embedding; in the SDXL refiner five, and its one encoder's own width is left.
        count = 5 if total - 5 * each == request.config.get("cross_attention_dim") else 6
        if total <= count * each:
            raise request.unknown("text_embeds and time_ids")
        added["text_embeds"] = request.noise(request.batch, total - count * each)
        added["time_ids"] = request.noise(request.batch, count)
    if kind == "text_image":
        added["text_embeds"] = request.noise(request.batch, request.get("cross_attention_dim"))
    if kind == "text_image" or projection == "text_image_proj":
        added["image_embeds"] = request.noise(request.batch, request.get("cross_attention_dim"))
    elif kind == "image" or projection == "image_proj":
        added["image_embeds"] = request.noise(request.batch, request.get("encoder_hid_dim"))
    return added or None


def _added_time_ids(request: _Request) -> torch.Tensor:
    """Frame rate, motion and noise level of a video."""
    total, each = request.get("projection_class_embeddings_input_dim"), request.get("addition_time_embed_dim")
    return request.noise(request.batch, total // each)


_MAKERS: Mapping[str, Callable[[_Request], Any]] = {
    "sample": _sample,
    "timestep": _timestep,
    "encoder_hidden_states": _encoder_hidden_states,
    "class_labels": _class_labels,
    "timestep_cond": _timestep_cond,
    "added_cond_kwargs": _added_cond_kwargs,
    "added_time_ids": _added_time_ids,
}
