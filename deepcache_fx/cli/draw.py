"""What `deepcache-fx draw` does: a picture of a model named on the command line, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepcache_fx.cli import options as option
from deepcache_fx.cli.model import named_model
from deepcache_fx.drawing.draw import check_path, draw


def draw_command(
    model: option.Model,
    out: Annotated[Path, typer.Option(help="The picture, an SVG file.")] = Path("unet.svg"),
    branch: Annotated[str, typer.Option(help="The skip connection to cut at: its number, or block,layer.")] = "0",
    height: Annotated[int | None, typer.Option(min=1, help="Of the model's pictures, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the model's pictures, in pixels.")] = None,
    batch: option.Batch = None,
    dtype: option.CacheDtype = option.DtypeName.float16,
) -> None:
    """Draw the UNet as an SVG file: what runs at every step, what is cached, what each part costs. Needs no weights."""
    chosen = option.read_branch(branch)
    check_path(out)
    with named_model(model, height=height, width=width, batch=batch, dtype=dtype.value) as found:
        draw(found.unet, out, branch=chosen, example_inputs=found.inputs)
