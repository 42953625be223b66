"""The nodes: DeepCache FX, its report, and a calibrated schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import folder_paths
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_api.latest import ComfyExtension, io, ui

from deepcache_fx import Power

from .caching import FORECASTS, KEY, Caching, Settings
from .schedules import calibrated, check

PRECISIONS: dict[str, Literal["fp32", "bf16"] | None] = {"as loaded": None, "fp32": "fp32", "bf16": "bf16"}
CATEGORY = "model_patches/unet"
DeepCacheSchedule = io.Custom("DEEPCACHE_SCHEDULE")


class DeepCacheFX(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeepCacheFX",
            display_name="DeepCache FX",
            category=CATEGORY,
            description="Computes the deep half of the U-Net in every few steps only, and reuses it in between. For "
            "models with a U-Net (SD1.x, SD2.x, SDXL, SVD). What cannot be cached runs as it is: the report says why.",
            inputs=[
                io.Model.Input("model", tooltip="A model with a U-Net. It is not changed: what comes out is a clone."),
                io.Int.Input(
                    "interval",
                    default=3,
                    min=1,
                    max=50,
                    tooltip="Every so many evaluations of the model one is full. More is faster and further from the "
                    "uncached image; 1 caches nothing.",
                ),
                io.Int.Input(
                    "branch",
                    default=0,
                    min=0,
                    max=15,
                    tooltip="The skip connection to cut at, counted from the output. 0 is the fastest; a deeper one "
                    "computes more in every step and stays closer to the uncached image.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=["uniform", "power"],
                    default="uniform",
                    tooltip="uniform: full steps equally spaced. power: as many, dense around the 15th step, as "
                    "published. A connected calibrated schedule goes before this.",
                ),
                io.Combo.Input(
                    "forecast",
                    options=list(FORECASTS),
                    default="auto",
                    tooltip="How a step takes the cached feature. repeat: as it was, as published. linear, quadratic: "
                    "extrapolated from the last two or three. auto: linear, but repeat where the sampler draws noise "
                    "(ancestral, SDE, LCM) or takes few uneven steps.",
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", "eager", "inductor", "openvino"],
                    default="auto",
                    tooltip="auto: torch.compile's Inductor on a GPU (compiles for minutes at first), on a CPU "
                    "OpenVINO where it is installed, else eager. eager: nothing to compile; for a few images, or "
                    "weights that change all the time.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="as loaded",
                    tooltip="For OpenVINO: bf16 computes a float32 model in bfloat16 where the processor has it. "
                    "Elsewhere a model is computed in the type it was loaded in.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Before this share of the denoising every step is full.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From this share of the denoising on every step is full.",
                ),
                DeepCacheSchedule.Input(
                    "calibrated",
                    optional=True,
                    tooltip="Of the node Calibrated schedule: replaces interval, branch and forecast by what it was "
                    "calibrated with.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The cached model, for a sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        interval: int,
        branch: int,
        schedule: str,
        forecast: str,
        backend: str,
        precision: str,
        start_percent: float,
        end_percent: float,
        calibrated: Any = None,
    ) -> io.NodeOutput:
        unet = model.get_model_object("diffusion_model")
        if not isinstance(unet, UNetModel):
            raise ValueError(
                f"DeepCache FX needs a U-Net with skip connections (SD1.x, SD2.x, SDXL, SVD); this model is a "
                f"{type(unet).__name__}. Take the node out: core's EasyCache serves such models"
            )
        found = calibrated.found if calibrated is not None else None
        settings = Settings(
            interval=interval,
            schedule=calibrated or (Power(interval) if schedule == "power" else None),
            branch=branch if found is None else found.branch,
            forecast=FORECASTS[forecast] if found is None else found.forecast,
            backend=backend,
            precision=PRECISIONS[precision],
            start=start_percent,
            end=end_percent,
        )
        check(settings)
        return io.NodeOutput(Caching(settings).attach(model))


class DeepCacheFXReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeepCacheFXReport",
            display_name="DeepCache FX report",
            category=CATEGORY,
            description="What the last run of a cached model did: full and shallow calls, what that is worth at most, "
            "and why calls were full or uncached.",
            inputs=[
                io.Model.Input("model", tooltip="The cached model, or one that was made of it."),
                io.AnyType.Input("after", tooltip="What the sampler puts out: the report waits for it."),
            ],
            outputs=[io.String.Output("report", tooltip="The report as text.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, after: Any) -> io.NodeOutput:
        caching = model.get_attachment(KEY)
        text = "this model does not come from a DeepCache FX node" if caching is None else caching.text
        return io.NodeOutput(text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return math.nan  # equals nothing: what it reports changes from run to run


class CalibratedSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeepCacheFXCalibratedSchedule",
            display_name="Calibrated schedule",
            category=CATEGORY,
            description="Full steps that `deepcache-fx calibrate` found for a model, from its JSON file.",
            inputs=[
                io.String.Input(
                    "file",
                    default="schedule.json",
                    tooltip="A JSON file in ComfyUI's input folder, written by `deepcache-fx calibrate`. A run of "
                    "another number of steps than it was made for is uncached.",
                ),
            ],
            outputs=[DeepCacheSchedule.Output("schedule", tooltip="For the node DeepCache FX.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(calibrated(file, Path(folder_paths.get_input_directory())))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        path = Path(folder_paths.get_input_directory()) / file
        return path.stat().st_mtime if path.is_file() else math.nan


class DeepCacheFXExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DeepCacheFX, DeepCacheFXReport, CalibratedSchedule]
