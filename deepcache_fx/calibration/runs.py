"""Run a pipeline by one schedule after another, and tell how far its outcome is from the uncached one."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deepcache_fx.api import optimize, report, restore
from deepcache_fx.calibration.search import Candidate
from deepcache_fx.errors import DeepCacheError, OptionError
from deepcache_fx.runtime.attach import bring_back, pause, runtime_of
from deepcache_fx.runtime.report import Report
from deepcache_fx.runtime.runtime import Runtime
from deepcache_fx.schedules.branch import Branch
from deepcache_fx.schedules.patterns import Custom, Nested, Steps
from deepcache_fx.schedules.schedule import Schedule

METRICS = {"latents": "latent", "images": "pt"}
"""What is compared, and the `output_type` that asks a pipeline for it."""


@dataclass(frozen=True)
class Measured:
    """What one captured run tells of the model: UNet steps in a run, multiply-accumulates of a step."""

    num_steps: int
    full_macs: int
    shallow_macs: int
    deeper_macs: int = 0
    """Of a step that begins at the deeper skip connection; 0 where there is none."""

    def cost(self, full_steps: int, deeper_steps: int = 0) -> float:
        """Of a run with so many full and deeper steps, a share of the uncached one."""
        shallow = (self.num_steps - full_steps - deeper_steps) * self.shallow_macs + deeper_steps * self.deeper_macs
        return (full_steps * self.full_macs + shallow) / (self.num_steps * self.full_macs)

    @property
    def exchange(self) -> float:
        """How many deeper steps, in place of shallow ones, cost what a full one does in place of a shallow one."""
        return (self.full_macs - self.shallow_macs) / max(1, self.deeper_macs - self.shallow_macs)


@dataclass(frozen=True)
class Job:
    """The images that schedules are judged by."""

    pipe: Any
    prompts: tuple[str, ...] | int
    """Or how many images, of a pipeline that takes no prompt."""
    steps: int
    seed: int
    metric: str
    batch_size: int
    call_arguments: Mapping[str, Any]

    @property
    def count(self) -> int:
        """How many images."""
        return self.prompts if isinstance(self.prompts, int) else len(self.prompts)

    def check(self) -> None:
        """Raise a DeepCacheError where the pipeline does not take what will be passed."""
        ours = {"num_inference_steps", "generator", "output_type"} | (
            set() if isinstance(self.prompts, int) else {"prompt"}
        )
        taken = sorted(ours & self.call_arguments.keys())
        if taken:
            raise OptionError(f"calibrate sets {', '.join(taken)} itself: use prompts, steps, seed and metric")
        name = type(self.pipe).__name__
        missing = sorted((ours | self.call_arguments.keys()) - self._parameters())
        if missing:
            hint = "; pass the number of images instead of prompts" if "prompt" in missing else ""
            raise OptionError(f"{name} does not take {', '.join(missing)}{hint}")

    def batches(self) -> list[range]:
        return [range(at, min(at + self.batch_size, self.count)) for at in range(0, self.count, self.batch_size)]

    def run(self, batch: range) -> torch.Tensor:
        """(images, values), float64 on the CPU. Image i begins with the noise of seed + i."""
        arguments = dict(self.call_arguments)
        if not isinstance(self.prompts, int):
            arguments["prompt"] = [self.prompts[index] for index in batch]
        elif "batch_size" in self._parameters():
            arguments.setdefault("batch_size", len(batch))
        output = self.pipe(
            num_inference_steps=self.steps,
            generator=[torch.Generator().manual_seed(self.seed + index) for index in batch],
            output_type=METRICS[self.metric],
            **arguments,
        )[0]
        if not isinstance(output, (torch.Tensor, np.ndarray)) or len(output) != len(batch):
            kind = f"{len(output)} images" if hasattr(output, "__len__") else type(output).__name__
            raise DeepCacheError(f"{type(self.pipe).__name__} was asked for {len(batch)} tensors and returned {kind}")
        return torch.as_tensor(output).detach().double().cpu().flatten(1)

    def _parameters(self) -> set[str]:
        return set(inspect.signature(type(self.pipe).__call__).parameters)


class Runs:
    """Judges candidates by running them. What is captured for an order of the forecast is kept for the next one."""

    def __init__(
        self, job: Job, branch: Branch, optimize_arguments: Mapping[str, Any], deeper: Branch | None = None
    ) -> None:
        self._job = job
        self._deeper = deeper
        self._arguments = {**optimize_arguments, "branch": branch}
        self._runtimes: dict[int, Runtime] = {}
        self._uncached: list[torch.Tensor] | None = None

    def measure(self, order: int) -> Measured:
        """Capture, and run the first batch with every step full."""
        last = 0

        def full(step: int, num_steps: int | None) -> bool:
            nonlocal last
            last = max(last, step)
            return True

        found = self._run(self._nested(Custom(full)), order, self._job.batches()[0])[1]
        signature = min((s for s in found.signatures if s.full_macs), key=lambda s: s.shallow_macs / s.full_macs)
        shallow, *deeper = (cut.shallow_macs for cut in signature.cuts)
        return Measured(last + 1, signature.full_macs, shallow, *deeper)

    def _nested(self, schedule: Schedule, deeper: Sequence[int] = ()) -> Schedule:
        return schedule if self._deeper is None else Nested(schedule, {self._deeper: Steps(deeper)})

    def error(self, candidate: Candidate, limit: float) -> tuple[float, int]:
        """Mean relative L2 distance to the uncached outcome, and how many images were made.

        Fewer than all where it exceeds `limit` already: the mean is then at least what is returned. Infinite where the
        outcome is not finite.
        """
        reference = self._reference()
        total, made = 0.0, 0
        for batch, expected in zip(self._job.batches(), reference, strict=True):
            schedule = self._nested(Steps(candidate.steps), candidate.deeper)
            values, _ = self._run(schedule, candidate.forecast, batch)
            size = expected.norm(dim=1)
            distance = (values - expected).norm(dim=1) / torch.where(size > 0, size, 1.0)
            total += float(distance.sum())
            made += len(batch)
            if math.isnan(total) or total / self._job.count > limit:
                break
        error = total / self._job.count
        return (error, made) if math.isfinite(error) else (math.inf, made)

    def _reference(self) -> list[torch.Tensor]:
        if self._uncached is None:
            pause(self._job.pipe.unet)
            uncached = [self._job.run(batch) for batch in self._job.batches()]
            if not all(bool(values.isfinite().all()) for values in uncached):
                raise DeepCacheError("the uncached run gives values that are not finite: try another dtype")
            self._uncached = uncached
        return self._uncached

    def _run(self, schedule: Schedule, order: int, batch: range) -> tuple[torch.Tensor, Report]:
        pipe = self._job.pipe
        known, attached = self._runtimes.get(order), runtime_of(pipe.unet)
        if known is not attached:
            pause(pipe.unet)
            if known is not None:
                bring_back(pipe.unet, known)
        optimize(pipe, schedule=schedule, forecast=order, **self._arguments)
        runtime = runtime_of(pipe.unet)
        assert runtime is not None, "optimize attaches one"
        self._runtimes[order] = runtime
        values = self._job.run(batch)
        found = report(pipe)
        elsewise = [f"{count} calls forced full: {reason}" for reason, count in found.forced_full.items()]
        elsewise += [f"{count} calls uncached: {reason}" for reason, count in found.original_reasons.items()]
        if elsewise:
            raise DeepCacheError(f"this pipeline does not follow a schedule: {'; '.join(elsewise)}")
        return values, found

    def close(self) -> None:
        """Give back what was made for the runs."""
        pause(self._job.pipe.unet)
        for runtime in self._runtimes.values():
            runtime.release()


@contextmanager
def left_as_found(pipe: Any) -> Iterator[None]:
    """The pipeline not optimised and without its own progress bar; afterwards as it was."""
    unet = pipe.unet
    before, bar = runtime_of(unet), pipe.__dict__.get("_progress_bar_config")
    pause(unet)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**{**(bar or {}), "disable": True})
    try:
        yield
    finally:
        restore(pipe)
        if before is not None:
            bring_back(unet, before)
        pipe.__dict__.pop("_progress_bar_config", None)
        if bar is not None:
            pipe._progress_bar_config = bar


def weights_digest(module: torch.nn.Module) -> str:
    """Equal for equal weights: of every one the shape, the type and sixteen values."""
    digest = hashlib.sha256()
    for name, value in module.named_parameters():
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def argument_digest(value: Any) -> Any:
    """A call argument as JSON can hold it; tensors, arrays and pictures by their contents."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double().cpu().numpy()
    if hasattr(value, "tobytes"):
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        return f"{type(value).__name__} {shape} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(key): argument_digest(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [argument_digest(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
