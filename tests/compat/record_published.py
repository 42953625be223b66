"""Record what the published pipelines make of every setting; `test_pipelines` compares with it.

Their code needs the diffusers of its time. In an environment of its own:

    pip install torch==2.13.0 diffusers==0.24.0 'huggingface_hub<0.26' transformers==4.36.2 'numpy<2' DeepCache==0.1.1
    python -m tests.compat.record_published
"""

from __future__ import annotations

import diffusers
import torch
from DeepCache.sd.pipeline_stable_diffusion import StableDiffusionPipeline
from DeepCache.sd.unet_2d_condition import UNet2DConditionModel
from DeepCache.sdxl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from DeepCache.sdxl.pipeline_stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from DeepCache.sdxl.unet_2d_condition import UNet2DConditionModel as XLUNet2DConditionModel
from DeepCache.svd.pipeline_stable_video_diffusion import StableVideoDiffusionPipeline
from DeepCache.svd.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from safetensors.torch import save_file

from tests.compat.settings import RECORDED, SETTINGS, latents, name, pipeline

CLASSES = {
    "sd": (StableDiffusionPipeline, UNet2DConditionModel),
    "sdxl": (StableDiffusionXLPipeline, XLUNet2DConditionModel),
    "sdxl-img2img": (StableDiffusionXLImg2ImgPipeline, XLUNet2DConditionModel),
    "svd": (StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel),
}

if __name__ == "__main__":
    found = {}
    for kind, settings in SETTINGS.items():
        pipe = pipeline(kind, *CLASSES[kind])
        for setting in settings:
            found[f"{kind} {name(setting)}"] = latents(kind, pipe, setting).contiguous()
            print(kind, name(setting), found[f"{kind} {name(setting)}"].norm().item())
    save_file(found, RECORDED, {"diffusers": diffusers.__version__, "torch": torch.__version__, "DeepCache": "0.1.1"})
