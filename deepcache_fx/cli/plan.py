"""What `deepcache-fx plan` does: what caching can save for a model named there, without loading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from deepcache_fx.cli import options as option
from deepcache_fx.cli.model import named_model
from deepcache_fx.files import writing as files
from deepcache_fx.planning.plan import Plan, plan


def plan_command(
    model: option.Model,
    height: Annotated[int | None, typer.Option(min=1, help="Of the picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the picture, in pixels.")] = None,
    batch: option.Batch = None,
    dtype: option.CacheDtype = option.DtypeName.float16,
    json: option.Json = None,
) -> None:
    """What each skip connection would save: arithmetic, cache size, speed-up bound. Needs no weights."""
    print_plan(model, height=height, width=width, batch=batch, dtype=dtype.value, json=json)


def print_plan(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    dtype: str = "float16",
    intervals: Sequence[int] = (2, 3, 5, 10),
    json: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """Print a table of the model's skip connections, and return it; progress goes to stderr.

    Args:
        model: A name of `planning.presets`, the directory of a pipeline or of its UNet, or a name on the Hub.
        height: Of the picture, in pixels (of a UNet without its autoencoder, of the UNet's input); that of the preset
            or the configuration where left out.
        width: Likewise.
        batch: Samples in one UNet call; that of the preset, or 2, where left out.
        dtype: "float32", "float16" or "bfloat16": decides the size of the cache.
        intervals: Those to give the bound for.
        json: A file to write every number to.
        console: Where to print the table; stdout where left out.

    Raises:
        DeepCacheError: in one line, what cannot be found, built, captured or written.
    """
    if json is not None:
        files.check_writable(json)
    with named_model(model, height=height, width=width, batch=batch, dtype=dtype) as found:
        result = plan(found.unet, example_inputs=found.inputs, intervals=intervals)
    if json is not None:
        files.write_json(json, {"name": model, **result.to_dict()})
    _print(result, found.source, console or Console())
    return result


def _print(result: Plan, source: str, console: Console) -> None:
    heads, rows = result.table()
    table = Table(title=source, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    for part in (result.title, table, result.note):
        console.print(part, markup=False, highlight=False)
