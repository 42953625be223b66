"""Write files whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deepcache_fx.errors import DeepCacheError


def check_writable(path: Path) -> None:
    """Raise a DeepCacheError where a file cannot be written, before the work is done that would fill it."""
    if path.is_dir():
        raise DeepCacheError(f"{path} cannot be written: it is a directory")
    if not path.parent.is_dir():
        raise DeepCacheError(f"{path} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise DeepCacheError(f"{path} cannot be written: {path.parent} is read-only")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, that takes `path`'s place when the with block ends; an interrupted one leaves nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON.

    Raises:
        ValueError: a number is infinite or NaN, which JSON does not know.
    """
    text = json.dumps(values, indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")
