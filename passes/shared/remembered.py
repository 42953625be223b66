"""Remember what was measured on this machine, so that every process takes the same.

One small JSON file for each question, beside what Inductor has compiled. The first answer stands: a file is made whole
under another name and then linked to its own, which fails where another process was first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path


def beside_the_compile_cache(name: str) -> Path:
    """A folder of this name in Inductor's cache (`TORCHINDUCTOR_CACHE_DIR`)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # slow to import, and only needed here

    return Path(cache_dir()) / name


def remembered(
    directory: Path, question: Mapping[str, object], answers: Collection[str | None], ask: Callable[[], str | None]
) -> str | None:
    """The answer that was given first to a question, on this machine; `ask` is called where there is none yet.

    Args:
        directory: Made where there is none. If it cannot be written, nothing is remembered, with a warning.
        question: Of values that JSON knows.
        answers: All that there may be. A file that says anything else, or is no such file, counts as none.
        ask: Measures.
    """
    asked = json.dumps(question, sort_keys=True)
    path = directory / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    found = _read(path, asked, answers)
    if found is not None:
        return found[0]
    answer = ask()
    try:
        first = _write(path, json.dumps({"question": json.loads(asked), "answer": answer}, indent=1))
    except OSError as error:
        warnings.warn(f"what was measured is not remembered: {error}", stacklevel=2)
        return answer
    other = None if first else _read(path, asked, answers)
    if other is not None:
        return other[0]
    if not first:  # what is there says nothing
        with contextlib.suppress(OSError):
            path.unlink()
            _write(path, json.dumps({"question": json.loads(asked), "answer": answer}, indent=1))
    return answer


def _read(path: Path, asked: str, answers: Collection[str | None]) -> tuple[str | None] | None:
    try:
        found = json.loads(path.read_text())
        if json.dumps(found["question"], sort_keys=True) == asked and found["answer"] in answers:
            return (found["answer"],)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return None


def _write(path: Path, text: str) -> bool:
    """Write a file at once; false where there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        return True
    finally:
        Path(name).unlink()
