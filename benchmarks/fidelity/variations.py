"""Arms beside the usual ones, run by name: what the library does not do, compared with what it does.

- *forecast-N-over-X*: the abscissa of the forecast is X instead of the number of the step.
- *forecast-N-of-features*: the deep feature is forecast, instead of what the refresh rate keeps of it.
- *adaptive*: the run itself decides when to refresh, by how much the model's output has changed since.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import deepcache_fx
from benchmarks.fidelity.setting import Arm, Setting, uniform_calls
from deepcache_fx.execution import programs
from deepcache_fx.graph.forecast import coefficients

ABSCISSAE = ("timestep", "sigma", "log-snr")
ADAPTIVE_ORDER = 1
ADAPTIVE_IMAGES = 16
ADAPTIVE_TRIALS = 8


def variations() -> Iterator[Arm]:
    """The arms of this module."""
    for order in (1, 2):
        for abscissa in ABSCISSAE:
            about = f"uniform 1:N, forecast of degree {order} over {abscissa}"
            yield Arm(f"forecast-{order}-over-{abscissa}", about, _over(abscissa, order), usual=False)
        about = f"uniform 1:N, the deep feature itself forecast, degree {order}"
        yield Arm(f"forecast-{order}-of-features", about, _of_features(order), usual=False)
    about = (
        f"forecast of degree {ADAPTIVE_ORDER}; full once the output has changed by a total found on other images to "
        "make about as many full steps as 1:N has (calls: of the last batch)"
    )
    yield Arm("adaptive", about, _adaptive, usual=False)


# Abscissae.


def positions(scheduler: Any, abscissa: str, steps: int) -> list[float]:
    """Where the steps of a run lie: on the axis of timesteps, of sigma = sqrt((1 - a) / a), or of log(a / (1 - a)).

    a is the cumulative product of alphas; between integer timesteps its log-SNR is interpolated.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    timesteps = [float(t) for t in scheduler.timesteps]
    if abscissa == "timestep":
        return timesteps
    alphas = scheduler.alphas_cumprod.double()
    table = torch.log(alphas / (1 - alphas)).tolist()
    ratios = [_interpolated(table, t) for t in timesteps]
    return ratios if abscissa == "log-snr" else [math.exp(-ratio / 2) for ratio in ratios]


def _interpolated(table: Sequence[float], place: float) -> float:
    low = min(int(place), len(table) - 2)
    return table[low] + (place - low) * (table[low + 1] - table[low])


def _over(abscissa: str, order: int) -> Callable[[Setting], AbstractContextManager[Any]]:
    @contextmanager
    def applied(setting: Setting) -> Iterator[None]:
        case, pipe = setting.case, setting.model.pipe
        places = positions(pipe.scheduler, abscissa, case.steps)

        def moved(step: int, refreshes: Sequence[int], order: int, degree: int | None = None) -> tuple[float, ...]:
            return coefficients(places[step], tuple(places[refresh] for refresh in refreshes), order, degree)

        with (
            mock.patch.object(programs, "coefficients", moved),
            deepcache_fx.optimized(pipe, interval=case.interval, branch=case.branch, forecast=order),
        ):
            yield

    return applied


def _of_features(order: int) -> Callable[[Setting], AbstractContextManager[Any]]:
    def applied(setting: Setting) -> AbstractContextManager[Any]:
        case = setting.case
        arguments: dict[str, Any] = dict(interval=case.interval, branch=case.branch, forecast=order)
        return deepcache_fx.optimized(setting.model.pipe, **arguments, disable=["refresh_rate"])

    return applied


# Adaptive.


@dataclass
class Drift:
    """A schedule: a step is full once the output has changed by `threshold` in all since the last full step.

    The change of a step is the mean absolute difference to the output before, over the mean absolute output before. It
    is known before the next step begins.
    """

    threshold: float
    _total: float = 0.0
    _before: torch.Tensor | None = field(default=None, repr=False)

    def __call__(self, step: int) -> bool:
        if step == 1:  # what was seen at step 0 compares it with another run
            self._total = 0.0
        full = self._total > self.threshold
        if full:
            self._total = 0.0
        return full

    def see(self, unet: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        now = output[0] if isinstance(output, tuple) else output.sample
        if self._before is not None and self._before.shape == now.shape:
            self._total += float((now - self._before).abs().mean() / self._before.abs().mean())
        self._before = now.clone()


@contextmanager
def _adaptive(setting: Setting) -> Iterator[None]:
    case, model = setting.case, setting.model
    drift = Drift(0.0)
    hook = model.pipe.unet.register_forward_hook(drift.see)
    wanted = uniform_calls(case.steps, case.interval).count("F")
    try:
        with deepcache_fx.optimized(model.pipe, branch=case.branch, schedule=drift, forecast=ADAPTIVE_ORDER):

            def full_steps(threshold: float) -> int:
                drift.threshold = threshold
                model.generate(range(ADAPTIVE_IMAGES), steps=case.steps, seed=case.seed + case.images)
                return deepcache_fx.report(model.pipe).last_run.count("F")

            drift.threshold = _closest(full_steps, wanted)
            yield
    finally:
        hook.remove()


def _closest(full_steps: Callable[[float], int], wanted: int) -> float:
    """The threshold at which there are as many full steps as wanted, or nearly; more full steps at smaller ones."""
    low, high = 0.0, 4.0
    found: list[tuple[int, float]] = []
    for _ in range(ADAPTIVE_TRIALS):
        middle = (low + high) / 2 if found else 0.25
        count = full_steps(middle)
        found.append((abs(count - wanted), middle))
        if count == wanted:
            break
        low, high = (middle, high) if count > wanted else (low, middle)
    return min(found)[1]
