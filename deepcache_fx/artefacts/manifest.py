"""The manifest of a directory of programs: which files it has, their SHA-256, and what they were made for.

It is checked before any other file is opened: first its own SHA-256, which stands in it; with a key it is signed
(HMAC-SHA-256).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files.writing import replacing

NAME = "manifest.json"
FORMAT = "deepcache_fx programs 1"
_REMEDY = "make it anew with deepcache_fx.save, or with optimize(programs=...)"


class ManifestError(DeepCacheError):
    """A directory of programs that cannot be trusted, or cannot be read or written."""


class DamagedManifest(ManifestError):
    """One that nobody has written so: nothing of it can be kept."""


@dataclass(frozen=True)
class Program:
    """One signature: its files with their sizes and digests, what it was made for, and the options of `optimize`."""

    files: dict[str, dict[str, Any]]
    made_for: dict[str, str]
    options: dict[str, Any]
    inputs: str


@dataclass(frozen=True)
class Manifest:
    programs: tuple[Program, ...] = ()
    is_signed: bool = field(default=False, compare=False)


def read_manifest(directory: Path, key: bytes | None = None) -> Manifest:
    """The manifest, checked; it says nothing of whether the files are there.

    Raises:
        ManifestError: there is none, it is none, it has an entry that none has, or the key does not fit.
    """
    path = directory / NAME
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ManifestError(f"{directory} holds no programs: there is no {NAME} in it") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedManifest(f"{path} is damaged ({error}): {_REMEDY}") from error
    try:
        if not hmac.compare_digest(str(found["sha256"]).encode(), _digest(found).encode()):
            raise DamagedManifest(f"{path} is damaged (its SHA-256 is another): {_REMEDY}")
        if found["format"] != FORMAT:
            raise ManifestError(f"{path} is of the format {found['format']!r}, not {FORMAT!r}: {_REMEDY}")
        signature = found.get("hmac")
        if key is not None and not (
            isinstance(signature, str) and hmac.compare_digest(signature.encode(), _sign(found, key).encode())
        ):
            raise ManifestError(f"{path} is not signed with this key: somebody else has written or changed it")
        programs = tuple(_program(item) for item in found["programs"])
    except ManifestError:
        raise
    except Exception as error:
        raise DamagedManifest(f"{path} is damaged ({type(error).__name__}: {error}): {_REMEDY}") from error
    return Manifest(programs, signature is not None)


def read_file(directory: Path, program: Program, name: str) -> bytes:
    """A file of the manifest, whose digest is the one that stands there.

    Raises:
        ManifestError: it is missing, truncated or another.
    """
    path, about = directory / name, program.files[name]
    try:
        with path.open("rb") as file:
            content = file.read(about["size"] + 1)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}: {_REMEDY}") from error
    if len(content) != about["size"] or hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ManifestError(f"{path} is not what the manifest says (truncated or changed): {_REMEDY}")
    return content


def add_program(directory: Path, contents: dict[str, bytes], program: Program, key: bytes | None = None) -> None:
    """Write the files and then the manifest, each whole or not at all; a program for the same takes the place.

    Raises:
        ManifestError: they cannot be written (a full disk), or the manifest that is there is not to be changed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(directory):
            before = _before(directory, key)
            for name, content in contents.items():
                with replacing(directory / name) as file:
                    file.write(content)
            kept = [item for item in before if item.made_for != program.made_for]
            with replacing(directory / NAME) as file:
                file.write(sealed({"format": FORMAT, "programs": [vars(item) for item in (*kept, program)]}, key))
    except OSError as error:
        raise ManifestError(f"programs cannot be written to {directory}: {error.strerror or error}") from error


def sealed(text: dict[str, Any], key: bytes | None = None) -> bytes:
    """The bytes of a manifest of this text, with its digest and, with a key, its signature."""
    seal = {"sha256": _digest(text)} | ({} if key is None else {"hmac": _sign(text, key)})
    return json.dumps({**text, **seal}, indent=1, allow_nan=False).encode() + b"\n"


def _before(directory: Path, key: bytes | None) -> tuple[Program, ...]:
    """The programs that are to stay; none where the manifest is damaged.

    Raises:
        ManifestError: it is signed with another key, or is another format's: it is not for us to replace.
    """
    if not (directory / NAME).exists():
        return ()
    try:
        manifest = read_manifest(directory, key)
    except DamagedManifest:
        return ()
    if key is None and manifest.is_signed:
        raise ManifestError(f"{directory / NAME} is signed: pass its key, or take another directory")
    return manifest.programs


def described(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def _program(item: Any) -> Program:
    program = Program(dict(item["files"]), dict(item["made_for"]), dict(item["options"]), str(item["inputs"]))
    for name, about in program.files.items():
        size, digest = about["size"], about["sha256"]
        if Path(name).name != name or name.startswith(".") or name == NAME or "\\" in name or "\0" in name:
            raise ValueError(f"a file of the name {name!r}")
        if type(size) is not int or not 0 <= size < 2**40 or not isinstance(digest, str):
            raise ValueError(f"no size or digest of {name}")
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in program.made_for.items()):
        raise ValueError("what it was made for is no text")
    return program


def _content(found: dict[str, Any]) -> bytes:
    told = {name: value for name, value in found.items() if name not in ("sha256", "hmac")}
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(_content(found)).hexdigest()


def _sign(found: dict[str, Any], key: bytes) -> str:
    return hmac.new(key, _content(found), hashlib.sha256).hexdigest()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One writer at a time, where the system has such locks; else the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with os.fdopen(os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
