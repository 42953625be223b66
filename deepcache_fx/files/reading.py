"""Read JSON files, and say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeGuard

from deepcache_fx.errors import ScheduleError


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


def is_natural(value: object) -> TypeGuard[int]:
    """True for an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number that JSON knows")
