"""A model named on the command line: found, and its UNet built without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deepcache_fx.cards.family import Facts
from deepcache_fx.cli import loading
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.planning.example_inputs import example_inputs
from deepcache_fx.planning.presets import PRESETS, build_unet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NamedModel:
    """A UNet without weights, inputs for one call of it, and where its configuration is from."""

    unet: torch.nn.Module
    inputs: Mapping[str, Any]
    source: str


@contextlib.contextmanager
def named_model(
    model: str, *, height: int | None, width: int | None, batch: int | None, dtype: str
) -> Iterator[NamedModel]:
    """The model, for a block that captures it: meanwhile stderr says so, and libraries say nothing.

    Args:
        model: A name of `planning.presets`, the directory of a pipeline or of its UNet, or a name on the Hub.
        height: Of the picture, in pixels (of a UNet without its autoencoder, of the UNet's input); that of the preset
            or the configuration where None.
        width: Likewise.
        batch: Samples in one UNet call; that of the preset, or 2, where None.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        DeepCacheError: in one line, what makes no sense, or cannot be found or built.
    """
    if dtype not in DTYPES:
        raise DeepCacheError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    progress = Console(stderr=True)
    with loading.quiet(), progress.status(f"reading the configuration of {model}") as status:
        preset = PRESETS.get(model)
        config, scale = (preset.config, preset.scale) if preset else read_model(model)
        unet = build_unet(config, dtype=DTYPES[dtype])
        sizes = dict(
            batch=batch, height=_latent_pixels("height", height, scale), width=_latent_pixels("width", width, scale)
        )
        given = {name: size for name, size in sizes.items() if size is not None}
        inputs = preset.inputs(unet, **given) if preset else example_inputs(unet, **given)
        status.update(f"capturing {type(unet).__name__}")
        yield NamedModel(unet, inputs, preset.source if preset else model)


def read_model(model: str) -> tuple[Mapping[str, Any], int]:
    """The UNet's configuration in a directory or a repository of the Hub, and pixels of the picture per latent pixel.

    Raises:
        DeepCacheError: there is no such place, or no UNet in it.
    """
    path = Path(model).expanduser()
    if not path.is_dir() and (path.exists() or model.count("/") != 1 or model.startswith((".", "~", "/"))):
        raise DeepCacheError(f"{model} is no preset ({', '.join(PRESETS)}), no directory and no name on the Hub")
    where = str(path) if path.is_dir() else model
    try:
        try:
            config = _read_config(where, "unet")
        except OSError:
            config = _read_config(where, None)  # a UNet alone; old pipelines have theirs here too
    except OSError as error:
        raise DeepCacheError(f"no UNet is found in {model}: {' '.join(str(error).split())}") from error
    levels: Sequence[int] = (1,)
    for autoencoder in ("vae", "vqvae", "movq"):
        with contextlib.suppress(OSError):
            found = _read_config(where, autoencoder)
            levels = found.get("block_out_channels") or found.get("encoder_block_out_channels") or levels
            break
    return config, 2 ** (len(levels) - 1)


def read_facts(model: str) -> Facts:
    """What the configurations of a preset, a directory or a repository of the Hub say of the model.

    Raises:
        DeepCacheError: there is no such place, or no UNet in it.
    """
    if model in PRESETS:
        return Facts(PRESETS[model].config)
    unet, _ = read_model(model)
    path = Path(model).expanduser()
    where = str(path.resolve()) if path.is_dir() else model
    found: dict[str, Mapping[str, Any]] = {"model_index.json": {}, "scheduler/scheduler_config.json": {}}
    for name in found:
        with contextlib.suppress(OSError):
            found[name] = _read_json(where, name)
    index, scheduler = found.values()
    return Facts(unet, scheduler, str(index.get("_class_name", "")), (where.rstrip("/").split("/")[-1],))


def _read_json(where: str, name: str) -> Mapping[str, Any]:
    """A file of a pipeline. Raises OSError where there is none."""
    from diffusers import DDIMScheduler, DiffusionPipeline  # any scheduler reads the configuration of any other

    if Path(where).is_dir() and not Path(where, name).is_file():
        raise FileNotFoundError(f"there is no {Path(where, name)}")
    folder = name.rpartition("/")[0]
    reader: Any = DDIMScheduler if folder else DiffusionPipeline
    config = reader.load_config(where, subfolder=folder or None)
    assert isinstance(config, Mapping)
    return config


def _read_config(where: str, folder: str | None) -> Mapping[str, Any]:
    """config.json of a part of a pipeline. Raises OSError where there is none."""
    from diffusers import UNet2DConditionModel  # any class reads that of any other

    file = Path(where, folder or "", "config.json")
    if Path(where).is_dir() and not file.is_file():  # diffusers would take the one in the directory above instead
        raise FileNotFoundError(f"there is no {file}")
    config = UNet2DConditionModel.load_config(where, subfolder=folder)
    assert isinstance(config, Mapping)
    return config


def _latent_pixels(name: str, pixels: int | None, scale: int) -> int | None:
    if pixels is None:
        return None
    if pixels % scale:
        raise DeepCacheError(f"{name} must be a multiple of {scale}, the size of a latent pixel; got {pixels}")
    return pixels // scale
