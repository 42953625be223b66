"""Read the JSON file of a calibrated schedule, entry by entry. No tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepcache_fx.branch import check_branch
from deepcache_fx.calibrated import FORMAT, Achieved, Calibrated
from deepcache_fx.errors import ScheduleError
from deepcache_fx.made_for import MadeFor


def parse(values: object) -> Calibrated:
    """The schedule that these plain values, as of `Calibrated.to_dict`, describe.

    Raises:
        ScheduleError: an entry is missing, unknown, or holds what it cannot; the message names it.
    """
    outer = _checked(values, _OUTER, "", ("search",))
    made_for = _checked(outer["made_for"], _MADE_FOR, "made_for.")
    achieved = _checked(outer["achieved"], _ACHIEVED, "achieved.")
    steps, num_steps, branch = outer["steps"], outer["num_steps"], outer["branch"]
    deeper, deeper_branch = outer["deeper"], outer["deeper_branch"]
    for name in ("steps", "deeper"):
        if (last := max(outer[name], default=0)) >= num_steps:
            raise ScheduleError(f"{name} must be below num_steps, which is {num_steps}, got {last}")
    if set(steps) & set(deeper):
        raise ScheduleError(f"deeper must name no full step, got {sorted(set(steps) & set(deeper))}")
    if deeper and deeper_branch is None:
        raise ScheduleError("deeper_branch must be a branch where there are deeper steps, got None")
    return Calibrated(
        steps=tuple(steps),
        num_steps=num_steps,
        forecast=outer["forecast"],
        branch=check_branch(branch),
        made_for=MadeFor(**{**made_for, "scheduler_config": json.dumps(made_for["scheduler_config"], sort_keys=True)}),
        achieved=Achieved(**achieved),
        library=outer["library"],
        deeper=tuple(deeper),
        deeper_branch=None if deeper_branch is None else check_branch(deeper_branch),
    )


def load(path: str | Path) -> Calibrated:
    """The schedule in a file that `calibrate` or `Calibrated.save` wrote.

    Raises:
        ScheduleError: there is no such file, it is not one of these, or its search has not been finished.
    """
    values = read_json(Path(path))
    search = values.get("search") if isinstance(values, dict) else None
    if isinstance(search, dict) and search.get("complete") is not True:
        raise ScheduleError(
            f"the search that writes {path} is unfinished: calibrate with the same settings to go on, with a smaller "
            "trials= to take the best so far"
        )
    try:
        return parse(values)
    except ScheduleError as error:
        raise ScheduleError(f"{path} is no calibrated schedule: {error}") from error


def read_json(path: Path) -> object:
    """What a JSON file holds.

    Raises:
        ScheduleError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ScheduleError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"{path} is not JSON: {error}") from error


# Entries: (what holds it, in words).

_Check = tuple[Callable[[Any], bool], str]


def is_natural(value: object) -> bool:
    """True for an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """True for a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _is_steps(value: Any) -> bool:
    return _is_rising(value) and value[:1] == [0]


def _is_rising(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_natural, value)) and all(a < b for a, b in pairwise(value))


def _is_branch(value: object) -> bool:
    return is_natural(value) or (isinstance(value, list) and len(value) == 2 and all(map(is_natural, value)))


_TEXT: _Check = (lambda value: isinstance(value, str) and bool(value), "text")
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_NUMBER: _Check = (is_number, "a number of at least 0")
_COUNT: _Check = (lambda value: is_natural(value) and value > 0, "an integer of at least 1")
_OUTER: Mapping[str, _Check] = {
    "format": (lambda value: value == FORMAT, repr(FORMAT)),
    "library": _TEXT,
    "steps": (_is_steps, "rising step numbers, the first of them 0"),
    "num_steps": _COUNT,
    "forecast": (lambda value: is_natural(value) and value <= 2, "0, 1 or 2"),
    "branch": (_is_branch, "a number of at least 0 or [block, layer]"),
    "deeper": (_is_rising, "rising step numbers"),
    "deeper_branch": (
        lambda value: value is None or _is_branch(value),
        "a number of at least 0, [block, layer] or null",
    ),
    "made_for": _OBJECT,
    "achieved": _OBJECT,
}
_MADE_FOR = {"model": _TEXT, "model_config": _TEXT, "scheduler": _TEXT, "scheduler_config": _OBJECT}
_ACHIEVED = {
    "metric": _TEXT,
    "error": _NUMBER,
    "uniform_error": _NUMBER,
    "cost": _NUMBER,
    "images": _COUNT,
    "trials": _COUNT,
    "plain_error": (lambda value: value is None or is_number(value), "a number of at least 0 or null"),
}


def _checked(
    values: object, checks: Mapping[str, _Check], where: str, optional: Sequence[str] = ()
) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ScheduleError(f"it must hold a JSON object, got {values!r:.80}")
    for name, (holds, wording) in checks.items():
        if name not in values:
            raise ScheduleError(f"{where}{name} is missing")
        if not holds(values[name]):
            raise ScheduleError(f"{where}{name} must be {wording}, got {values[name]!r:.80}")
    unknown = sorted(values.keys() - checks.keys() - set(optional))
    if unknown:
        raise ScheduleError(f"{where}{unknown[0]} is unknown")
    return values


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number that JSON knows")
