"""What `deepcache-fx inspect` does: what a directory of programs holds, its sizes, and what it was made for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deepcache_fx.artefacts.manifest import Manifest
from deepcache_fx.artefacts.store import ProgramDirectory
from deepcache_fx.cli import options as option
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files import writing as files

KEY_VARIABLE = "DEEPCACHE_FX_KEY"


def inspect_command(
    directory: Annotated[Path, typer.Argument(help="As deepcache_fx.save or optimize(programs=...) wrote it.")],
    json: option.Json = None,
) -> None:
    """Check a directory of programs against its manifest, and print what is in it. Nothing in it is run.

    A signature is checked with the key in the variable DEEPCACHE_FX_KEY.
    """
    print_programs(directory, key=key_of_environment(), json=json)


def key_of_environment() -> bytes | None:
    """What signs programs and checks their signatures."""
    key = os.environ.get(KEY_VARIABLE)
    return key.encode() if key else None


def print_programs(
    directory: Path, *, key: bytes | None = None, json: Path | None = None, console: Console | None = None
) -> Manifest:
    """Print the checked manifest, and return it.

    Args:
        directory: That of the programs.
        key: Checks the signature.
        json: A file to write it all to.
        console: Where to print; stdout where left out.

    Raises:
        DeepCacheError: in one line, what is missing, damaged or not signed with this key.
    """
    if json is not None:
        files.check_writable(json)
    manifest = ProgramDirectory(directory, key=key).check()
    if not manifest.programs:
        raise DeepCacheError(f"{directory} holds no programs")
    if json is not None:
        files.write_json(json, {"signed": manifest.is_signed, "programs": [vars(item) for item in manifest.programs]})
    checked = "signature checked" if key is not None else "signed, not checked: no key" if manifest.is_signed else ""
    lines = [
        f"{directory}: {_count(len(manifest.programs), 'program')}, every file as the manifest says"
        + f"; {checked}" * bool(checked)
    ]
    for item in manifest.programs:
        size = sum(about["size"] for about in item.files.values())
        lines.append(f"\n{item.inputs}: {_count(len(item.files), 'file')}, {size / 2**20:.2f} MiB")
        lines += [f"  {name}: {_short(value)}" for name, value in item.made_for.items() if value != "none"]
        lines.append(f"  optimize: {', '.join(f'{name}={value!r}' for name, value in item.options.items())}")
    for line in lines:
        (console or Console()).print(line, markup=False, highlight=False, soft_wrap=True)
    return manifest


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _short(value: str) -> str:
    """A digest by its first letters; what is long by its beginning."""
    is_digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]} (digest)" if is_digest else value if len(value) <= 160 else value[:157] + "..."
