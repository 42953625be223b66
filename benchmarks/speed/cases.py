"""What is measured: cases, results, and the numbers derived from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One measurement: a model at a size, on a device, run in one way."""

    model: str
    height: int
    width: int
    """Of the latents (of the image, for a model without a VAE)."""
    batch: int
    """Images or videos at a time; with classifier-free guidance the UNet sees twice as many."""
    dtype: str
    device: str
    steps: int
    interval: int
    """1:N caching; 1 for an arm that caches nothing."""
    branch: int
    arm: str

    @property
    def group(self) -> tuple[object, ...]:
        """Everything but the arm and the interval: the cases whose times may be compared."""
        return (self.model, self.height, self.width, self.batch, self.dtype, self.device, self.steps, self.branch)

    @property
    def key(self) -> str:
        """Equal for equal cases; what a resumed run goes by."""
        return "/".join(str(value) for value in dataclasses.astuple(self))


@dataclass(frozen=True)
class Quantiles:
    """Of repeated measurements of one quantity: median, 20 % and 80 % quantile, and how many there were."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Quantiles | None:
        """None where there are no samples."""
        if not samples:
            return None
        low, median, high = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)))
        return Quantiles(median, low, high, len(samples))


@dataclass(frozen=True)
class Measured:
    """What was measured in one case. Seconds and bytes; None where it was not measured."""

    rounds: int = 0
    """Rounds of all arms in turn that the times come from."""
    kinds: str = ""
    """The UNet calls of one run: F full, s shallow. Its length is the number of steps really taken."""
    loop: Quantiles | None = None
    """A run of the denoising loop around the bare UNet: guidance and scheduler, no pipeline class."""
    pipeline: Quantiles | None = None
    """The same through the real pipeline class, up to the latents."""
    end_to_end: Quantiles | None = None
    """With the VAE's decoder. Prompt embeddings are given: no text encoder runs."""
    eager_loop: Quantiles | None = None
    eager_pipeline: Quantiles | None = None
    eager_end_to_end: Quantiles | None = None
    """The plain model in the same rounds, with all steps: what speed-ups are ratios to."""
    full_step: Quantiles | None = None
    shallow_step: Quantiles | None = None
    """One UNet call within the loop."""
    host_full: Quantiles | None = None
    host_shallow: Quantiles | None = None
    """From the call of the UNet to its return, on an idle device (CUDA only: on a CPU that is the step itself)."""
    kernels_full: int | None = None
    kernels_shallow: int | None = None
    """Device kernels of one UNet call; on a CPU, ATen operators that no other operator called."""
    launches_full: int | None = None
    launches_shallow: int | None = None
    """Launches by the host; a CUDA graph is one."""
    capture_seconds: float | None = None
    cold_seconds: float | None = None
    """The first run, of two steps, with empty compilation caches: tracing, compiling, both steps."""
    warm_seconds: float | None = None
    """The same in a new process, with the caches of the first on disk (without its imports)."""
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    """Allocated above the weights at the worst moment of a run, what the arm keeps in between included."""
    reserved_bytes: int | None = None
    """Growth of the CUDA allocator's reserve, which the private pools of CUDA graphs are part of."""
    cache_bytes: int | None = None
    macs_full: int | None = None
    macs_shallow: int | None = None
    """Multiply-accumulates of this arm's own graphs, where it has graphs."""
    error: float | None = None
    """|x - eager| / |eager| of the final latents (L2 norms), from the same noise, eager with all its steps."""
    error_helper: float | None = None
    """The same against DeepCacheSDHelper at the same interval and branch."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What the model's own graphs have to do at least, and this device's measured rates."""

    macs_full: int
    macs_shallow: int
    bytes_full: int
    bytes_shallow: int
    """Operands and results of the contractions, each once: all else could be fused into them."""
    floor_full: float
    floor_shallow: float
    """Roofline: the sum over contractions of max(MACs / matrix rate, bytes / copy rate), in seconds."""
    macs_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Derived:
    """Numbers that follow from measured ones."""

    bound: float | None = None
    """The speed-up if time were MACs: all steps full over the steps as they were."""
    over_eager: float | None = None
    over_itself: float | None = None
    """Over the same arm if its every step were full; this is what the bound bounds."""
    bound_reached: float | None = None
    """over_itself / bound."""
    pipeline_over_eager: float | None = None
    end_to_end_over_eager: float | None = None
    shallow_share: float | None = None
    """Time of a shallow step over that of a full one."""
    macs_share: float | None = None
    floor_distance: float | None = None
    """Time of the shallow step (the full one, in an arm without) over its roofline floor."""


@dataclass(frozen=True)
class Result:
    """One row of a results file."""

    case: Case
    status: str
    """measured | partial (rounds are missing) | absent (does not apply) | left out (no time) | failed."""
    reason: str = ""
    """Why there are no numbers."""
    measured: Measured = field(default_factory=Measured)
    work: Work | None = None
    derived: Derived = field(default_factory=Derived)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """True where a resumed run need not try again."""
        return self.status in ("measured", "absent")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; fields that are None are left out."""
        plain: dict[str, Any] = _without_none(dataclasses.asdict(self))
        return plain


def derive(case: Case, measured: Measured, work: Work | None) -> Derived:
    """The numbers that follow from one row's own."""
    full, shallow = measured.kinds.count("F"), measured.kinds.count("s")
    share = bound = itself = distance = None
    if work is not None:
        share = work.macs_shallow / work.macs_full
        bound = case.steps / (full + shallow * share) if full else None
    times = (measured.full_step, measured.shallow_step)
    if measured.full_step is not None and (measured.shallow_step is not None or not shallow):
        taken = full * measured.full_step.median
        taken += shallow * measured.shallow_step.median if measured.shallow_step is not None else 0.0
        itself = case.steps * measured.full_step.median / taken
    if work is not None and times[1] is not None:
        distance = times[1].median / work.floor_shallow
    elif work is not None and times[0] is not None:
        distance = times[0].median / work.floor_full
    return Derived(
        bound=bound,
        over_eager=_ratio(measured.eager_loop, measured.loop),
        over_itself=itself,
        bound_reached=itself / bound if itself is not None and bound is not None else None,
        pipeline_over_eager=_ratio(measured.eager_pipeline, measured.pipeline),
        end_to_end_over_eager=_ratio(measured.eager_end_to_end, measured.end_to_end),
        shallow_share=_ratio(*reversed(times)),
        macs_share=share,
        floor_distance=distance,
    )


def over(result: Result, other: Result | None) -> float | None:
    """Speed-up of the loop over another arm's. Each is taken relative to eager in its own rounds: drift cancels."""
    if other is None or not result.derived.over_eager or not other.derived.over_eager:
        return None
    return result.derived.over_eager / other.derived.over_eager


def _ratio(above: Quantiles | None, below: Quantiles | None) -> float | None:
    return above.median / below.median if above is not None and below is not None else None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
