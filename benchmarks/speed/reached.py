"""The targets beside what a file of results reached: `python -m benchmarks.speed.reached results.json ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.speed.report import grouped
from benchmarks.speed.store import read_results
from benchmarks.speed.targets import targets_table


def main(
    results: Annotated[list[Path], typer.Argument(help="Of benchmarks.speed; those that are missing are named.")],
) -> None:
    """Print the table of targets."""
    rows = []
    for path in results:
        if path.exists():
            rows += read_results(path)
        else:
            typer.echo(f"not there: {path.name}")
    typer.echo(targets_table(list(grouped(rows).values())))


if __name__ == "__main__":
    typer.run(main)
