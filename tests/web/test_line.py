"""The line of visitors: one at a time, in order, and each can leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from deepcache_fx.errors import DeepCacheError, OptionError
from deepcache_fx.web.line import MOST_WAITING, Line, Ticket


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


def finish(ticket: Ticket[str]) -> Ticket[str]:
    until = time.monotonic() + 20
    while not ticket.is_over and time.monotonic() < until:
        time.sleep(0.005)
    assert ticket.is_over
    return ticket


def endless(ticket: Ticket[str]) -> str:
    while True:
        ticket.report("working", 1, 2)
        time.sleep(0.002)


def test_work_is_done_in_one_thread_in_the_order_of_coming(line: Line) -> None:
    done: list[tuple[str, int]] = []

    def work(ticket: Ticket[str]) -> str:
        done.append((ticket.visitor, threading.get_ident()))
        return ticket.visitor

    tickets = [line.submit(name, work) for name in "abc"]
    assert [finish(ticket).result for ticket in tickets] == ["a", "b", "c"]
    assert [name for name, _ in done] == ["a", "b", "c"]
    assert len({thread for _, thread in done}) == 1


def test_who_is_served_can_stop_and_the_next_is_served(line: Line) -> None:
    first, second = line.submit("a", endless), line.submit("b", lambda ticket: "made")
    assert line.position(second) == 1
    assert line.stop("a")
    assert finish(first).is_stopped
    assert finish(second).result == "made"


def test_who_waits_leaves_at_once(line: Line) -> None:
    line.submit("a", endless)
    waiting = line.submit("b", endless)
    assert line.stop("b")
    assert waiting.is_over
    assert waiting.is_stopped
    assert not line.stop("b")
    line.stop("a")


def test_a_visitor_stands_in_the_line_once_and_may_come_again(line: Line) -> None:
    first = line.submit("a", endless)
    with pytest.raises(DeepCacheError, match="still being made"):
        line.submit("a", endless)
    line.stop("a")
    finish(first)
    assert finish(line.submit("a", lambda ticket: "again")).result == "again"


def test_the_line_is_bounded(line: Line) -> None:
    for number in range(MOST_WAITING + 1):
        line.submit(str(number), endless)
    with pytest.raises(DeepCacheError, match="try again later"):
        line.submit("one more", endless)
    for number in range(MOST_WAITING + 1):
        line.stop(str(number))


@pytest.mark.parametrize(
    ("error", "told"), [(OptionError("too many steps"), "too many steps"), (KeyError("secret"), "failed with KeyError")]
)
def test_what_fails_is_told_in_words_and_the_next_is_served(line: Line, error: Exception, told: str) -> None:
    def work(ticket: Ticket[str]) -> str:
        raise error

    found = finish(line.submit("a", work)).error
    assert found is not None
    assert told in found
    assert "secret" not in found
    assert finish(line.submit("b", lambda ticket: "made")).result == "made"
