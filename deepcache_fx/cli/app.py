"""The command line: deepcache-fx compare, plan, draw and calibrate.

A wrong argument is one line on stderr and exit code 2; Ctrl-C is exit code 130 and leaves no half-written file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deepcache_fx.cli import options as option
from deepcache_fx.cli.calibrate import calibrate_command
from deepcache_fx.cli.compare import compare_command
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


@main.command()
def plan(
    model: option.Model,
    height: Annotated[int | None, typer.Option(min=1, help="Of the picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the picture, in pixels.")] = None,
    batch: option.Batch = None,
    dtype: option.CacheDtype = option.DtypeName.float16,
    json: option.Json = None,
) -> None:
    """What each skip connection would save: arithmetic, cache size, speed-up bound. Needs no weights."""
    from deepcache_fx.cli.plan import plan_command

    plan_command(model, height=height, width=width, batch=batch, dtype=dtype.value, json=json)


@main.command()
def draw(
    model: option.Model,
    out: Annotated[Path, typer.Option(help="The picture, an SVG file.")] = Path("unet.svg"),
    branch: Annotated[str, typer.Option(help="The skip connection to cut at: its number, or block,layer.")] = "0",
    height: Annotated[int | None, typer.Option(min=1, help="Of the model's pictures, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the model's pictures, in pixels.")] = None,
    batch: option.Batch = None,
    dtype: option.CacheDtype = option.DtypeName.float16,
) -> None:
    """Draw the UNet as an SVG file: what runs at every step, what is cached, what each part costs. Needs no weights."""
    from deepcache_fx.cli.draw import draw_command

    where = option.read_branch(branch)
    draw_command(model, out, branch=where, height=height, width=width, batch=batch, dtype=dtype.value)


main.command("calibrate")(calibrate_command)
