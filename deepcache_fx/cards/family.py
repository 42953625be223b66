"""Tell a model's family, and whether it is distilled for few steps, from its configurations. Reads nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_FEW_STEPS = re.compile(
    r"(?<![a-z])(turbo|lcm|lightning|hyper(?:[-_ ]?sd(?:xl)?)?|tcd|dmd2?|flash)(?![a-z])", re.IGNORECASE
)


@dataclass(frozen=True)
class Facts:
    """What is known of a model."""

    unet: Mapping[str, Any]
    """Its config.json."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Its scheduler_config.json; empty where there is none."""
    pipeline: str = ""
    """Name of the pipeline's class."""
    names: tuple[str, ...] = ()
    """Of the model, its repository, its adapters."""


@dataclass(frozen=True)
class Family:
    """What a model is."""

    name: str
    """A key of `table.CARDS`."""
    reason: str
    few_steps: str | None = None
    """What says that it is distilled for few steps; None where nothing does."""


def facts_of(unet: Any, pipeline: Any = None) -> Facts:
    """Of a UNet, and of the diffusers pipeline that it is in, if there is one."""
    config = dict(getattr(unet, "config", None) or {})
    config.setdefault("_class_name", type(unet).__name__)
    scheduler = getattr(pipeline, "scheduler", None)
    scheduler_config = dict(getattr(scheduler, "config", None) or {})
    if scheduler is not None:
        scheduler_config["_class_name"] = type(scheduler).__name__  # a scheduler keeps the name of what it is made of
    own = _names(dict(getattr(pipeline, "config", None) or {}))
    adapters = getattr(unet, "peft_config", None) or {}
    return Facts(config, scheduler_config, "" if pipeline is None else type(pipeline).__name__, (*own, *adapters))


def family_of(facts: Facts) -> Family:
    """The family that the configurations show; "other" where they show none."""
    name, reason = _architecture(facts)
    return Family(name, reason, few_steps(facts))


def few_steps(facts: Facts) -> str | None:
    """What says that a model is distilled for few steps (Turbo, LCM, Lightning, Hyper); None where nothing does."""
    scheduler = str(facts.scheduler.get("_class_name", ""))
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return f"its scheduler is {scheduler}"
    if facts.unet.get("time_cond_proj_dim") is not None:
        return "its UNet is conditioned on the guidance scale (time_cond_proj_dim), as those of LCM are"
    for name in (*facts.names, *_names(facts.unet), *_names(facts.scheduler)):
        found = _FEW_STEPS.search(name)
        if found is not None:
            return f"it is called {name!r}"
    trailing = facts.scheduler.get("timestep_spacing") == "trailing"
    plain = facts.scheduler.get("prediction_type", "epsilon") == "epsilon"
    is_turbo_sized = facts.unet.get("sample_size") == 64 and _architecture(facts)[0] in ("sdxl", "sd21")
    if trailing and plain and is_turbo_sized and scheduler.startswith("Euler"):
        return f"its scheduler is {scheduler} with trailing timesteps and its pictures have 512 pixels, as Turbo's"
    return None


def _names(config: Mapping[str, Any]) -> Iterable[str]:
    name = config.get("_name_or_path")
    # Of a path only the last part names the model: a folder above may be called anything.
    return [name.replace("\\", "/").rstrip("/").split("/")[-1]] if isinstance(name, str) else []


def _architecture(facts: Facts) -> tuple[str, str]:
    unet = facts.unet
    cls = unet.get("_class_name")
    width = _first(unet.get("block_out_channels"))
    cross = _first(unet.get("cross_attention_dim"))
    if cls == "UNetSpatioTemporalConditionModel" and width == 320:
        return "svd", f"its UNet is a {cls}"
    if cls == "UNetMotionModel" and width == 320:
        return "animatediff", f"its UNet is a {cls}"
    if facts.pipeline.startswith("LDM"):
        return "ldm", f"its pipeline is {facts.pipeline}"
    if cls == "UNet2DModel" and width == 128 and unet.get("in_channels") == 3:
        return "ddpm", "its UNet has no conditioning but the timestep, and works on pixels"
    if cls == "UNet2DConditionModel":
        if unet.get("addition_embed_type") == "text_time" and width in (320, 384):
            return "sdxl", "its UNet is conditioned on sizes (addition_embed_type text_time)"
        if width == 320 and cross in (768, 1024):
            return {768: "sd15", 1024: "sd21"}[cross], f"its UNet takes text embeddings of {cross} numbers"
        if width == 192 and unet.get("in_channels") == 3 and cross == 512:
            return "ldm", "its UNet is that of LDM-4-G"
    return "other", f"its {cls or 'UNet'} is none that a card is for"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value
