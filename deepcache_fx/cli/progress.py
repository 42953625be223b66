"""The progress bar of the commands that run a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


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
