"""Real pipeline classes of diffusers with networks so small that a generation takes a fraction of a second.

Each builder returns a `Case`: the pipeline, three calls of it in turn, and what is known of each beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests import models, small
from tests.models import TEXT

SIZE = 16


@dataclass(frozen=True)
class Run:
    """One call of the pipeline, and how many UNet calls it must make."""

    arguments: dict[str, Any]
    calls: int
    forced: frozenset[int] = frozenset()
    """UNet calls that must be full though the interval says shallow: the inputs change shape there."""
    per_step: int = 1
    """UNet calls in each step."""
    before: Callable[[Any], object] = lambda pipe: None
    """What the user does to the pipeline before the call."""


@dataclass(frozen=True)
class Case:
    pipe: Any
    runs: tuple[Run, ...]
    captures: int = 1
    """Captures that the runs must need."""
    common: dict[str, Any] = field(default_factory=dict)
    output: str = "images"

    def __call__(self, run: Run) -> torch.Tensor:
        run.before(self.pipe)
        arguments = {**self.common, **run.arguments, "generator": torch.Generator().manual_seed(0)}
        result = getattr(self.pipe(**arguments), self.output)
        return result if isinstance(result, torch.Tensor) else torch.as_tensor(result)


PROMPT = {"prompt": "a cat", "guidance_scale": 5.0, "output_type": "latent"}


def picture(seed: int = 5, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    result = torch.zeros(1, 1, SIZE, SIZE)
    result[..., : SIZE // 2] = 1
    return result


def steps(count: int, **arguments: Any) -> dict[str, Any]:
    return {"num_inference_steps": count, **arguments}


def unet(**changes: Any) -> torch.nn.Module:
    return models.sd_unet(**{**small.LEVELS, **changes})


def attentive(**changes: Any) -> torch.nn.Module:
    """With attention in the middle and on the way up too."""
    return unet(mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **changes)


def like_sd(cls: Any, network: torch.nn.Module | None = None, without: tuple[str, ...] = (), **more: Any) -> Any:
    """A pipeline of this class out of the parts of Stable Diffusion."""
    parts = models.sd_pipeline(network or unet()).components
    parts = {name: part for name, part in parts.items() if name not in without}
    return quiet(cls(**{**parts, **more}))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


NO_CHECKER = {"requires_safety_checker": False}


def vision() -> CLIPVisionModelWithProjection:
    torch.manual_seed(4)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=TEXT,
            intermediate_size=TEXT,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
            projection_dim=TEXT,
        )
    ).eval()


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


# Stable Diffusion.


def text_to_image() -> Case:
    runs = (
        Run(steps(7), 7),
        Run(steps(4, guidance_scale=1.0), 4),  # batch 1
        Run(steps(5, prompt=["a dog", "a cow"]), 5),
    )
    return Case(small.pipeline(), runs, captures=3, common={**PROMPT, **small.SIZE})


def text_to_image_xl() -> Case:
    runs = (
        Run(steps(6), 6),
        Run(steps(4, original_size=(64, 32), crops_coords_top_left=(3, 4)), 4),
        Run(steps(5, negative_prompt="a dog", guidance_rescale=0.7), 5),
    )
    return Case(small.base(), runs, common={**PROMPT, **small.SIZE})


def image_to_image() -> Case:
    pipe = like_sd(diffusers.StableDiffusionImg2ImgPipeline, **NO_CHECKER)
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (0.4, 1.0, 0.7))
    return Case(pipe, runs, common={**PROMPT, "image": picture()})


def image_to_image_xl() -> Case:
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (0.5, 0.9, 0.4))
    return Case(small.refiner(), runs, common={**PROMPT, "image": picture()})


def inpaint() -> Case:
    pipe = like_sd(diffusers.StableDiffusionInpaintPipeline, unet(in_channels=9), **NO_CHECKER)
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (1.0, 0.4, 0.8))
    common = {**PROMPT, **small.SIZE, "image": picture(), "mask_image": mask()}
    return Case(pipe, runs, common=common)


def inpaint_xl() -> Case:
    parts = small.base().components
    pipe = quiet(diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False))
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (0.9, 0.4, 0.8))
    common = {**PROMPT, **small.SIZE, "image": picture(), "mask_image": mask()}
    return Case(pipe, runs, common=common)


def upscale() -> Case:
    pipe = like_sd(
        diffusers.StableDiffusionUpscalePipeline,
        unet(in_channels=7, num_class_embeds=100),
        without=("safety_checker", "image_encoder"),
        low_res_scheduler=diffusers.DDPMScheduler(),
        max_noise_level=90,
    )
    runs = (Run(steps(5), 5), Run(steps(4, noise_level=50), 4), Run(steps(6, noise_level=3), 6))
    return Case(pipe, runs, common={**PROMPT, "image": picture()})


def instruct_pix2pix() -> Case:
    pipe = like_sd(diffusers.StableDiffusionInstructPix2PixPipeline, unet(in_channels=8), **NO_CHECKER)
    runs = (
        Run(steps(7), 7),  # batch of three: text and image, image, neither
        Run(steps(5, image_guidance_scale=2.5), 5),
        Run(steps(4, guidance_scale=1.0), 4),  # batch of one
    )
    return Case(pipe, runs, captures=2, common={**PROMPT, "image": picture()})


def instruct_pix2pix_xl() -> Case:
    network = models.sdxl_unet(
        **small.LEVELS, transformer_layers_per_block=1, cross_attention_dim=2 * TEXT, in_channels=8
    )
    parts = models.sdxl_pipeline(network).components
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = quiet(diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False))
    runs = (Run(steps(7), 7), Run(steps(5, image_guidance_scale=2.5), 5), Run(steps(4), 4))
    return Case(pipe, runs, common={**PROMPT, **small.SIZE, "image": picture()})


def depth() -> Case:
    pipe = like_sd(
        diffusers.StableDiffusionDepth2ImgPipeline,
        unet(in_channels=5),
        without=("safety_checker", "image_encoder"),
        depth_estimator=None,
    )
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (0.4, 0.9, 0.6))
    return Case(pipe, runs, common={**PROMPT, "image": picture(), "depth_map": picture(6, 1)[:, 0]})


def image_variation() -> Case:
    parts = models.sd_pipeline(unet()).components
    pipe = quiet(
        diffusers.StableDiffusionImageVariationPipeline(
            vae=parts["vae"],
            image_encoder=vision(),
            unet=parts["unet"],
            scheduler=parts["scheduler"],
            safety_checker=None,
            feature_extractor=image_processor(),
            requires_safety_checker=False,
        )
    )
    runs = (Run(steps(7), 7), Run(steps(5, image=picture(8)), 5), Run(steps(4, guidance_scale=2.0), 4))
    common = {"guidance_scale": 5.0, "output_type": "latent", **small.SIZE, "image": picture()}
    return Case(pipe, runs, common=common)


# Conditioned by other networks.


def controlnet(seed: int = 3) -> diffusers.ControlNetModel:
    network = unet()  # which sets a seed of its own
    torch.manual_seed(seed)
    return _alive(diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8,)))


def _alive(network: torch.nn.Module) -> Any:
    """A ControlNet's last convolutions are zero before it is trained: its residuals would change nothing."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network.eval()


