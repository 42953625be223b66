"""A directory of programs that a runtime loads from and adds to."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch

from deepcache_fx.artefacts.entry_text import entry_of_text, entry_to_text, to_bytes
from deepcache_fx.artefacts.graph_text import Unreadable
from deepcache_fx.artefacts.made_for import differences, made_for
from deepcache_fx.artefacts.manifest import Manifest, Program, add_program, described, read_file, read_manifest
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.execution.assemble import Entry
from deepcache_fx.options import Options
from deepcache_fx.runtime.runtime import Wanted
from deepcache_fx.schedules import patterns
from deepcache_fx.schedules.schedule import Schedule


class ProgramDirectory:
    """Programs in a directory: loaded where they fit exactly, added where they are new.

    Compiled code is code: name only directories that nobody else can write to.

    Args:
        directory: Made when it is first written to.
        key: With which the manifest is signed and checked (HMAC-SHA-256).
        adds: False: nothing is written, and a warning says why programs for a call are missing.
    """

    def __init__(self, directory: str | Path, *, key: bytes | None = None, adds: bool = True) -> None:
        self.directory = Path(directory)
        self._key, self._adds = key, adds

    def manifest(self) -> Manifest:
        """Checked.

        Raises:
            DeepCacheError: there is none that can be trusted.
        """
        return read_manifest(self.directory, self._key)

    def check(self) -> Manifest:
        """The manifest, once every file was compared with it.

        Raises:
            DeepCacheError: a file is missing or another.
        """
        manifest = self.manifest()
        for program in manifest.programs:
            for name in program.files:
                read_file(self.directory, program, name)
        return manifest

    def find(self, wanted: Wanted) -> Entry | None:
        """The programs that were made for exactly this; None, with a warning where files are damaged."""
        try:
            if not (self.directory / "manifest.json").exists():
                return None
            asked = made_for(wanted)
            program = next((item for item in self.manifest().programs if item.made_for == asked), None)
            if program is not None:
                return self._load(program, wanted)
            if not self._adds:
                warnings.warn(
                    f"captured anew, for {self.directory} has no such program: {self._why_none(asked)}", stacklevel=2
                )
            return None
        except Unreadable as error:
            if str(error).startswith("this is no"):
                self._warn(error)
            return None
        except DeepCacheError as error:
            self._warn(error)
            return None

    def add(self, wanted: Wanted, entry: Entry) -> None:
        """Write programs that have been made; a warning where that cannot be done."""
        if not self._adds or entry.source == str(self.directory):
            return
        try:
            self.write(wanted, entry)
        except DeepCacheError as error:
            warnings.warn(f"these programs are not written to {self.directory}: {error}", stacklevel=2)

    def write(self, wanted: Wanted, entry: Entry) -> None:
        """Write programs.

        Raises:
            DeepCacheError: they cannot be told or written; says why.
        """
        facts = made_for(wanted)
        text, constants = entry_to_text(entry, wanted.module)
        graphs = to_bytes(text)
        name = described(graphs)["sha256"][:32]
        contents = {f"{name}.json": graphs}
        if constants:
            values = safetensors.torch.save(constants)
            contents[f"{described(values)['sha256'][:32]}.safetensors"] = values
        files = {file: described(content) for file, content in contents.items()}
        program = Program(files, facts, options_to_text(wanted.options), entry.inputs)
        add_program(self.directory, contents, program, self._key)

    def _why_none(self, asked: dict[str, str]) -> str:
        """In what the nearest programs differ from what is wanted."""
        found = [differences(item.made_for, asked) for item in self.manifest().programs]
        nearest = min(found, key=len, default=["there are none"])
        return "; ".join(nearest)

    def _load(self, program: Program, wanted: Wanted) -> Entry:
        graphs, constants = None, {}
        for name in program.files:
            content = read_file(self.directory, program, name)
            if name.endswith(".json"):
                graphs = json.loads(content)
            elif name.endswith(".safetensors"):
                constants = safetensors.torch.load(content)
        entry = entry_of_text(graphs, constants, wanted.module, wanted.call, wanted.options, wanted.recorders)
        entry.source = str(self.directory)
        return entry

    def _warn(self, error: DeepCacheError) -> None:
        warnings.warn(f"programs are made anew: {error}", stacklevel=2)


_NAMED = tuple(name for name in Options.__dataclass_fields__ if name not in ("schedule", "passes", "preset"))
_PATTERNS = {"Uniform": patterns.Uniform, "Power": patterns.Power, "Steps": patterns.Steps}


def options_to_text(options: Options) -> dict[str, Any]:
    """The options of `optimize` as plain values.

    Raises:
        Unreadable: one of them cannot be named; says which.
    """
    kind = type(options.schedule)
    if _PATTERNS.get(kind.__name__) is not kind:
        raise Unreadable(f"schedule={options.schedule} is none that a file names: {', '.join(_PATTERNS)}")
    values = {name: getattr(options, name) for name in _NAMED}
    schedule = {item.name: getattr(options.schedule, item.name) for item in fields(options.schedule)}  # type: ignore[arg-type]
    text: dict[str, Any] = json.loads(json.dumps({**values, "schedule": [kind.__name__, schedule]}))
    return text


def options_of_text(text: Any) -> dict[str, Any]:
    """Arguments of `optimize`.

    Raises:
        Unreadable: they are none.
    """
    try:
        values = dict(text)
        kind, arguments = values.pop("schedule")
        if set(values) != set(_NAMED):
            raise ValueError(f"they are {', '.join(map(str, values))}")
        schedule: Schedule = _PATTERNS[kind](**{k: _tuple(v) for k, v in arguments.items()})
        return {**{name: _tuple(value) for name, value in values.items()}, "schedule": schedule}
    except Exception as error:
        raise Unreadable(f"this is no list of options: {type(error).__name__}: {error}") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
