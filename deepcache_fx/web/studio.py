"""One optimised pipeline for all visitors: makes a picture, alone or beside the uncached one, and times each step.

To be called by one thread at a time (see `line`). Every run gets a scheduler and counters of its own; what is captured
and compiled is kept from visitor to visitor.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from deepcache_fx.api import __version__, optimize, report
from deepcache_fx.comparing import loading
from deepcache_fx.comparing.comparison import Comparison, UNetCalls
from deepcache_fx.comparing.job import Job, paused
from deepcache_fx.comparing.picture import to_images
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files.png_metadata import encode_png
from deepcache_fx.planning.plan import BranchPlan, plan
from deepcache_fx.runtime.attach import bring_back, pause, runtime_of
from deepcache_fx.runtime.runtime import Runtime
from deepcache_fx.schedules.branch import Branch
from deepcache_fx.schedules.schedule import Schedule, letters
from deepcache_fx.web.settings import Choices, Settings

Watch = Callable[[str, int, int], None]
"""Called as (stage, steps done, steps of the stage) at each step; ends the run by what it raises."""

PREPARING, UNCACHED, CACHED = "Preparing", "Without caching", "With caching"
"""The stages."""

_Programs: TypeAlias = tuple[Branch, Branch | None, object]
"""(branch, deeper branch, forecast)."""

PROGRAMS_KEPT = 2
"""Of how many combinations of branch, deeper branch and forecast: with OpenVINO each holds copies of the weights."""
CAPTURES_KEPT = 3
"""Of how many sizes, for each of them."""


@dataclass(frozen=True)
class Preview:
    """What a run is going to be."""

    letters: str
    """What each step is: F full, s shallow, t deeper."""
    bound: float
    """On the speed-up of the UNet, from its arithmetic."""


@dataclass(frozen=True)
class Run:
    """One run of the pipeline."""

    seconds: float
    """Of the whole pipeline, text encoder and decoder included."""
    step_seconds: tuple[float, ...]
    png: bytes
    """The picture, with its settings in it."""


@dataclass(frozen=True)
class Outcome:
    """What a visitor gets. Plain values alone: it is kept for the length of a visit."""

    settings: Settings
    cached: Run
    uncached: Run | None
    """None where nothing was compared."""
    letters: str
    """What each step was: F full, s shallow, t deeper."""
    bound: float
    """On the speed-up, from the arithmetic of the UNet."""
    speedup: float | None
    psnr: float | None
    """In dB; infinite where the pictures are equal."""
    ssim: float | None
    """NaN where the picture is too small for one."""
    remarks: tuple[str, ...]
    report: str
    preparation_seconds: float


@dataclass(frozen=True)
class _Prepare(Schedule):
    """Full, deeper, shallow: runs each program once. Another schedule than a visitor's, so that counters begin anew."""

    deeper: Branch | None

    def is_full(self, step: int, num_steps: int | None) -> bool:
        return step == 0

    def branch_at(self, step: int, num_steps: int | None) -> Branch | None:
        return self.deeper if step == 1 else None

    @property
    def branches(self) -> tuple[Branch, ...]:
        return () if self.deeper is None else (self.deeper,)


PREPARING_STEPS = 4
"""Enough for each program, and for the samplers that need a few steps."""