def one_controlnet() -> Case:
    """Scale and window are changed from call to call, as a user moves a slider."""
    pipe = like_sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet(), **NO_CHECKER)
    runs = (
        Run(steps(7, controlnet_conditioning_scale=0.5), 7),
        Run(steps(7, controlnet_conditioning_scale=1.5), 7),
        Run(steps(8, control_guidance_start=0.2, control_guidance_end=0.6), 8),
    )
    return Case(pipe, runs, common={**PROMPT, "image": picture()})


def several_controlnets() -> Case:
    pipe = like_sd(diffusers.StableDiffusionControlNetPipeline, controlnet=[controlnet(3), controlnet(4)], **NO_CHECKER)
    runs = (
        Run(steps(6, controlnet_conditioning_scale=[0.5, 1.0]), 6),
        Run(steps(6, controlnet_conditioning_scale=[1.0, 0.0]), 6),
        Run(steps(6, control_guidance_start=[0.0, 0.5], control_guidance_end=[0.5, 1.0]), 6),
    )
    return Case(pipe, runs, common={**PROMPT, "image": [picture(), picture(6)]})


def guessing_controlnet() -> Case:
    pipe = like_sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet(), **NO_CHECKER)
    runs = (Run(steps(6, guess_mode=True), 6), Run(steps(5), 5), Run(steps(7, guess_mode=True), 7))
    return Case(pipe, runs, common={**PROMPT, "image": picture()})


