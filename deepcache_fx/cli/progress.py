"""What the commands that run a pipeline show meanwhile: that it loads, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deepcache_fx.comparing import loading


@contextmanager
def progress_bar(console: Console, *, time_stages: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that shows one bar, or nothing where the console is no terminal.

    Args:
        console: Where to show it.
        time_stages: The time shown is that of the stage, not of the whole.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=4
    ) as bars:
        task = bars.add_task("", total=None)

        def show(stage: str, done: int, total: int) -> None:
            if time_stages and stage != bars.tasks[0].description:
                bars.reset(task)
            bars.update(task, description=stage, completed=done, total=total)

        yield show


def load_pipeline(
    console: Console,
    model: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
    scheduler: str | None = None,
) -> Any:
    """The pipeline, with a scheduler of this short name if one is given; `console` says that it loads.

    From the Hub, libraries' own download bars are shown instead.

    Raises:
        LoadError: with what diffusers says, on one line.
    """
    with console.status(f"loading {model}") if loading.check_model(model) else nullcontext():
        pipe = loading.load_pipeline(model, dtype=dtype, device=device, variant=variant)
    if scheduler is not None:
        loading.use_scheduler(pipe, scheduler)
    return pipe