class Studio:
    """The pipeline, and what there is to choose of it.

    Args:
        pipe: A diffusers text-to-image pipeline with a UNet, on its device.
        name: What it is called on the page and in the pictures.
        backend: As of `optimize`.
        precision: As of `optimize`.

    Raises:
        DeepCacheError: the pipeline takes no prompt, or its UNet cannot be planned or has no skip connection.
    """

    def __init__(self, pipe: Any, *, name: str, backend: str = "auto", precision: str | None = None) -> None:
        self._pipe, self.name, self._backend, self._precision = pipe, name, backend, precision
        self._scheduler = pipe.scheduler
        Job(pipe, None, ("",), 1, 0, 1.0, {"height": 64, "width": 64}, None).check()
        self.branches: tuple[BranchPlan, ...] = plan(pipe).branches
        self.choices = Choices(_sizes(pipe), self._usable_schedulers(), len(self.branches))
        known = {class_name: short for short, class_name in loading.SCHEDULERS.items()}
        own = known.get(type(pipe.scheduler).__name__)
        self.own_scheduler = own if own in self.choices.schedulers else self.choices.schedulers[0]
        self._kept: OrderedDict[_Programs, Runtime] = OrderedDict()
        self._warm: set[object] = set()

    def preview(self, settings: Settings) -> Preview:
        """Which steps of a run are full, and what that can gain. Runs nothing.

        Raises:
            DeepCacheError: the sampler cannot make so many steps.
        """
        count = self._unet_steps(settings.scheduler, settings.steps)
        timetable = settings.timetable()
        full = timetable.full_steps(count)
        others = sorted(set(range(count)) - set(full))
        deeper = [step for step in others if timetable.branch_at(step, count) is not None]
        shallow = len(others) - len(deeper)
        cost = len(full) + shallow * self._share(settings.branch)
        cost += len(deeper) * self._share(settings.deeper) if deeper else 0.0
        return Preview(letters(full, deeper, count), count / cost)

    def _share(self, branch: int) -> float:
        """A shallow step's part of a full one's arithmetic, as `optimize` does it."""
        found = self.branches[branch]
        return found.hoisted.total / found.full.total

    def _unet_steps(self, scheduler: str, steps: int) -> int:
        """How many denoising steps the sampler makes of so many: PNDM one more, Heun about twice as many.

        Raises:
            DeepCacheError: the sampler cannot make so many.
        """
        try:
            made = self._new_scheduler(scheduler)
            made.set_timesteps(steps)
        except ValueError as error:
            raise DeepCacheError(str(error)) from error
        return len(made.timesteps)

    def make(self, settings: Settings, *, compare: bool, watch: Watch) -> Outcome:
        """A picture; with `compare`, the uncached one before it, from the same noise.

        Raises:
            DeepCacheError: in one sentence, what the pipeline, its sampler or `optimize` refuses.
        """
        with loading.one_line_errors("a smaller size"):
            return self._make(settings, compare, watch)

    def _make(self, settings: Settings, compare: bool, watch: Watch) -> Outcome:
        preparation = self._prepare(settings, compare, watch)
        uncached = pixels_before = None
        if compare:
            with paused((self._pipe,)):
                uncached, pixels_before = self._run(settings, UNCACHED, watch)
        before = report(self._pipe)
        cached, pixels = self._run(settings, CACHED, watch)
        after = report(self._pipe)
        calls = UNetCalls.between(before, after)
        found = Comparison(
            prompts=(settings.prompt,),
            steps=settings.steps,
            seed=settings.seed,
            baseline_seconds=((uncached or cached).seconds,),
            optimized_seconds=(cached.seconds,),
            preparation_seconds=preparation,
            calls=(calls,),
            reports=(after,),
            baseline_images=pixels if pixels_before is None else pixels_before,
            optimized_images=pixels,
        )
        return Outcome(
            settings=settings,
            cached=cached,
            uncached=uncached,
            letters=_by_step(after.last_run, len(cached.step_seconds)),
            bound=found.bound,
            speedup=found.speedup if compare else None,
            psnr=found.psnr if compare else None,
            ssim=found.ssim if compare else None,
            remarks=(*(found.doubts if compare else ()), *found.remarks),
            report=str(after),
            preparation_seconds=preparation,
        )

    def _prepare(self, settings: Settings, compare: bool, watch: Watch) -> float:
        """Attach the programs for these settings, made now if there are none, and used once. Returns the seconds."""
        timetable = settings.timetable()
        deeper = timetable.branches[0] if timetable.branches else None
        programs = (settings.branch, deeper, settings.order)
        arguments = {
            "branch": settings.branch,
            "forecast": settings.order,
            "backend": self._backend,
            "precision": self._precision,
            "max_captures": CAPTURES_KEPT,
        }
        started = time.perf_counter()
        self._pipe.scheduler = self._new_scheduler(settings.scheduler)
        known = self._kept.pop(programs, None)
        if known is None or runtime_of(self._pipe.unet) is not known:
            pause(self._pipe.unet)  # keeps its programs: `optimize` in its place would free them
            if known is not None:
                bring_back(self._pipe.unet, known)
        self._attach(programs, _Prepare(deeper), arguments)
        quick = replace(settings, steps=PREPARING_STEPS)
        guided = settings.guidance_scale > 1
        for wanted, key in ((True, (programs, settings.size, settings.scheduler, guided)), (compare, settings.size)):
            if wanted and key not in self._warm:
                with nullcontext() if isinstance(key, tuple) else paused((self._pipe,)):
                    self._run(quick, PREPARING, watch)
                self._warm.add(key)
        self._pipe.scheduler = self._new_scheduler(settings.scheduler)
        self._attach(programs, timetable, arguments)
        return time.perf_counter() - started

    def _attach(self, programs: _Programs, schedule: Schedule, arguments: Mapping[str, Any]) -> None:
        """Attach these programs, keep them for later visitors, and free those that were not used for longest."""
        optimize(self._pipe, schedule=schedule, **arguments)
        runtime = runtime_of(self._pipe.unet)
        assert runtime is not None
        self._kept[programs] = runtime
        while len(self._kept) > PROGRAMS_KEPT:
            gone, released = self._kept.popitem(last=False)
            released.release()
            self._warm = {key for key in self._warm if not (isinstance(key, tuple) and key[0] == gone)}

    def _run(self, settings: Settings, stage: str, watch: Watch) -> tuple[Run, torch.Tensor]:
        """One run with the caching that is attached now."""
        scheduler = self._new_scheduler(settings.scheduler)
        clock = _StepClock(scheduler, on_cuda=self._pipe.device.type == "cuda")
        self._pipe.scheduler = scheduler
        runtime = runtime_of(self._pipe.unet)
        if runtime is not None:
            runtime.follow_pipelines()

        def progress(_: str, done: int, total: int) -> None:
            if done:
                clock.tick()
            watch(stage, done, total)

        arguments: dict[str, Any] = {"height": settings.height, "width": settings.width}
        if settings.negative_prompt.strip():
            arguments["negative_prompt"] = [settings.negative_prompt]
        job = Job(
            self._pipe,
            None,
            (settings.prompt,),
            settings.steps,
            settings.seed,
            settings.guidance_scale,
            arguments,
            progress,
        )
        try:
            seconds, pixels = job.run(stage)
        finally:
            self._pipe.scheduler = self._scheduler
        described = {**settings.to_dict(), "model": self.name, "version": f"deepcache_fx {__version__}"}
        if stage == UNCACHED:
            described = {**described, "schedule": "uncached"}
        png = encode_png(to_images(pixels)[0], described)
        return Run(seconds, clock.seconds(), png), pixels

    def _new_scheduler(self, name: str) -> Any:
        return loading.make_scheduler(self._scheduler, name)

    def _usable_schedulers(self) -> tuple[str, ...]:
        """Those whose packages are installed, and which take this model's configuration."""
        found = []
        for name in loading.SCHEDULERS:
            try:
                self._new_scheduler(name).set_timesteps(PREPARING_STEPS)
            except (DeepCacheError, ValueError, ImportError):
                continue
            found.append(name)
        return tuple(found)