def controlnet_image_to_image() -> Case:
    pipe = like_sd(diffusers.StableDiffusionControlNetImg2ImgPipeline, controlnet=controlnet(), **NO_CHECKER)
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (0.7, 1.0, 0.4))
    return Case(pipe, runs, common={**PROMPT, "image": picture(), "control_image": picture(6)})


def controlnet_inpaint() -> Case:
    pipe = like_sd(
        diffusers.StableDiffusionControlNetInpaintPipeline, unet(in_channels=9), controlnet=controlnet(), **NO_CHECKER
    )
    runs = tuple(Run(steps(10, strength=strength), int(10 * strength)) for strength in (0.7, 1.0, 0.4))
    common = {**PROMPT, **small.SIZE, "image": picture(), "mask_image": mask(), "control_image": picture(6)}
    return Case(pipe, runs, common=common)


def controlnet_xl() -> Case:
    pipe = small.base()
    torch.manual_seed(3)
    network = _alive(diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,)))
    pipe = quiet(
        diffusers.StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=network, add_watermarker=False)
    )
    runs = (
        Run(steps(7, controlnet_conditioning_scale=0.5), 7),
        Run(steps(7, controlnet_conditioning_scale=1.5), 7),
        Run(steps(8, control_guidance_start=0.2, control_guidance_end=0.6), 8),
    )
    return Case(pipe, runs, common={**PROMPT, "image": picture()})


def t2i_adapter() -> Case:
    torch.manual_seed(3)
    adapter = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=1, adapter_type="full_adapter")
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    pipe = like_sd(
        diffusers.StableDiffusionAdapterPipeline,
        unet(**blocks),
        without=("image_encoder",),
        adapter=adapter.eval(),
        **NO_CHECKER,
    )
    runs = (
        Run(steps(7, adapter_conditioning_scale=0.5), 7),
        Run(steps(7, adapter_conditioning_scale=1.5), 7),
        Run(steps(8, image=picture(6)), 8),
    )
    return Case(pipe, runs, common={**PROMPT, "image": picture(), **small.SIZE})


def ip_adapter() -> Case:
    """The scale is no input but a number in the attention processors: a new one is a new graph."""
    pipe = small.pipeline()
    pipe.unet = attentive()
    add_ip_adapter(pipe.unet)
    embeds = torch.randn(2, 1, TEXT, generator=torch.Generator().manual_seed(7))
    runs = tuple(
        Run(steps(5), 5, before=lambda pipe, scale=scale: pipe.set_ip_adapter_scale(scale)) for scale in (0.3, 1.0, 0.3)
    )
    common = {**PROMPT, **small.SIZE, "ip_adapter_image_embeds": [embeds]}
    return Case(pipe, runs, captures=2, common=common)


def add_ip_adapter(network: Any) -> None:
    """As `load_ip_adapter` does, with random weights."""
    torch.manual_seed(6)
    weights: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for number, name in enumerate(network.attn_processors):
        if "attn2" not in name:
            continue
        module = network.get_submodule(name.removesuffix(".processor"))
        width = module.to_q.out_features
        for key in ("k", "v"):
            weights["ip_adapter"][f"{number}.to_{key}_ip.weight"] = torch.randn(width, TEXT)
    weights["image_proj"] = {
        "proj.weight": torch.randn(4 * TEXT, TEXT),
        "proj.bias": torch.zeros(4 * TEXT),
        "norm.weight": torch.ones(TEXT),
        "norm.bias": torch.zeros(TEXT),
    }
    network._load_ip_adapter_weights([weights])
    network.eval()


# Other ways to guide and to sample.


