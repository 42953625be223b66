"""The `draw` command: a picture of a model named on the command line, without loading its weights."""

from __future__ import annotations

from pathlib import Path

from deepcache_fx.cli.model import named_model
from deepcache_fx.drawing.draw import check_path, draw
from deepcache_fx.schedules.branch import Branch


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
        model: A name of `planning.presets`, the directory of a pipeline or of its UNet, or a name on the Hub.
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
    check_path(out)
    with named_model(model, height=height, width=width, batch=batch, dtype=dtype) as found:
        draw(found.unet, out, branch=branch, example_inputs=found.inputs)
