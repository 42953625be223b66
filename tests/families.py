"""What `make test` runs of a family of tests, and how many examples it tries; `make test-all` runs the rest.

`thorough` marks a test or a parameter as a further member of a family whose representatives run in `make test`. Tests
of properties, which carry Hypothesis's own mark, run in both: with few examples, and with many.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

thorough = pytest.mark.thorough


def family(members: Iterable[Any], *representatives: Any) -> list[Any]:
    """Parameters for `parametrize`: all members, those that are no representative marked `thorough`.

    Args:
        members: A tuple each where several names are parametrised.
        representatives: Members, or where members are tuples also the first item of some.

    Raises:
        ValueError: a representative is no member: it was renamed or removed.
    """
    found: list[Any] = []
    missing = list(representatives)
    for member in members:
        values = member if isinstance(member, tuple) else (member,)
        hits = [one for one in representatives if one is member or one == member or one == values[0]]
        missing = [one for one in missing if one not in hits]
        found.append(pytest.param(*values, marks=() if hits else thorough))
    if missing:
        raise ValueError(f"{missing} represent a family that has no such members")
    return found


def examples(few: int, many: int | None = None, **options: Any) -> Any:
    """Settings of a property: so many examples in `make test`, and in `make test-all` `many` or ten times as many."""
    wanted = few if settings.get_current_profile_name() != "thorough" else many or 10 * few
    return settings(max_examples=wanted, **{"deadline": None, **options})