def latent_consistency() -> Case:
    pipe = like_sd(
        diffusers.LatentConsistencyModelPipeline,
        unet(time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler.from_config(models.scheduler().config),
        **NO_CHECKER,
    )
    runs = (Run(steps(4), 4), Run(steps(5, guidance_scale=8.0), 5), Run(steps(1), 1))
    return Case(pipe, runs, common={**PROMPT, **small.SIZE})


def perturbed_attention() -> Case:
    """Its processors are put in for the length of a call: two captures, with and without."""
    pipe = like_sd(diffusers.StableDiffusionPAGPipeline, attentive(), pag_applied_layers="mid", **NO_CHECKER)
    runs = (
        Run(steps(6, pag_scale=3.0), 6),  # batch of three
        Run(steps(5, pag_scale=0.0), 5),
        Run(steps(7, pag_scale=1.0), 7),
    )
    return Case(pipe, runs, captures=2, common={**PROMPT, **small.SIZE})


def perturbed_attention_xl() -> Case:
    network = models.sdxl_unet(
        **{**small.LEVELS, "mid_block_type": "UNetMidBlock2DCrossAttn"},
        transformer_layers_per_block=1,
        cross_attention_dim=2 * TEXT,
    )
    parts = models.sdxl_pipeline(network).components
    pipe = quiet(diffusers.StableDiffusionXLPAGPipeline(**parts, pag_applied_layers="mid", add_watermarker=False))
    runs = (Run(steps(6, pag_scale=3.0), 6), Run(steps(5, pag_scale=0.0), 5), Run(steps(7, pag_scale=1.0), 7))
    return Case(pipe, runs, captures=2, common={**PROMPT, **small.SIZE})


def semantic_guidance() -> Case:
    """A batch of text, no text, and one for each concept to add or to take away."""
    pipe = like_sd(diffusers.SemanticStableDiffusionPipeline, without=("image_encoder",), **NO_CHECKER)
    concept = {"editing_prompt": ["a dog"], "edit_warmup_steps": 1, "edit_guidance_scale": 6.0}
    runs = (  # a batch of three, the last of two
        Run(steps(6, **concept), 6),
        Run(steps(5, **concept, reverse_editing_direction=True), 5),
        Run(steps(4), 4),
    )
    return Case(pipe, runs, captures=2, common={**PROMPT, **small.SIZE})


def safe_guidance() -> Case:
    pipe = like_sd(diffusers.StableDiffusionPipelineSafe, **NO_CHECKER)
    weak, strong = ({"sld_guidance_scale": scale, "sld_warmup_steps": 1, "sld_threshold": 1.0} for scale in (200, 5000))
    runs = (Run(steps(6, **weak), 6), Run(steps(5, **strong), 5), Run(steps(4, sld_guidance_scale=0.0), 4))
    return Case(pipe, runs, captures=2, common={**PROMPT, **small.SIZE})


def panorama() -> Case:
    """A UNet call, and a step of the scheduler, for every view of every step."""
    pipe = like_sd(diffusers.StableDiffusionPanoramaPipeline, without=("image_encoder",), **NO_CHECKER)
    pipe.vae_scale_factor = 8
    runs = (
        Run(steps(5, width=576), 10, per_step=2),
        Run(steps(4, width=640), 12, per_step=3),
        Run(steps(4, width=576, guidance_scale=2.0), 8, per_step=2),
    )
    return Case(pipe, runs, common={**PROMPT, "height": 512})


# Video.


def animate_diff() -> Case:
    torch.manual_seed(3)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    network = models.sd_unet(
        **{
            **small.LEVELS,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
    )
    parts = models.sd_pipeline(network).components
    pipe = quiet(
        diffusers.AnimateDiffPipeline(
            **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
            motion_adapter=adapter.eval(),
        )
    )
    pipe.unet.eval()
    runs = (Run(steps(5), 5), Run(steps(4, num_frames=3), 4), Run(steps(6), 6))
    common = {**PROMPT, **small.SIZE, "num_frames": 2}
    return Case(pipe, runs, captures=2, common=common, output="frames")


def stable_video() -> Case:
    torch.manual_seed(3)
    network = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE,
        block_out_channels=(32, 32),
        layers_per_block=1,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=2,
        cross_attention_dim=TEXT,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ).eval()
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=4
    ).eval()
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    pipe = quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=vision(),
            unet=network,
            scheduler=scheduler,
            feature_extractor=image_processor(),
        )
    )
    runs = (Run(steps(5), 5), Run(steps(4, motion_bucket_id=20), 4), Run(steps(4, noise_aug_strength=0.1), 4))
    common = {"image": picture(), "num_frames": 2, "output_type": "latent", **small.SIZE}
    return Case(pipe, runs, common=common, output="frames")


def text_to_video() -> Case:
    torch.manual_seed(3)
    network = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=2,
    ).eval()
    parts = models.sd_pipeline(unet()).components
    pipe = quiet(
        diffusers.TextToVideoSDPipeline(
            **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}, unet=network
        )
    )
    runs = (Run(steps(5), 5), Run(steps(4, prompt="a dog"), 4), Run(steps(6), 6))
    common = {**PROMPT, **small.SIZE, "num_frames": 2}
    return Case(pipe, runs, common=common, output="frames")


# Other models.


