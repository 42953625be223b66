"""Random models in the shapes that ComfyUI takes for SD1.5: `python make_models.py FOLDER`, in a checkout of ComfyUI.

Checkpoint (a U-Net of two levels, text encoder, tiny VAE), LoRA, ControlNet, and a picture for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path.cwd()))
FOLDER = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]  # which ComfyUI reads

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.cldm.cldm  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

UNET = {
    "in_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1], "channel_mult": [1, 1], "context_dim": 768,
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
    "use_spatial_transformer": True, "legacy": False, "num_heads": 8, "num_head_channels": -1, "image_size": 32,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "dtype": torch.float32,
    "operations": comfy.ops.disable_weight_init,
}  # fmt: skip


def randomised(module: torch.nn.Module, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The state of a module whose layers have been given weights that keep the size of what passes."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.ndim < 2:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            value.normal_(std=scale / max(value[0].numel(), 1) ** 0.5)
    return {name: value.clone().contiguous() for name, value in module.state_dict().items()}


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def main() -> None:
    torch.manual_seed(0)
    for name in ("checkpoints", "loras", "controlnet"):
        (FOLDER / "models" / name).mkdir(parents=True, exist_ok=True)
    unet = UNetModel(**{**UNET, "out_channels": 4})
    state = randomised(unet)
    lora = {}
    for name, value in state.items():
        if name.endswith("attn2.to_k.weight") or name.endswith("in_layers.2.weight"):
            base = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            rank = (4, *value.shape[1:])
            lora[f"{base}.lora_down.weight"] = torch.randn(rank) * value[0].numel() ** -0.5
            lora[f"{base}.lora_up.weight"] = torch.randn(value.shape[0], 4, *(1,) * (value.ndim - 2)) * 0.5
    save_file(lora, FOLDER / "models" / "loras" / "random.safetensors")
    control = comfy.cldm.cldm.ControlNet(**UNET, hint_channels=3)
    save_file(prefixed("", randomised(control)), FOLDER / "models" / "controlnet" / "random.safetensors")
    text = comfy.sd1_clip.SDClipModel(dtype=torch.float32)
    vae = comfy.taesd.taesd.TAESD()
    save_file(
        prefixed("model.diffusion_model.", state)
        | prefixed("cond_stage_model.transformer.", randomised(text.transformer))
        | prefixed("first_stage_model.", randomised(vae, 1.4)),
        FOLDER / "models" / "checkpoints" / "random.safetensors",
    )


main()
