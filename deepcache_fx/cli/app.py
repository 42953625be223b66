"""The command line: deepcache-fx compare, plan, suggest, draw, calibrate, compile, inspect and web.

A wrong argument is one line on stderr and exit code 2; Ctrl-C is exit code 130 and leaves no half-written file.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from deepcache_fx.cli.calibrate import calibrate_command
from deepcache_fx.cli.compare import compare_command
from deepcache_fx.cli.compile import compile_command
from deepcache_fx.cli.draw import draw_command
from deepcache_fx.cli.inspect import inspect_command
from deepcache_fx.cli.plan import plan_command
from deepcache_fx.cli.suggest import suggest_command
from deepcache_fx.cli.web import web_command
from deepcache_fx.errors import DeepCacheError


class _OneLineErrors(TyperGroup):
    """A command group whose errors are one line each, for scripts and for people alike."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):  # which of these, or a returned 130, depends on typer's version
            code = 130
        except DeepCacheError as error:
            _complain(str(error))
            code = 2
        except Exception as error:
            if not hasattr(error, "format_message"):  # neither typer's nor click's: not a matter of arguments
                raise
            _complain(f"{error.format_message()} (--help tells more)")
            code = getattr(error, "exit_code", 2)
        if code == 130:
            _complain("interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    typer.echo("deepcache-fx: " + " ".join(message.split()), err=True)


main = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeepCache for diffusion UNets, as two static graphs.",
    epilog="A wrong argument is one line on stderr and exit code 2; Ctrl-C is exit code 130.",
)


main.command("compare")(compare_command)
main.command("plan")(plan_command)
main.command("suggest")(suggest_command)
main.command("draw")(draw_command)
main.command("calibrate")(calibrate_command)
main.command("web")(web_command)
main.command("compile")(compile_command)
main.command("inspect")(inspect_command)
