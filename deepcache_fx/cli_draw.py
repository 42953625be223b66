"""The `draw` command: a picture of a model named on the command line, without loading its weights."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from deepcache_fx import loading
from deepcache_fx.branch import Branch
from deepcache_fx.cli_plan import DTYPES, latent_pixels, read_model
from deepcache_fx.draw import check_path, draw
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.example_inputs import example_inputs
from deepcache_fx.presets import PRESETS, build_unet


def draw_command(
    model: str,
    out: Path,
    *,
    branch: Branch = 0,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    dtype: str = "float16",
) -> None:
    """Write the picture of a model's UNet, cut at a branch; progress goes to stderr.

    Args:
        model: A name of `deepcache_fx.presets`, the directory of a pipeline or of its UNet, or a name on the Hub.
        out: The file to write; its name ends in .svg.
        branch: The skip connection to cut at.
        height: Of the picture that the model makes, in pixels (of a UNet without its autoencoder, of the UNet's
            input); that of the preset or the configuration where left out.
        width: Likewise.
        batch: Samples in one UNet call; that of the preset, or 2, where left out.
        dtype: "float32", "float16" or "bfloat16": decides the sizes of the cache and the skips.

    Raises:
        DeepCacheError: in one line, what cannot be found, built, captured or written.

    Example:
        >>> draw_command("sd15", Path("unet.svg"), branch=1)
    """
    if dtype not in DTYPES:
        raise DeepCacheError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_path(out)
    progress = Console(stderr=True)
    with loading.quiet(), progress.status(f"reading the configuration of {model}") as status:
        preset = PRESETS.get(model)
        config, scale = (preset.config, preset.scale) if preset else read_model(model)
        unet = build_unet(config, dtype=DTYPES[dtype])
        sizes = dict(
            batch=batch, height=latent_pixels("height", height, scale), width=latent_pixels("width", width, scale)
        )
        given = {name: size for name, size in sizes.items() if size is not None}
        inputs = preset.inputs(unet, **given) if preset else example_inputs(unet, **given)
        status.update(f"capturing {type(unet).__name__}")
        draw(unet, out, branch=branch, example_inputs=inputs)
