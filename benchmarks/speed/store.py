"""The file that results are kept in: JSON, rewritten as a whole at every change."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from benchmarks.speed.cases import Case, Result

T = TypeVar("T")


class ResultsFile:
    """A JSON list of results, rewritten at every change so that a broken run loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Result] = {}
        if path.exists():
            for row in read_results(path):
                self.rows[self._key(row)] = row

    @staticmethod
    def _key(row: Result) -> tuple[str, str]:
        return row.case.key, str(row.environment.get("commit"))

    def done(self, case: Case, commit: str) -> bool:
        """True where this case was finished at this commit."""
        row = self.rows.get((case.key, commit))
        return row is not None and row.final

    def put(self, rows: Iterable[Result]) -> None:
        """Add rows in place of those of the same case and commit; a finished row gives way to finished ones only."""
        for row in rows:
            old = self.rows.get(self._key(row))
            if old is None or row.final or not old.final:
                self.rows[self._key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([row.to_dict() for row in self.rows.values()], indent=1, allow_nan=False)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)


def read_results(path: Path) -> list[Result]:
    """The rows of a results file: a JSON list, or JSON lines where the name ends in .jsonl."""
    text = path.read_text()
    data = [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    return [from_dict(Result, row) for row in data]


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """The dataclass that `dataclasses.asdict` made `data` of; fields that are missing take their defaults."""
    hints = get_type_hints(cls)
    return cls(**{name: _from_plain(hints[name], value) for name, value in data.items() if name in hints})


def _from_plain(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(item for item in get_args(hint) if item is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value)  # type: ignore[arg-type]
    return tuple(value) if isinstance(value, list) else value
