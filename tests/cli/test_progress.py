"""The progress bar: what it shows, and that it shows nothing where nobody looks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from deepcache_fx.cli.progress import progress_bar


def test_shows_the_stage_and_how_far_it_is() -> None:
    output = io.StringIO()
    with progress_bar(Console(file=output, force_terminal=True, width=80), time_stages=True) as show:
        show("baseline", 3, 7)
    assert "baseline" in output.getvalue()
    assert "3/7" in output.getvalue()


def test_writes_nothing_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with progress_bar(Console(file=output), time_stages=False) as show:
        show("baseline", 3, 7)
    assert not output.getvalue().strip()


@pytest.mark.parametrize(("time_stages", "resets"), [(True, 2), (False, 0)])
def test_the_time_begins_anew_with_a_stage_if_asked_to(
    time_stages: bool, resets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset: list[object] = []
    monkeypatch.setattr(Progress, "reset", lambda self, task: reset.append(task))
    with progress_bar(Console(file=io.StringIO()), time_stages=time_stages) as show:
        for stage, done in (("one", 0), ("one", 1), ("two", 0), ("two", 1)):
            show(stage, done, 1)
    assert len(reset) == resets
