"""The samplers whose images are compared: how a pipeline gets one, and where the noise that some draw comes from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepcache_fx.comparing.loading import LoadError, use_scheduler


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers and how it is set up."""

    title: str
    """As papers and user interfaces call it."""
    draws: bool = False
    """True where it draws new noise at (nearly) every step."""
    consistency: bool = False
    """True where it is made for models that go to the image in a few steps."""
    scheduler: str = ""
    """The class in diffusers, where `deepcache_fx.loading` has no short name for it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Beside the configuration of the pipeline's own scheduler."""


SAMPLERS = {
    "ddim": Sampler("DDIM"),
    "pndm": Sampler("PLMS"),
    "dpm++": Sampler("DPM++ 2M"),
    "dpm++-karras": Sampler(
        "DPM++ 2M Karras", scheduler="DPMSolverMultistepScheduler", settings={"use_karras_sigmas": True}
    ),
    "euler": Sampler("Euler"),
    "unipc": Sampler("UniPC"),
    "euler-a": Sampler("Euler ancestral", draws=True),
    "ddpm": Sampler("DDPM", draws=True),
    "dpm++-sde": Sampler("DPM++ SDE", draws=True, scheduler="DPMSolverSDEScheduler"),
    "dpm++-2m-sde": Sampler(
        "DPM++ 2M SDE",
        draws=True,
        scheduler="DPMSolverMultistepScheduler",
        settings={"algorithm_type": "sde-dpmsolver++"},
    ),
    "lcm": Sampler("LCM", draws=True, consistency=True),
    "tcd": Sampler("TCD", draws=True, consistency=True),
}
"""By short names: those of `deepcache_fx.loading` where it has one."""


def use_sampler(pipe: Any, name: str) -> None:
    """Give a pipeline this sampler, with the noise levels and the prediction type of its own scheduler.

    Raises:
        LoadError: the name is unknown, or a package that the scheduler needs is missing.
    """
    import diffusers

    sampler = SAMPLERS.get(name)
    if sampler is None or not sampler.scheduler:
        use_scheduler(pipe, name)
        return
    try:
        pipe.scheduler = getattr(diffusers, sampler.scheduler).from_config(pipe.scheduler.config, **sampler.settings)
    except ImportError as error:  # DPM++ SDE needs torchsde
        raise LoadError(f"sampler {name!r} cannot be used: {' '.join(str(error).split())[:240]}") from error


def seed_noise(scheduler: Any, seeds: Sequence[int]) -> None:
    """Let a scheduler that keeps a source of noise of its own draw that of image i from seed i.

    DPM++ SDE takes its noise from Brownian trees, one an image, and its `step` takes no generator. The others are given
    the generators of the images by the pipeline.
    """
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = list(seeds)


def takes_generator(scheduler: Any) -> bool:
    """True where `step` can be told whose noise to draw."""
    return "generator" in inspect.signature(scheduler.step).parameters


def title(name: str) -> str:
    """Of a sampler by its short name; the name itself for one that is not known."""
    return SAMPLERS[name].title if name in SAMPLERS else name
