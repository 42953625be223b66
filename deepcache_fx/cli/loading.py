"""Load a diffusers pipeline by name for the command line; every mistake is one clear `DeepCacheError`."""

from __future__ import annotations

import json
import logging
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deepcache_fx.errors import DeepCacheError

PROMPTS_FILE = "prompts.json"
"""Optional in a model's directory: a JSON list of prompts that suit the model."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""Short names of diffusers' scheduler classes."""

IMPORTED_UNUSED = ("torchao", "torch.utils._pytree")
"""Loggers of what diffusers imports where it is installed: torchao warns of kernels that it cannot load, and torch of
how torchao registers its classes."""


class LoadError(DeepCacheError):
    """A model, or a setting to load it with, is missing or unusable."""


def check_scheduler(name: str) -> None:
    """Raise a LoadError where no scheduler has this short name."""
    if name not in SCHEDULERS:
        raise LoadError(f"scheduler {name!r} is unknown: use one of {', '.join(SCHEDULERS)}")


def use_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another scheduler, with the configuration (noise levels, prediction type) of its own.

    Raises:
        LoadError: the name is unknown, or a package that this scheduler needs is missing.
    """
    import diffusers

    check_scheduler(name)
    config = pipe.scheduler.config
    # Latent models are sampled without PNDM's four-call Runge-Kutta steps; other schedulers' configurations do not say.
    extra = {"skip_prk_steps": True} if name == "pndm" and "skip_prk_steps" not in config else {}
    try:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config, **extra)
    except ImportError as error:  # lms needs scipy
        raise LoadError(f"scheduler {name!r} cannot be used: {textwrap.shorten(str(error), 240)}") from error


def pick_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU.

    Raises:
        LoadError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LoadError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named floating-point type, or float16 on CUDA and float32 elsewhere."""
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_model(model: str) -> bool:
    """True for a directory with a pipeline in it, False for what may be a name on the Hub.

    Raises:
        LoadError: it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise LoadError(f"{model} holds no pipeline: there is no model_index.json in it")
        return True
    if path.exists():
        raise LoadError(f"{model} is a file: a pipeline is a directory, as save_pretrained() writes it")
    if model.count("/") > 1 or model.startswith((".", "~", os.sep)) or not model.strip():
        raise LoadError(f"there is no directory {model!r}")
    return False


def read_prompts(model: str) -> tuple[str, ...]:
    """The prompts that a model's directory suggests; empty where it suggests none.

    Raises:
        LoadError: the file is not a JSON list of strings.
    """
    path = Path(model).expanduser() / PROMPTS_FILE
    if not path.is_file():
        return ()
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise LoadError(f"{path} must hold a JSON list of prompts")
    return tuple(prompts)


def load_pipeline(model: str, *, dtype: torch.dtype, device: torch.device, variant: str | None = None) -> Any:
    """A diffusers pipeline, on its device, with its own progress bars off.

    Raises:
        LoadError: with what diffusers says, on one line.
    """
    import diffusers

    local = check_model(model)
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    # The name torch_dtype is deprecated where dtype is known, which it has been since 0.42.
    arguments: dict[str, Any] = {"dtype" if release >= (0, 42) else "torch_dtype": dtype}
    if variant is not None:
        arguments["variant"] = variant
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(Path(model).expanduser()) if local else model, **arguments
        )
    except (OSError, ValueError, SafetensorError) as error:
        where = "" if local else " (there is no such directory either)"
        raise LoadError(f"cannot load {model!r}{where}: {textwrap.shorten(str(error), 240)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def quiet(*, keep_download_bars: bool = False) -> Iterator[None]:
    """Silence diffusers, transformers, what they import, and warnings, for the length of a with block."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, IMPORTED_UNUSED):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        for library in ("transformers", "diffusers"):  # in this order: what diffusers imports speaks too
            messages = import_module(f"{library}.utils.logging")
            stack.callback(messages.set_verbosity, messages.get_verbosity())
            messages.set_verbosity_error()
            if messages.is_progress_bar_enabled() and not keep_download_bars:
                stack.callback(messages.enable_progress_bar)
                messages.disable_progress_bar()
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextmanager
def one_line_errors(out_of_memory: str) -> Iterator[None]:
    """Raise what a pipeline refuses, or has no memory for, as a DeepCacheError; the argument says what to try then."""
    try:
        yield
    except DeepCacheError:
        raise
    except ValueError as error:  # the pipeline's own checks: a height that is no multiple of 8, too many steps
        raise DeepCacheError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise DeepCacheError(f"out of memory: try {out_of_memory}") from error
