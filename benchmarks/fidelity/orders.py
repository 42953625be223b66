"""Which order of the forecast is closest to the uncached images, sampler by sampler and by kind of sampler."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.cases import Case, Row
from benchmarks.fidelity.samplers import SAMPLERS, title
from benchmarks.fidelity.targets import PUBLISHED, find, psnr

ORDERS = (1, 2)
"""Compared with order 0, which is repeating."""
INTERVALS = (2, 3, 5, 10)

ABOUT_ORDERS = """\
How many dB closer to the uncached images *forecast-1* and *forecast-2* are than *repeat*, which is order 0: the closest
of the three is bold, and where neither is, repeating is closest (or none is by 0.1 dB). By kind of sampler it is the
median over models and samplers, and in brackets in how many of them *forecast-1* is closer than *repeat*.

- Deterministic samplers: order 1 is closer than order 0 in every row, also at 8 steps. Order 2 is mostly closer still
  with *ddpm*, and mostly farther than order 1 with *t2i*.
- Deterministic samplers whose steps are spaced unevenly (Karras sigmas): order 1 from 20 steps on, order 0 at 8. A
  forecast over the timestep instead of the number of the step is farther at 8 steps with both models, and at 20 closer
  with one and farther with the other (*forecast-1-over-timestep*).
- Samplers that draw noise at their steps: order 0 with *ddpm*, where order 1 is 0.9 dB farther on average (2.8 at
  most); a draw with *t2i* (0.1 dB closer on average, from 1.3 farther to 2.9 closer). Order 1 does best with DPM++
  SDE at 50 steps, which are 99 calls of the UNet. Order 2 is farther nearly everywhere, by up to 7.3 dB.
- LCM: order 0, by up to 7.7 dB. TCD draws noise in the *ddpm* pipeline, which leaves eta at 0.3; the pipeline of Stable
  Diffusion passes eta 0, and then order 1 is closer as for any deterministic sampler.

Where nothing is clipped (*t2i*), Euler ancestral and DDPM are one and the same sampler, with equal rows."""


def gain(rows: Sequence[Row], order: int, interval: int) -> float | None:
    """How many dB closer to the uncached images a forecast of this order is than repeating; None where unknown."""
    mine, theirs = psnr(find(rows, f"forecast-{order}", interval)), psnr(find(rows, PUBLISHED, interval))
    return None if mine is None or theirs is None else mine - theirs


def kind(group: Case) -> str:
    """Of the sampler, as far as it may matter to a forecast over the number of the step."""
    sampler = SAMPLERS.get(group.sampler)
    if sampler is None:
        return "unknown"
    if sampler.consistency:
        return "consistency"
    if sampler.draws:
        return "draws noise"
    return "deterministic, uneven steps" if sampler.settings.get("use_karras_sigmas") else "deterministic"


def each_sampler(groups: Mapping[Case, Sequence[Row]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table: per group and interval how many dB order 1 and order 2 are closer than order 0; the best is bold."""
    lines = []
    for group, rows in groups.items():
        cells = [_cell({order: gain(rows, order, interval) for order in ORDERS}) for interval in INTERVALS]
        if any(cells):
            lines.append((group.model, title(group.sampler), kind(group), str(group.steps), str(group.images), *cells))
    return ("model", "sampler", "kind", "steps", "images", *(f"N={n}" for n in INTERVALS)), lines


def _cell(gains: Mapping[int, float | None]) -> str:
    """The order that is closest is bold; where none is, repeating is, or none is closer by 0.1 dB."""
    if gains[1] is None:
        return ""
    best = -max((round(value, 1), -order) for order, value in {0: 0.0, **gains}.items() if value is not None)[1]
    texts = ["-" if value is None else f"{value:+.1f}" for value in gains.values()]
    return ", ".join(f"**{text}**" if order == best else text for order, text in zip(gains, texts, strict=True))


def each_kind(groups: Mapping[Case, Sequence[Row]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table: the same by kind of sampler and number of steps, the median over models and samplers.

    A model and a sampler count once: as they came out with the most images.
    """
    best: dict[tuple[str, str, int, int, int], tuple[int, str, float]] = {}
    for group, rows in groups.items():
        for order, interval in itertools.product(ORDERS, INTERVALS):
            value, place = gain(rows, order, interval), (group.model, group.sampler, group.steps, order, interval)
            if value is not None and (place not in best or best[place][0] < group.images):
                best[place] = group.images, kind(group), value
    found: defaultdict[tuple[str, int], defaultdict[tuple[int, int], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for (_, _, steps, order, interval), (_, name, value) in best.items():
        found[name, steps][order, interval].append(value)
    lines = []
    for (name, steps), gains in sorted(found.items()):
        cells = [
            _cell({order: _median(gains[order, interval]) for order in ORDERS}) + _closer(gains[1, interval])
            for interval in INTERVALS
        ]
        lines.append((name, str(steps), *cells))
    return ("kind", "steps", *(f"N={n}" for n in INTERVALS)), lines


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _closer(values: Sequence[float]) -> str:
    """In how many of the groups order 1 is closer than repeating."""
    return f" ({sum(value > 0 for value in values)} of {len(values)})" if values else ""
