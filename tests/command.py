"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Sequence

from typer.testing import CliRunner

from deepcache_fx.cli import app as cli


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(arguments: Sequence[str], message: str) -> None:
    """One line on stderr that says what is wrong, and exit code 2."""
    code, output, error = run(*arguments)
    assert (code, output) == (2, "")
    assert error.startswith("deepcache-fx: ")
    assert error.count("\n") == 1
    assert message in error
