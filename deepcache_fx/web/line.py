"""Visitors stand in one line: their work is done by one thread, one after the other, and can be stopped.

One thread, because what is measured would mean nothing with another run beside it, and because a run's cache belongs to
the thread that runs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deepcache_fx.errors import DeepCacheError

MOST_WAITING = 20

T = TypeVar("T")


class Stopped(BaseException):
    """The visitor has stopped the work. No Exception: nothing on the way may take it for a failure."""


@dataclass(eq=False)
class Ticket(Generic[T]):
    """A visitor's work. Read by the page while the line's thread writes it: each field is set at once."""

    visitor: str
    progress: tuple[str, int, int] = ("", 0, 0)
    """(stage, steps done, steps of the stage)."""
    result: T | None = None
    error: str | None = None
    """In words for the visitor."""
    is_stopped: bool = False
    is_over: bool = False
    _wanted: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """It ends with the step that runs."""
        self._wanted.set()

    def report(self, stage: str, done: int, total: int) -> None:
        """Called by the work at each step.

        Raises:
            Stopped: the visitor wants no more of it.
        """
        if self._wanted.is_set():
            raise Stopped
        self.progress = (stage, done, total)


class Line:
    """The line, and the thread that serves it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")
        self._lock = threading.Lock()
        self._tickets: list[Ticket[object]] = []

    def submit(self, visitor: str, work: Callable[[Ticket[T]], T]) -> Ticket[T]:
        """Let the visitor's work be done when its turn comes. `work` calls `Ticket.report` at each step.

        Raises:
            DeepCacheError: the visitor is in the line already, or it is too long.
        """
        ticket: Ticket[T] = Ticket(visitor)
        with self._lock:
            if any(other.visitor == visitor for other in self._tickets):
                raise DeepCacheError("Your last picture is still being made: stop it, or wait for it.")
            if len(self._tickets) > MOST_WAITING:
                raise DeepCacheError(f"{len(self._tickets)} visitors are waiting already: try again later.")
            self._tickets.append(ticket)  # type: ignore[arg-type]
        self._thread.submit(self._serve, ticket, work)
        return ticket

    def position(self, ticket: Ticket[T]) -> int:
        """How many are served before it; 0 is served now."""
        with self._lock:
            return next((place for place, other in enumerate(self._tickets) if other is ticket), 0)

    def stop(self, visitor: str) -> bool:
        """Stop what the visitor waits for; False where there is nothing. What only waits leaves the line at once."""
        with self._lock:
            found = [ticket for ticket in self._tickets if ticket.visitor == visitor]
            for ticket in found:
                ticket.stop()
                if ticket is not self._tickets[0]:
                    self._tickets.remove(ticket)
                    ticket.is_stopped = ticket.is_over = True
        return bool(found)

    def close(self) -> None:
        """Stop everyone, and wait for the thread."""
        with self._lock:
            for ticket in self._tickets:
                ticket.stop()
        self._thread.shutdown(wait=True)

    def _serve(self, ticket: Ticket[T], work: Callable[[Ticket[T]], T]) -> None:
        if ticket.is_over:
            return
        try:
            ticket.report("", 0, 0)
            ticket.result = work(ticket)
        except Stopped:
            ticket.is_stopped = True
        except DeepCacheError as error:
            ticket.error = str(error)
        except Exception as error:
            logging.getLogger(__name__).exception("a visitor's run failed")
            ticket.error = f"The server failed with {type(error).__name__}; its log says more."
        finally:
            with self._lock:
                self._tickets.remove(ticket)  # type: ignore[arg-type]
            ticket.is_over = True