def latent_diffusion() -> Case:
    """LDM, with its own scheduler loop and a bottleneck without text in between."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(3)
    tokens = models.tokenizer()
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokens),
            max_position_embeddings=77,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=TEXT,
        )
    ).eval()
    pipe = quiet(
        diffusers.LDMTextToImagePipeline(
            vqvae=models.vae(), bert=bert, tokenizer=tokens, unet=unet(), scheduler=models.scheduler()
        )
    )
    runs = (Run(steps(6), 6), Run(steps(4, guidance_scale=1.0), 4), Run(steps(5), 5))
    common = {"prompt": "a cat", "guidance_scale": 5.0, "output_type": "np", **small.SIZE}
    return Case(pipe, runs, captures=2, common=common)


def _unconditional() -> torch.nn.Module:
    torch.manual_seed(3)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()


def ddpm() -> Case:
    pipe = quiet(diffusers.DDPMPipeline(_unconditional(), diffusers.DDPMScheduler()))
    runs = (Run(steps(7), 7), Run(steps(4, batch_size=2), 4), Run(steps(5), 5))
    return Case(pipe, runs, captures=2, common={"output_type": "np"})


def ddim() -> Case:
    pipe = quiet(diffusers.DDIMPipeline(_unconditional(), diffusers.DDIMScheduler()))
    runs = (Run(steps(7), 7), Run(steps(4, eta=1.0), 4), Run(steps(5), 5))
    return Case(pipe, runs, common={"output_type": "np"})


def pseudo_numerical() -> Case:
    """PNDM: the first steps take four calls each, the others one."""
    pipe = quiet(diffusers.PNDMPipeline(_unconditional(), diffusers.PNDMScheduler()))
    runs = (Run(steps(6), 15), Run(steps(5, batch_size=2), 14), Run(steps(4), 13))
    return Case(pipe, runs, captures=2, common={"output_type": "np"})


def consistency_model() -> Case:
    pipe = quiet(diffusers.ConsistencyModelPipeline(_unconditional(), diffusers.CMStochasticIterativeScheduler()))
    runs = (Run(steps(4), 4), Run(steps(1), 1), Run(steps(None, timesteps=[39, 20, 5, 0]), 4))
    return Case(pipe, runs, common={"output_type": "pt"})


def kandinsky_decoder() -> Case:
    torch.manual_seed(3)
    network = diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        layers_per_block=1,
        encoder_hid_dim=TEXT,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    ).eval()
    movq = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
    ).eval()
    pipe = quiet(
        diffusers.KandinskyV22Pipeline(
            unet=network,
            scheduler=diffusers.DDIMScheduler(
                beta_schedule="linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
            ),
            movq=movq,
        )
    )
    generator = torch.Generator().manual_seed(1)
    common = {
        "image_embeds": torch.randn(1, TEXT, generator=generator),
        "negative_image_embeds": torch.randn(1, TEXT, generator=generator),
        "guidance_scale": 4.0,
        "output_type": "latent",
        "height": 4 * SIZE,
        "width": 4 * SIZE,
    }
    runs = (Run(steps(6), 6), Run(steps(4, guidance_scale=1.0), 4), Run(steps(5), 5))
    return Case(pipe, runs, captures=2, common=common)


CASES: dict[str, Callable[[], Case]] = {
    builder.__name__: builder
    for builder in (
        text_to_image,
        text_to_image_xl,
        image_to_image,
        image_to_image_xl,
        inpaint,
        inpaint_xl,
        upscale,
        instruct_pix2pix,
        instruct_pix2pix_xl,
        depth,
        image_variation,
        one_controlnet,
        several_controlnets,
        guessing_controlnet,
        controlnet_image_to_image,
        controlnet_inpaint,
        controlnet_xl,
        t2i_adapter,
        ip_adapter,
        latent_consistency,
        perturbed_attention,
        perturbed_attention_xl,
        semantic_guidance,
        safe_guidance,
        panorama,
        animate_diff,
        stable_video,
        text_to_video,
        latent_diffusion,
        ddpm,
        ddim,
        pseudo_numerical,
        consistency_model,
        kandinsky_decoder,
    )
}

REPRESENTATIVES = (
    "text_to_image",
    "image_to_image_xl",
    "t2i_adapter",
    "ip_adapter",
    "latent_consistency",
    "panorama",
    "stable_video",
    "pseudo_numerical",
)
"""One of each kind: text, images, conditioned by other networks, other guidance, views, video, other models."""