class _StepClock:
    """Times the steps of one run: from `scheduler.set_timesteps` on, which a pipeline calls just before its loop."""

    def __init__(self, scheduler: Any, *, on_cuda: bool) -> None:
        self._on_cuda = on_cuda
        self._marks: list[Any] = []

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = type(scheduler).set_timesteps(scheduler, *args, **kwargs)
            self._marks = [self._mark()]
            return result

        set_timesteps.__signature__ = inspect.signature(scheduler.set_timesteps)  # type: ignore[attr-defined]
        scheduler.set_timesteps = set_timesteps

    def tick(self) -> None:
        """A step is over."""
        self._marks.append(self._mark())

    def seconds(self) -> tuple[float, ...]:
        """Of each step. To be asked when the device is through with them."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._on_cuda:
            return tuple(before.elapsed_time(after) / 1000 for before, after in pairs)
        return tuple(after - before for before, after in pairs)

    def _mark(self) -> Any:
        """On CUDA an event, which nothing waits for."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _by_step(letters: str, steps: int) -> str:
    """One letter a step of a trace with one a UNet call: the first call's."""
    calls = max(1, len(letters) // steps) if steps else 1
    return letters[::calls]


def _sizes(pipe: Any) -> tuple[tuple[int, int], ...]:
    """(width, height): the model's own first, then half of it, upright, lying and larger ones that it takes."""
    scale = int(getattr(pipe, "vae_scale_factor", 8))
    sample = getattr(pipe.unet.config, "sample_size", None) or 64
    own = (sample if isinstance(sample, int) else sample[0]) * scale
    levels = len(getattr(pipe.unet.config, "block_out_channels", (0,) * 4)) - 1
    unit = max(8, scale << levels)

    def fitting(share: float) -> int:
        return max(unit, round(own * share / unit) * unit)

    shares = ((1, 1), (0.5, 0.5), (0.75, 1.25), (1.25, 0.75), (1.5, 1.5))
    return tuple(dict.fromkeys((fitting(w), fitting(h)) for w, h in shares))
