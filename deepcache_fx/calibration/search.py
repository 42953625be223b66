"""Search for the steps that are best full. Pure: what a schedule is worth is asked of a function. No tensors.

A drift of the cached feature from step to step does not tell what a schedule does to the image, so that every schedule
is judged by its outcome alone. The search goes from equally spaced refreshes, and others that are denser where most
samplers need it, by small moves, each kept if it helps. It is deterministic: asked again, it asks for the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from deepcache_fx.errors import ScheduleError
from deepcache_fx.schedules.patterns import Power, Uniform
from deepcache_fx.schedules.schedule import letters

_EXPONENTS = (0.8, 1.25, 1.5, 2.0)
"""Refresh i of k lies at (i / k) ** exponent of the run: above 1 they are dense at the start."""
_HEADS = (2, 3, 4)
"""How many first steps are full where a schedule begins with a warm-up, so that forecasts have what they need."""
_SHIFTS = (1, -1, 2, -2)


@dataclass(frozen=True)
class Candidate:
    """A schedule to be judged: the full steps, the order of the forecast between them, the steps that begin deeper."""

    steps: tuple[int, ...]
    forecast: int
    deeper: tuple[int, ...] = ()

    def letters(self, num_steps: int) -> str:
        """The steps of a run: F full, s shallow, t from the deeper skip connection on."""
        return letters(self.steps, self.deeper, num_steps)

    @staticmethod
    def read(written: str, forecast: int) -> Candidate:
        """The schedule that is written so."""
        steps, deeper = (tuple(i for i, letter in enumerate(written) if letter == kind) for kind in "Ft")
        return Candidate(steps, forecast, deeper)


Measure = Callable[[Candidate, float], float]
"""The error of a candidate; infinity may stand for any error above the second argument."""


class OutOfTrials(Exception):
    """As many candidates have been judged as were allowed."""


@dataclass
class Search:
    """One search; `known` holds every candidate that was judged, in order."""

    measure: Measure
    num_steps: int
    orders: Sequence[int]
    """Orders of the forecast to choose from."""
    trials: int
    """How many candidates may be judged."""
    known: dict[Candidate, float] = field(default_factory=dict)
    _best: dict[int, Candidate] = field(default_factory=dict)
    """By number of full steps."""

    def at_budget(self, count: int) -> Candidate:
        """The best schedule with `count` full steps; at least as good as `uniform` of that count, in every order."""
        for order in self.orders:  # all of them, so that none is better than what is returned
            self._error(Candidate(uniform(self.num_steps, count), order), free=True)
        try:
            self._best_start(count, self._best[count].forecast)
            self._improve(count)
            for order in self.orders:
                best = self._best[count]
                if self._error(Candidate(best.steps, order)) < self.known[best]:
                    self._improve(count)
        except OutOfTrials:
            pass
        return self._best[count]

    def deepen(self, best: Candidate, exchange: float) -> Candidate:
        """Give full steps for deeper ones, `exchange` for each, while that helps; maybe `best` itself is returned.

        A deeper step refreshes the shallow cache too where that is forecast: refreshes of both kinds are spread evenly,
        then moved. With order 0 alone nothing is tried.
        """
        count = len(best.steps)
        with contextlib.suppress(OutOfTrials):
            for order in [order for order in self.orders if order > 0]:
                failures = 0
                for given in range(1, count):
                    extra = min(int(given * exchange), self.num_steps - count + given)
                    if extra < 1:
                        continue
                    tried = _mixed(self.num_steps, count - given, extra, order)
                    helped = self._deeper_error(tried, best) < self.known[best]
                    best, failures = (tried, 0) if helped else (best, failures + 1)
                    if failures == 3:
                        break
            while best.deeper and (moved := self._moved(best)) is not None:
                best = moved
        return best

    def _moved(self, best: Candidate) -> Candidate | None:
        """Better with one refresh, of either kind, moved by a step; None where there is no such."""
        for step in (*best.deeper, *best.steps[1:]):
            for moved in (step + 1, step - 1):
                if 0 < moved < self.num_steps and moved not in (*best.deeper, *best.steps):
                    steps, deeper = (
                        tuple(sorted(moved if at == step else at for at in one)) for one in (best.steps, best.deeper)
                    )
                    tried = Candidate(steps, best.forecast, deeper)
                    if self._deeper_error(tried, best) < self.known[best]:
                        return tried
        return None

    def _deeper_error(self, candidate: Candidate, best: Candidate) -> float:
        if candidate not in self.known:
            if len(self.known) >= self.trials:
                raise OutOfTrials
            self.known[candidate] = self.measure(candidate, self.known[best])
        return self.known[candidate]

    def at_error(self, target: float) -> Candidate:
        """The schedule with the fewest full steps whose error is at most `target`.

        Raises:
            ScheduleError: the error is larger even where every step is full.
        """
        every = Candidate(tuple(range(self.num_steps)), self.orders[0])
        least = self._error(every, free=True)
        if least > target:
            raise ScheduleError(
                f"an error of {target:g} cannot be reached: with every step full it is {least:.3g}, from rounding alone"
            )
        count, failing = self.num_steps, 0
        try:
            middle = math.ceil(self.num_steps / 3)
            for order in self.orders:
                self._error(Candidate(uniform(self.num_steps, middle), order))
            order = self._best[middle].forecast
            while count - failing > 1:
                middle = (count + failing) // 2
                if self._best_start(middle, order, until=target) <= target:
                    count = middle
                else:
                    failing = middle
            while count > 1:
                fewer = count - 1
                self._best_start(fewer, order, until=target)
                for steps in _without_one(self._best[count].steps):
                    self._error(Candidate(steps, order))
                if self._improve(fewer, until=target) > target:
                    break
                count = fewer
        except OutOfTrials:
            pass
        return self._best[count]

    def _error(self, candidate: Candidate, *, free: bool = False) -> float:
        """Its error; infinity where it is worse than the best with as many full steps. `free`: whatever it costs."""
        if candidate in self.known:
            return self.known[candidate]
        if len(self.known) >= self.trials and not free:
            raise OutOfTrials
        count = len(candidate.steps)
        best = self._best.get(count)
        limit = math.inf if free or best is None else self.known[best]
        error = self.measure(candidate, limit)
        self.known[candidate] = error
        if best is None or error < self.known[best]:
            self._best[count] = candidate
        return error

    def _best_start(self, count: int, order: int, until: float = -1.0) -> float:
        """Judge the starts until one is good enough; returns the lowest error with this many full steps."""
        for steps in starts(self.num_steps, count):
            self._error(Candidate(steps, order))
            if self.known[self._best[count]] <= until:
                break
        return self.known[self._best[count]]

    def _improve(self, count: int, until: float = -1.0) -> float:
        """Move the best schedule with this many full steps while that helps; returns its error."""
        helped = True
        while helped:
            helped = False
            for move in _moves(count):
                while self.known[best := self._best[count]] > until:
                    steps = move(best.steps, self.num_steps)
                    if steps is None or self._error(Candidate(steps, best.forecast)) >= self.known[best]:
                        break
                    helped = True
                else:
                    return self.known[best]
        return self.known[self._best[count]]


# Where a search begins.


def uniform(num_steps: int, count: int) -> tuple[int, ...]:
    """`count` full steps at equal distances: those of `Uniform(n)` where it has as many, else the nearest there are."""
    interval = _interval(num_steps, count)
    if interval is not None:
        return tuple(Uniform(interval).full_steps(num_steps))
    return tuple(index * num_steps // count for index in range(count))


def _mixed(num_steps: int, count: int, extra: int, order: int) -> Candidate:
    """`count` full steps among `count + extra` refreshes, both at equal distances."""
    refreshes = uniform(num_steps, count + extra)
    full = {index * len(refreshes) // count for index in range(count)}
    steps, deeper = (
        tuple(at for index, at in enumerate(refreshes) if (index in full) is chosen) for chosen in (True, False)
    )
    return Candidate(steps, order, deeper)


def starts(num_steps: int, count: int) -> list[tuple[int, ...]]:
    """Schedules with `count` full steps to begin from; `uniform` is the first."""
    found = [uniform(num_steps, count)]
    found += [_spread(num_steps, count, exponent) for exponent in _EXPONENTS]
    for head in _HEADS:
        if head < count:
            rest = uniform(num_steps - head + 1, count - head + 1)
            found.append((*range(head - 1), *(head - 1 + step for step in rest)))
    if 1 < count < num_steps:
        found.append((*uniform(num_steps - 1, count - 1), num_steps - 1))
    interval = _interval(num_steps, count)
    if interval is not None and interval > 1:
        with contextlib.suppress(ScheduleError):  # it has none for this number of steps
            found.append(tuple(Power(interval, center=round(0.3 * num_steps)).full_steps(num_steps)))
    return [steps for steps in dict.fromkeys(found) if len(steps) == count]


def _interval(num_steps: int, count: int) -> int | None:
    """The interval of the uniform schedule with this many full steps, if there is one."""
    interval = math.ceil(num_steps / count)
    return interval if math.ceil(num_steps / interval) == count else None


def _spread(num_steps: int, count: int, exponent: float) -> tuple[int, ...]:
    steps = [round(num_steps * (index / count) ** exponent) for index in range(count)]
    for index in range(1, count):
        steps[index] = max(steps[index], steps[index - 1] + 1)
    return tuple(min(step, num_steps - count + index) for index, step in enumerate(steps))


# How it goes on.

_Move = Callable[[tuple[int, ...], int], "tuple[int, ...] | None"]
"""(full steps, number of steps) -> other full steps, as many; None where the move cannot be made."""


def _moves(count: int) -> Iterator[_Move]:
    """All of them; those that help most often first."""
    for index in range(1, count):
        for shift in (1, -1):
            yield _shifted(index, count, shift)
    for shift in _SHIFTS:
        for index in range(1, count):
            yield _shifted(index, index + 1, shift)
    for dropped in range(1, count):
        for after in range(count):
            if after not in (dropped, dropped - 1):
                yield _relocated(dropped, after)


def _shifted(first: int, end: int, by: int) -> _Move:
    """The refreshes `first` to `end` - 1, earlier or later by so many steps."""

    def move(steps: tuple[int, ...], num_steps: int) -> tuple[int, ...] | None:
        low = steps[first - 1]
        high = steps[end] if end < len(steps) else num_steps
        moved = tuple(step + by for step in steps[first:end])
        return (*steps[:first], *moved, *steps[end:]) if low < moved[0] and moved[-1] < high else None

    return move


def _relocated(dropped: int, after: int) -> _Move:
    """One refresh dropped, and one added halfway between another and its successor, if that evens out the gaps."""

    def move(steps: tuple[int, ...], num_steps: int) -> tuple[int, ...] | None:
        ends = (*steps[1:], num_steps, num_steps)
        low, high = steps[after], ends[after]
        if high - low < max(2, ends[dropped] - steps[dropped - 1]):
            return None
        return tuple(sorted({*steps[:dropped], *steps[dropped + 1 :], (low + high) // 2}))

    return move


def _without_one(steps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The schedules with one refresh less that leave the shortest gaps; three of them."""
    ends = (*steps[1:], math.inf)
    gaps = sorted((ends[index] - steps[index - 1], index) for index in range(1, len(steps)))
    return [steps[:index] + steps[index + 1 :] for _, index in gaps[:3]]
