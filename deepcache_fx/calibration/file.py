"""The file that `calibrate` writes: while it searches, what has been tried; at the end the schedule too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepcache_fx.calibration.runs import Measured
from deepcache_fx.calibration.search import Candidate
from deepcache_fx.errors import DeepCacheError, ScheduleError
from deepcache_fx.files.reading import is_natural, is_number, read_json
from deepcache_fx.files.writing import write_json
from deepcache_fx.schedules.schedule import FORMAT, Calibrated


@dataclass(frozen=True)
class Evaluation:
    """What a candidate was found to be worth."""

    error: float
    """Mean over all images; a lower bound of it where fewer were made; infinite where one is not finite."""
    images: int
    """How many were made."""


@dataclass
class CalibrationFile:
    """What is known of a search. Written after every addition; without a path it is kept in memory alone."""

    path: Path | None
    settings: Mapping[str, Any]
    """Everything that an evaluation or the choice among them depends on."""
    measured: Measured | None = None
    evaluations: dict[Candidate, Evaluation] = field(default_factory=dict)

    @staticmethod
    def open(path: Path | None, settings: Mapping[str, Any]) -> CalibrationFile:
        """Go on with a file if there is one, else begin it.

        Raises:
            DeepCacheError: it comes from other settings, or is no such file.
        """
        if path is None or not path.exists():
            return CalibrationFile(path, settings)
        remedy = "choose another file, or delete this one"
        values = read_json(path)
        search = values.get("search") if isinstance(values, dict) and values.get("format") == FORMAT else None
        if not isinstance(search, dict) or not isinstance(search.get("settings"), dict):
            raise DeepCacheError(f"{path} is there and holds no search to go on with: {remedy}")
        theirs = search["settings"]
        different = [
            f"{name} is {theirs.get(name)!r:.200} there and {settings.get(name)!r:.200} here"
            for name in sorted(theirs.keys() | settings.keys())
            if theirs.get(name) != settings.get(name)
        ]
        if different:
            raise DeepCacheError(f"{path} comes from other settings: {'; '.join(different)}: {remedy}")
        try:
            measured = _read_measured(search.get("measured"))
            return CalibrationFile(path, settings, measured, _read_evaluations(search.get("evaluations"), measured))
        except ScheduleError as error:
            raise DeepCacheError(f"{path} cannot be gone on with: {error}: {remedy}") from error

    def add(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Note what a candidate is worth."""
        self.evaluations[candidate] = evaluation
        self._write({"format": FORMAT}, complete=False)

    def finish(self, found: Calibrated) -> None:
        """Note the outcome: from now on `Schedule.load` takes the file."""
        self._write(found.to_dict(), complete=True)

    def _write(self, values: Mapping[str, Any], *, complete: bool) -> None:
        if self.path is None or self.measured is None:
            return
        evaluations = [
            {
                "steps": candidate.letters(self.measured.num_steps),
                "forecast": candidate.forecast,
                "error": found.error if is_number(found.error) else None,
                "images": found.images,
            }
            for candidate, found in self.evaluations.items()
        ]
        search = {
            "complete": complete,
            "settings": dict(self.settings),
            "measured": asdict(self.measured),
            "evaluations": evaluations,
        }
        write_json(self.path, {**values, "search": search})


def _read_measured(values: object) -> Measured:
    names = ("num_steps", "full_macs", "shallow_macs", "deeper_macs")
    if not isinstance(values, dict) or set(values) != set(names) or not all(map(is_natural, values.values())):
        raise ScheduleError(f"measured must hold {', '.join(names)}, each an integer of at least 0, got {values!r:.80}")
    if not values["num_steps"] or not values["full_macs"]:
        raise ScheduleError(f"measured must hold a number of steps and of operations above 0, got {values!r:.80}")
    return Measured(**values)


def _read_evaluations(values: object, measured: Measured) -> dict[Candidate, Evaluation]:
    if not isinstance(values, list):
        raise ScheduleError(f"evaluations must be a list, got {values!r:.80}")
    found = {}
    for value in values:
        entry = value if isinstance(value, dict) else {}
        text, order, error, images = (entry.get(name) for name in ("steps", "forecast", "error", "images"))
        if not (
            isinstance(text, str)
            and len(text) == measured.num_steps
            and text.startswith("F")
            and set(text) <= ({"F", "s", "t"} if measured.deeper_macs else {"F", "s"})
            and order in (0, 1, 2)
            and not isinstance(order, bool)
            and is_natural(images)
            and (error is None or is_number(error))
        ):
            raise ScheduleError(
                f"an evaluation must hold steps ({measured.num_steps} letters: F full, s shallow, t deeper where there "
                f"are such), forecast, error and images, got {value!r:.120}"
            )
        found[Candidate.read(text, order)] = Evaluation(float("inf") if error is None else error, images)
    return found
