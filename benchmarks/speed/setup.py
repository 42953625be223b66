"""Sets an arm up and measures what does not need repeating: compilation, kernels, host time, memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._inductor.utils import clear_caches

from benchmarks.environment import ROOT
from benchmarks.speed.arms import Arm, Prepared, all_arms
from benchmarks.speed.call_profile import CallProfiler
from benchmarks.speed.cases import Case, Quantiles
from benchmarks.speed.measure import HostTimer, memory, plainly, reset_peak, timed
from benchmarks.speed.pipelines import Stage
from benchmarks.speed.store import from_dict
from benchmarks.speed.subjects import Subject

HOST_REPEATS = 8


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 5
    minutes: float = 10.0
    """For one model at one size, set-up and compilation included. At least one round is made."""
    pipeline_rounds: int = 3
    end_to_end_rounds: int = 1
    """Rounds with the VAE; 0 leaves it out."""
    warm: bool = False
    """Set compiled arms up again in a new process, to see what that costs with the compilation caches on disk."""
    backend: str = "inductor"
    """Of torch.compile, wherever an arm compiles: the arms of that new process are made for it."""
    details: bool = True
    """Kernel counts, memory and host times."""


def set_up(arm: Arm, stage: Stage, interval: int, cache: Path, settings: Settings) -> tuple[Prepared, dict[str, Any]]:
    """The arm ready for its runs, and the facts about it, by their names in `Measured`.

    `cache` is where to make a directory for the compilation caches.
    """
    subject = stage.subject
    reset_peak(subject.device)
    before = memory(subject.device)
    interval = max(2, interval)  # the second step of a run is then a shallow one
    facts: dict[str, Any] = {"weight_bytes": subject.weight_bytes}
    prepared, facts["cold_seconds"] = _first_run(arm, stage, interval, cache)
    if settings.warm and arm.compiles:
        facts |= _in_a_new_process(subject.case, arm.name, interval, cache, settings.backend)
    if arm.compiles:  # a whole run, for whatever is still compiled on the way
        subject.denoise(prepared.unet, prepared.scheduler, subject.case.steps, plainly)
    if prepared.pipeline is not None:
        stage.run(prepared.pipeline, 2)
    if prepared.report is not None:
        signature = prepared.report().signatures[0]
        facts |= dict(
            capture_seconds=signature.capture_seconds,
            cache_bytes=signature.cache_bytes,
            macs_full=signature.full_macs,
            macs_shallow=signature.shallow_macs,
        )
    if settings.details:
        facts |= _inside(prepared, stage)
        if subject.device.type == "cuda":
            facts |= _host_times(prepared, stage, interval)
            reset_peak(subject.device)
            subject.denoise(prepared.unet, prepared.scheduler, 2, plainly)
            after = memory(subject.device)
            facts["peak_bytes"] = after.peak - before.allocated
            facts["reserved_bytes"] = after.reserved - before.reserved
    return prepared, facts


def _first_run(arm: Arm, stage: Stage, interval: int, cache: Path) -> tuple[Prepared, float]:
    """Set up, and make a full and (where the arm has them) a shallow step."""
    subject = stage.subject

    def first() -> Prepared:
        prepared = arm.prepare(stage, interval)
        subject.denoise(prepared.unet, prepared.scheduler, 2, plainly)
        return prepared

    with compilation_cache(cache):
        seconds, prepared = timed(first, subject.device)
    return prepared, seconds


def _in_a_new_process(case: Case, arm: str, interval: int, cache: Path, backend: str) -> dict[str, Any]:
    """The first run's seconds there. In this process the compiler would remember more than its caches on disk."""
    request = dict(case=dataclasses.asdict(case), arm=arm, interval=interval, cache=str(cache), backend=backend)
    command = [sys.executable, "-m", "benchmarks.speed.setup", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        last = next(reversed(done.stderr.strip().splitlines()), "no message")
        return dict(notes=(f"no warm start: exit code {done.returncode}, {last[:200]}",))
    return dict(warm_seconds=float(done.stdout.strip().splitlines()[-1]))


def _answer(request: str) -> float:
    """What a new process does."""
    asked = json.loads(request)
    arm = all_arms(asked["backend"])[asked["arm"]]
    stage = Stage(Subject(from_dict(Case, asked["case"])), decode=False)
    prepared, seconds = _first_run(arm, stage, asked["interval"], Path(asked["cache"]))
    prepared.close()
    return seconds


def _inside(prepared: Prepared, stage: Stage) -> dict[str, Any]:
    """What the profiler sees in a full and a shallow step."""
    subject = stage.subject
    profiler = CallProfiler(subject.device, (0, 1))
    subject.denoise(prepared.unet, prepared.scheduler, 2, profiler)
    full, second = profiler.profiles[0], profiler.profiles[1]
    facts: dict[str, Any] = dict(kernels_full=full.count, peak_bytes=full.peak_bytes)
    if subject.device.type == "cuda":
        facts["launches_full"] = full.launches
    if prepared.caches:
        facts["kernels_shallow"] = second.count
        if subject.device.type == "cuda":
            facts["launches_shallow"] = second.launches
    return facts


def _host_times(prepared: Prepared, stage: Stage, interval: int) -> dict[str, Any]:
    """Without the first interval: the first step of a run also looks whether the model has changed."""
    subject = stage.subject
    full: list[float] = []
    shallow: list[float] = []
    timer = HostTimer(subject.device)
    steps = HOST_REPEATS * interval
    subject.denoise(prepared.unet, prepared.scheduler, steps, timer)
    kinds = prepared.kinds(steps, interval)
    for kind, seconds in list(zip(kinds, timer.seconds, strict=True))[interval:]:
        (full if kind == "F" else shallow).append(seconds)
    return dict(host_full=Quantiles.of(full), host_shallow=Quantiles.of(shallow))


@contextmanager
def compilation_cache(path: Path) -> Iterator[None]:
    """Let Inductor and Triton keep what they compile in this directory, and forget what they keep in memory."""
    names = {"TORCHINDUCTOR_CACHE_DIR": str(path), "TRITON_CACHE_DIR": str(path / "triton")}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    clear_caches()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


if __name__ == "__main__":
    print(_answer(sys.argv[1]))
