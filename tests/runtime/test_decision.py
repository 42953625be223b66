"""The decision as a table."""

from __future__ import annotations

import pytest

from deepcache_fx.runtime.decision import StepDecision, decide


@pytest.mark.parametrize(
    ("scheduled", "branch", "doubt", "missing", "expected"),
    [
        (True, None, None, None, StepDecision(True)),
        (True, None, "doubt", "missing", StepDecision(True)),  # what the schedule asks for needs no reason
        (False, None, None, None, StepDecision(False)),
        (False, 3, None, None, StepDecision(False, 3)),
        (False, (1, 2), None, None, StepDecision(False, (1, 2))),
        (False, None, None, "missing", StepDecision(True, reason="missing")),
        (False, 3, None, "missing", StepDecision(True, reason="missing")),
        (False, None, "doubt", None, StepDecision(True, reason="doubt")),
        (False, None, "doubt", "missing", StepDecision(True, reason="doubt")),
    ],
)
def test_a_step_is_full_where_it_is_scheduled_doubtful_or_has_nothing_to_read(
    scheduled: bool, branch: object, doubt: str | None, missing: str | None, expected: StepDecision
) -> None:
    assert decide(scheduled, branch, doubt, missing) == expected  # type: ignore[arg-type]
