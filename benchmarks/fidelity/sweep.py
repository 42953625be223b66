"""Makes the images of every case, scores them, and hands out rows as it gets them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import deepcache_fx
from benchmarks.fidelity.cases import Case, Outcome, Row, RowsFile
from benchmarks.fidelity.clock import CallTimer
from benchmarks.fidelity.judges import Judge
from benchmarks.fidelity.metrics import PairDistance
from benchmarks.fidelity.models import Model, UNetCost
from benchmarks.fidelity.setting import Arm, Setting
from benchmarks.speed.cases import Quantiles
from benchmarks.speed.runner import describe
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.runtime import SHALLOW_LETTERS

LARGE = 64 * 64 * 3
"""Values in an image above which uncached images are kept in half precision: 5,000 of 512x512 take 8 GB then."""

Advance = Callable[[Case, int], None]
"""Told after every batch: the case, and how many images are done."""


def batches(images: int, most: int) -> list[range]:
    """The images by number, in as few batches as `most` allows, as even as can be."""
    count = -(-images // most)
    edges = [round(images * i / count) for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


class ImageStore:
    """Uncached images on disk, batch by batch: what the other arms are compared with, also after a resume."""

    def __init__(self, directory: Path, group: Case) -> None:
        self.directory = directory / group.key.replace("/", "-").replace(" ", "-")

    def has(self, parts: Sequence[range]) -> bool:
        return all(self._path(part).exists() for part in parts)

    def put(self, part: range, images: torch.Tensor) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        save_file({"images": kept(images).contiguous()}, self._path(part))

    def get(self, part: range) -> torch.Tensor:
        return load_file(self._path(part))["images"].float()

    def _path(self, part: range) -> Path:
        return self.directory / f"{part.start}-{part.stop}.safetensors"


def kept(images: torch.Tensor) -> torch.Tensor:
    """What is kept of images: all of small ones, half precision of large ones."""
    return images if images[0].numel() <= LARGE else images.half()


@dataclass
class Times:
    """Seconds of UNet calls for one image, by kind."""

    calls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def add(self, kinds: str, seconds: Sequence[float], count: int) -> None:
        """The calls of one batch. The first of a kind and batch size pays for capture or compilation: left out."""
        for kind, duration in zip(kinds, seconds, strict=True):
            if (kind, count) in self._seen:
                self.calls[kind].append(duration / count)
            self._seen.add((kind, count))

    def quantiles(self, kind: str) -> Quantiles | None:
        return Quantiles.of(self.calls.get(kind, []))


@dataclass
class Sweep:
    """The cases of one model, judged by one judge."""

    model: Model
    judge: Judge
    arms: dict[str, Arm]
    file: RowsFile
    facts: dict[str, Any]
    batch: int
    work: Path
    lpips: Any = None
    advance: Advance = lambda case, done: None
    _costs: dict[int, UNetCost] = field(default_factory=dict)

    def missing(self, cases: Sequence[Case]) -> list[Case]:
        """Those there are no rows of yet; the uncached one too where its images are gone and others need them."""
        found = [case for case in cases if not self.file.done(case)]
        group = cases[0].group
        has = ImageStore(self.work, group).has(batches(group.images, self.batch))
        return [group, *found] if found and found[0] != group and not has else found

    def run(self, *groups: Sequence[Case]) -> None:
        """Cases by their groups; each row is in the file when its images are judged.

        Those whose programs differ in nothing come after one another and share a capture: with a few images of few
        steps the captures would take longer than the images.
        """
        missing = [case for cases in groups for case in self.missing(cases)]
        for case in missing:
            if case.branch not in self._costs:
                self._costs[case.branch] = self.model.cost(case.branch)
        timer = CallTimer(self.model.device)  # one for all: a hook that changes makes for another capture
        with timer.attached(self.model.pipe.unet):
            for shared, cases in itertools.groupby(sorted(missing, key=self._programs), self._programs):
                with self._captured_once(*shared):
                    for case in cases:
                        self.file.put(self._row(case, timer))

    def _programs(self, case: Case) -> tuple[int, int]:
        """(order of the forecast, branch); order -1 where there are none, or none to share: these come first."""
        order = self.arms[case.arm].order
        return (-1 if order is None else order), case.branch

    def _captured_once(self, order: int, branch: int) -> AbstractContextManager[Any]:
        """What is captured in the with block stays until its end."""
        if order < 0:
            return nullcontext()
        return deepcache_fx.optimized(self.model.pipe, interval=1, branch=branch, forecast=order)

    def _row(self, case: Case, timer: CallTimer) -> Row:
        arm = self.arms[case.arm]
        setting = Setting(self.model, case, self._costs[case.branch], self.work / "calibrated")
        try:
            self.model.use_sampler(case.sampler)
            outcome = self._measure(arm, setting, timer)
        except DeepCacheError as error:
            return Row(case, "absent", describe(error), environment=self.facts)
        except (ValueError, RuntimeError, IndexError) as error:  # what schedulers raise at one or two steps
            if case == case.group:
                raise
            return Row(case, "failed", describe(error), environment=self.facts)
        return Row(case, "measured", outcome=outcome, environment=self.facts)

    def _measure(self, arm: Arm, setting: Setting, timer: CallTimer) -> Outcome:
        model, case, cost = self.model, setting.case, setting.cost
        store = ImageStore(self.work, case.group)
        reference = self.file.rows.get(case.group.key)
        parts = batches(case.images, self.batch)
        tally, pairs, times = self.judge.start(), PairDistance(self.lpips), Times()
        kinds, notes = "", list(self.judge.notes)
        per_image, once = {"F": cost.full, "s": cost.shallow}, 0.0
        with arm.applied(setting):
            steps = arm.steps(setting)
            timer.take()  # a calibration has run the UNet
            for part in parts:
                images = model.generate(part, steps=steps, seed=case.seed)
                seconds = timer.take()
                kinds = arm.calls(setting, "F" * len(seconds))
                if arm.cached:
                    report = deepcache_fx.report(model.pipe)
                    kinds = report.last_run
                    counted = report.signatures[-1]  # the one used last
                    macs = [counted.full_macs, *(cut.shallow_macs for cut in counted.cuts)]
                    per_image = {
                        kind: each / len(part) for kind, each in zip("F" + SHALLOW_LETTERS, macs, strict=False)
                    }
                    once = counted.prompt_macs / len(part)
                times.add(kinds, seconds, len(part))
                if case == case.group:
                    store.put(part, images)
                else:
                    pairs.add(kept(images).float(), store.get(part))
                tally.add(images, part)
                self.advance(case, part.stop)
            if arm.cached:
                report = deepcache_fx.report(model.pipe)
                reasons = {**report.forced_full, **report.original_reasons}
                notes += [f"{count} calls not as scheduled: {reason}" for reason, count in reasons.items()]
        scores = tally.scores()
        if case != case.group:
            found = pairs.result()
            scores = replace(scores, **dataclasses.asdict(found))
        uncached_calls = len(reference.outcome.calls) if reference and reference.outcome else len(kinds)
        total = sum(map(per_image.__getitem__, kinds)) + once
        durations = {kind: times.quantiles(kind) for kind in set(kinds)} if arm.timed else {}
        taken, full = total_seconds(kinds, durations), durations.get("F")
        return Outcome(
            calls=kinds,
            macs=total,
            macs_share=total / (uncached_calls * cost.full),
            scores=scores,
            seconds=taken,
            full_call=full,
            shallow_call=durations.get("s"),
            time_share=taken / (uncached_calls * full.median) if taken is not None and full is not None else None,
            notes=tuple(notes),
        )


def total_seconds(kinds: str, durations: Mapping[str, Quantiles | None]) -> float | None:
    """Of a run with these calls, from the median call of each kind; None where a kind has no time."""
    medians = [time.median for kind in kinds if (time := durations.get(kind)) is not None]
    return sum(medians) if len(medians) == len(kinds) else None


def groups(base: Case, samplers: Sequence[str], steps: Sequence[int]) -> Iterator[Case]:
    """The uncached cases of every sampler at every number of steps."""
    for sampler in samplers:
        for count in steps:
            yield replace(base, sampler=sampler, steps=count)
