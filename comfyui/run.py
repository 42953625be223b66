"""One run of a sampler, by the sampler's own account: which of its evaluations are full."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from deepcache_fx import Schedule

DRAW_NOISE = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")
"""Parts of the names of ComfyUI's samplers that draw noise in every step."""

_UNEVEN = 2.0
"""As in deepcache_fx: steps are uneven where the longest is this many times the shortest, the last one apart."""


def draws_noise(sampler: object) -> bool:
    """Whether a sampler of ComfyUI draws noise at its steps; true for one that does not tell its function."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return True
    given = getattr(sampler, "extra_options", None) or {}
    if any(isinstance(given.get(name), (int, float)) and given[name] > 0 for name in ("eta", "s_churn")):
        return True
    name = str(getattr(function, "__name__", ""))
    return any(part in name for part in DRAW_NOISE) and given.get("eta") != 0


FEW_STEPS = 8
"""As in deepcache_fx: up to so many uneven steps are not forecast."""


def are_uneven(timesteps: Sequence[float]) -> bool:
    """Whether the moves from one timestep to the next are of very different lengths, the last one apart."""
    moves = [abs(after - before) for before, after in pairwise(timesteps) if after != before][:-1]
    return len(moves) > 1 and max(moves) > _UNEVEN * min(moves)


@dataclass
class Run:
    """What is known of a run, and how far it is.

    Without `schedule` every `interval`-th evaluation of the model is full: a second-order sampler makes two in a step.
    With one, it says so of the sampler's steps, and of those that are full the first evaluation is.
    """

    interval: int
    sigmas: tuple[float, ...]
    high: float = math.inf
    low: float = 0.0
    """Between these sigmas features are reused; outside of them every evaluation is full."""
    schedule: Schedule | None = None
    may_forecast: bool = True
    is_full: bool = True
    """Whether the present evaluation is full."""
    evaluations: int = 0
    bypassed: Counter[str] = field(default_factory=Counter)
    """Calls that ran uncached, by reason."""
    refusal: str | None = None
    """Why the rest of the run is uncached."""

    @property
    def num_steps(self) -> int:
        return max(len(self.sigmas) - 1, 1)

    @property
    def needs_sigma(self) -> bool:
        """Whether an evaluation must say its sigma: on a device that means to wait for it."""
        return self.schedule is not None or self.low > 0.0 or self.high < self.sigmas[0]

    def evaluation_begins(self, sigma: float | None) -> None:
        """Decide on the next evaluation. `sigma` is None where it is not needed.

        Raises:
            ScheduleError: the schedule is for runs of another length.
        """
        self._since_full += 1
        is_outside = sigma is not None and not self.low <= sigma <= self.high
        if self.schedule is None or sigma is None:
            is_due = self._since_full >= self.interval
        else:
            step = self._step_at(sigma)
            is_due = step != self._step and self.schedule.is_full(step, self.num_steps)
            self._step = step
        self.is_full = self.evaluations == 0 or is_outside or is_due
        if self.is_full:
            self._since_full = 0
        self.evaluations += 1

    def _step_at(self, sigma: float) -> int:
        """The step that begins at this sigma, or went on to it."""
        above = sum(known > sigma * (1 + 1e-4) for known in self.sigmas[:-1])
        return min(above, self.num_steps - 1)

    _since_full: int = -1
    _step: int | None = None
