"""Which order of the forecast is closest to the uncached images, by kind of sampler."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.cases import Case, Row
from benchmarks.fidelity.samplers import SAMPLERS
from benchmarks.fidelity.targets import PUBLISHED, find, psnr

ORDERS = (1, 2)
"""Compared with order 0, which is repeating."""
INTERVALS = (2, 3, 5, 10)

ABOUT_ORDERS = """\
A shallow step reads the cached feature. Order 0 repeats that of the last full step (*repeat*), order 1 takes the line
through the last two (*forecast-1*), order 2 the parabola through the last three (*forecast-2*). The table tells by how
many dB *forecast-1*, *forecast-2* are closer to the uncached images than *repeat*: the median over models and samplers,
and in brackets in how many of them *forecast-1* is closer. The closest order is bold. Where none is, it is order 0, or
none is closer by 0.1 dB.

- Deterministic samplers: order 1 is closer than order 0 in every row. Order 2 is mostly closer still with *ddpm*, and
  mostly farther than order 1 with *t2i*.
- With unevenly spaced steps (Karras sigmas): order 1 from 20 steps on, order 0 at 8.
- Samplers that draw noise: order 0 with *ddpm*; with *t2i* orders 0 and 1 are 0.1 dB apart on average.
- LCM: order 0, by up to 7.7 dB.
- Forecasts over the timestep, sigma or the log-SNR instead of the number of the step (arms *forecast-1-over-...*) are
  not closer than *forecast-1*, but for the timestep with *ddpm* at 20 steps of Karras sigmas.

`forecast="auto"` follows from this: order 1, but order 0 in runs whose scheduler is seen to draw noise, and in runs of
at most 8 steps of very different lengths."""


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
