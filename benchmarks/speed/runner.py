"""Measures the arms of one model at one size, all in one process and in turn, and hands out rows as it gets them."""

from __future__ import annotations

import gc
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.arms import Arm, Prepared
from benchmarks.speed.cases import Case, Measured, Quantiles, Result, Work, derive
from benchmarks.speed.measure import StepTimer, reset_peak, timed
from benchmarks.speed.pipelines import Stage
from benchmarks.speed.roofline import count_work, measure_rates
from benchmarks.speed.setup import Settings, set_up
from benchmarks.speed.subjects import Subject

SETUP_SHARE = 0.7
"""Of the time allowed: no new arm is set up after it, so that those that were can be measured."""

Put = Callable[[list[Result]], None]
Note = Callable[[str], None]


@dataclass
class Row:
    """A case while it is being measured."""

    case: Case
    prepared: Prepared
    steps: int
    facts: dict[str, Any]
    wanted: bool = True
    """False for what others are compared with or run, where it is only measured along."""
    loop: list[float] = field(default_factory=list)
    pipeline: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    shallow: list[float] = field(default_factory=list)
    latents: torch.Tensor | None = None
    kinds: str = ""
    failure: str = ""


class Group:
    """The cases of one model at one size: arms set up side by side over the same weights."""

    def __init__(self, arms: Mapping[str, Arm], settings: Settings, environment: dict[str, Any], put: Put) -> None:
        self.arms = arms
        self.settings = settings
        self.environment = environment
        self.put = put
        self.rows: list[Row] = []

    def run(self, cases: Sequence[Case], note: Note = lambda text: None) -> None:
        """Measure cases that differ in arm and interval alone. What they are compared with is measured along."""
        self.started = time.perf_counter()
        self.device = torch.device(cases[0].device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._run(cases, note)

    def _run(self, cases: Sequence[Case], note: Note) -> None:
        case = cases[0]
        note("building the model")
        subject = Subject(case)
        self.stage = Stage(subject, decode=self.settings.end_to_end_rounds > 0)
        self.work = count_work(subject, case.branch, measure_rates(case.device, case.dtype))
        bases = {self.arms[c.arm].same_as for c in cases} | {"eager"}
        try:
            with tempfile.TemporaryDirectory() as caches:
                for name, arm in self.arms.items():
                    own = [c for c in cases if c.arm == name]
                    if own or name in bases:
                        note(f"setting up {name}")
                        own_or_along = own or [replace(case, arm=name, interval=1)]
                        self._add(arm, own_or_along, Path(caches), wanted=bool(own))
                self._rounds(note)
        finally:
            self._close()

    # Setting up.

    def _add(self, arm: Arm, cases: list[Case], caches: Path, wanted: bool) -> None:
        cases = self._applicable(arm, cases)
        if not cases:
            return
        if self.rows and self._minutes() > SETUP_SHARE * self.settings.minutes:
            self._give_up(cases, "left out", f"no time left of {self.settings.minutes:g} minutes")
            return
        if arm.same_as is not None:
            base = next((row for row in self.rows if row.case.arm == arm.same_as), None)
            if base is None:
                self._give_up(cases, "left out", f"needs the arm {arm.same_as} in the same run")
                return
            prepared, facts = base.prepared, base.facts
        else:
            try:
                prepared, facts = set_up(arm, self.stage, cases[0].interval, caches / arm.name, self.settings)
            except Exception as error:  # whatever an arm raises is its result
                self._give_up(cases, "failed", describe(error))
                return
        for case in cases:
            steps = case.steps if arm.same_as is None else equal_macs_steps(case.steps, case.interval, self.work)
            row = Row(case, prepared, steps, facts, wanted)
            self.rows.append(row)
            self._store([row], "partial")

    def _applicable(self, arm: Arm, cases: list[Case]) -> list[Case]:
        """The cases this arm applies to; the others get a row that says why it does not."""
        result: list[Case] = []
        for case in cases:
            refusal = arm.refuse(case)
            if refusal is None:
                result.append(case)
            else:
                self._give_up([case], "absent", refusal)
        return result

    # Measuring.

    def _rounds(self, note: Note) -> None:
        last = 0.0
        for number in range(self.settings.rounds):
            started = self._minutes()
            if number and started + last > self.settings.minutes:
                break
            for row in self.rows if number % 2 == 0 else self.rows[::-1]:
                if not row.failure:
                    note(f"round {number + 1}: {row.case.arm} 1:{row.case.interval}")
                    self._measure(row, number)
                    self._store([row], "partial")
            last = self._minutes() - started
        self._store(self.rows, "measured")

    def _measure(self, row: Row, number: int) -> None:
        prepared, subject, settings = row.prepared, self.stage.subject, self.settings
        timer = StepTimer(self.device)
        try:
            prepared.set_interval(row.case.interval)
            seconds, latents = timed(
                lambda: subject.denoise(prepared.unet, prepared.scheduler, row.steps, timer), self.device
            )
            if not bool(torch.isfinite(latents).all()):
                raise ArithmeticError("the run gave NaN or infinity")
            row.kinds = prepared.kinds(row.steps, row.case.interval)
            row.latents = latents.float().cpu()
            row.loop.append(seconds)
            for kind, step in zip(row.kinds, timer.seconds(), strict=True):
                (row.full if kind == "F" else row.shallow).append(step)
            if prepared.pipeline is not None and number < settings.pipeline_rounds:
                row.pipeline.append(self._timed_pipeline(row, decode=False))
            if prepared.pipeline is not None and number < settings.end_to_end_rounds and self.stage.decodes:
                row.end_to_end.append(self._timed_pipeline(row, decode=True))
        except Exception as error:  # whatever an arm raises is its result
            row.failure = describe(error)

    def _timed_pipeline(self, row: Row, decode: bool) -> float:
        return timed(lambda: self.stage.run(row.prepared.pipeline, row.steps, decode), self.device)[0]

    def _minutes(self) -> float:
        return (time.perf_counter() - self.started) / 60

    # Rows.

    def _store(self, rows: list[Row], status: str) -> None:
        results = [self.result(row, status) for row in rows if row.wanted]
        if results:
            self.put(results)

    def _give_up(self, cases: list[Case], status: str, reason: str) -> None:
        self.put([Result(case, status, reason, work=self.work, environment=self.environment) for case in cases])

    def result(self, row: Row, status: str) -> Result:
        """The row as it stands."""
        eager = self._find("eager", 1)
        helper = self._find("helper", row.case.interval)
        measured = Measured(
            **{**row.facts, "notes": (*row.facts.get("notes", ()), *row.prepared.notes())},
            rounds=len(row.loop),
            kinds=row.kinds,
            loop=Quantiles.of(row.loop),
            pipeline=Quantiles.of(row.pipeline),
            end_to_end=Quantiles.of(row.end_to_end),
            eager_loop=Quantiles.of(eager.loop) if eager else None,
            eager_pipeline=Quantiles.of(eager.pipeline) if eager else None,
            eager_end_to_end=Quantiles.of(eager.end_to_end) if eager else None,
            full_step=Quantiles.of(row.full),
            shallow_step=Quantiles.of(row.shallow),
            error=distance(row.latents, eager.latents) if eager else None,
            error_helper=distance(row.latents, helper.latents) if helper and row.prepared.caches else None,
        )
        status = "failed" if row.failure else status
        derived = derive(row.case, measured, self.work)
        return Result(row.case, status, row.failure, measured, self.work, derived, self.environment)

    def _find(self, arm: str, interval: int) -> Row | None:
        return next((r for r in self.rows if (r.case.arm, r.case.interval) == (arm, interval)), None)

    def _close(self) -> None:
        for prepared in {id(row.prepared): row.prepared for row in self.rows}.values():
            prepared.close()
        self.rows.clear()
        torch._dynamo.reset()
        gc.collect()
        reset_peak(self.device)


def equal_macs_steps(steps: int, interval: int, work: Work) -> int:
    """How many full steps have the MACs of a run of `steps` cached 1:`interval` (rounded, at least one)."""
    full = -(-steps // interval)
    return max(1, round(full + (steps - full) * work.macs_shallow / work.macs_full))


def distance(latents: torch.Tensor | None, reference: torch.Tensor | None) -> float | None:
    """|latents - reference| / |reference|, L2 norms in float64."""
    if latents is None or reference is None:
        return None
    return float((latents - reference).double().norm() / reference.double().norm())


def describe(error: BaseException) -> str:
    """Type and first line of the message, without the directories of this machine."""
    first = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"(?<![\w.])/\S*/", "", f"{type(error).__name__}: {first}")[:300]
