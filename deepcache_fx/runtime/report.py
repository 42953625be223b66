"""What happened: captures, steps, and why a step was full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from passes import PassRecord


@dataclass(frozen=True)
class CutReport:
    """A skip connection that shallow steps begin at."""

    branch: int
    block: int
    layer: int
    shallow_macs: int
    cache_bytes: int
    """Of one refresh, for one UNet call of a step."""
    plain_shallow_macs: int
    plain_cache_bytes: int
    """What the shallow step would compute and read, were the deep feature cached as it is."""

    def line(self, full_macs: int, refreshes: int) -> str:
        """For a reader."""
        share = self.shallow_macs / full_macs if full_macs else 1.0
        text = (
            f"branch {self.branch} (block {self.block}, layer {self.layer}): shallow {self.shallow_macs / 1e9:.3g} "
            f"GMAC ({share:.1%}), cache {f'{refreshes} x ' * (refreshes > 1)}{self.cache_bytes / 2**20:.2f} MiB"
        )
        if (self.shallow_macs, self.cache_bytes) == (self.plain_shallow_macs, self.plain_cache_bytes):
            return text
        plain = f"{self.plain_shallow_macs / 1e9:.3g} GMAC and {self.plain_cache_bytes / 2**20:.2f} MiB"
        return f"{text}; {plain} before the rates were separated"


@dataclass(frozen=True)
class CaptureReport:
    """One captured signature."""

    inputs: str
    full_macs: int
    prompt_macs: int
    """Computed once per prompt, for all variants."""
    cuts: tuple[CutReport, ...]
    """From the shallowest; most schedules have one."""
    refreshes: int
    """How many refreshes of each cache are kept: one more than the order of the forecast."""
    capture_seconds: float
    """Capture, passes and split. Compilation by OpenVINO happens here, any other at the first calls."""
    passes: tuple[PassRecord, ...]
    first_call_seconds: dict[str, float]
    """Per variant, the duration of its first call: compilation or check, recording and one step."""
    backend: str = "eager"
    """That its programs run by."""
    precision: str | None = None
    """Of arithmetic that is not PyTorch's: "fp32" or "bf16". None: in the types that the model has."""
    precision_error: float | None = None
    """Relative L2 error of the first full step in that arithmetic, against the same graph run by PyTorch."""
    source: str | None = None
    """The directory that its programs were loaded from; None where they were captured."""
    cuda_graphs: str = "off"
    """Whether its steps are replays of recorded CUDA graphs, or why not."""
    graphs: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Its variants as readable Python, written when asked for (see `listing`)."""

    @property
    def branch(self) -> int:
        """Of the shallowest cut."""
        return self.cuts[0].branch

    @property
    def shallow_macs(self) -> int:
        """Of the shallowest cut."""
        return self.cuts[0].shallow_macs

    @property
    def cache_bytes(self) -> int:
        """Of all refreshes that are kept of all cuts, for one UNet call of a step."""
        return self.refreshes * sum(cut.cache_bytes for cut in self.cuts)

    def mean_shallow_macs(self, calls_by_branch: Mapping[int, int]) -> int:
        """Of so many shallow calls by branch; of the shallowest cut where there are none."""
        macs = {cut.branch: cut.shallow_macs for cut in self.cuts}
        calls = {branch: count for branch, count in calls_by_branch.items() if branch in macs and count}
        if not calls:
            return self.shallow_macs
        return round(sum(macs[branch] * count for branch, count in calls.items()) / sum(calls.values()))


@dataclass(frozen=True)
class ControlNetCapture:
    """One captured signature of a ControlNet."""

    inputs: str
    full_macs: int
    shallow_macs: int | None
    """None until there has been a shallow call."""
    prompt_macs: int
    """Computed once per prompt and picture."""
    residuals: int
    shallow_residuals: int | None
    """How many of them a shallow call computes."""
    capture_seconds: float
    passes: tuple[PassRecord, ...]
    cuda_graphs: str


@dataclass(frozen=True)
class ControlNetReport:
    """A pipeline's ControlNet, which runs with the UNet's schedule."""

    model: str
    captures: int = 0
    rebound: int = 0
    """How often what was captured went on with other weights."""
    full_calls: int = 0
    shallow_calls: int = 0
    completed_calls: int = 0
    """Shallow calls whose other residuals were asked for after all, and computed then."""
    original_calls: int = 0
    """Calls that went to the model's own forward."""
    kept_full: dict[str, int] = field(default_factory=dict)
    """Calls that computed everything although the UNet's step was going to be shallow, by reason."""
    original_reasons: dict[str, int] = field(default_factory=dict)
    last_run: str = ""
    """The last run of this thread, a letter a call: F full, s shallow, c shallow and then completed."""
    last_run_macs: int = 0
    last_run_macs_saved: int = 0
    """What it would have computed else, less what it did."""
    signatures: tuple[ControlNetCapture, ...] = ()
    refused: str | None = None
    """Why it was left alone."""

    def lines(self) -> list[str]:
        """For a reader."""
        if self.refused is not None:
            return [f"  {self.model} is left as it is: {self.refused}"]
        lines = [
            f"  {self.model}: {self.full_calls + self.shallow_calls} calls: {self.full_calls} full, "
            f"{self.shallow_calls} shallow ({self.completed_calls} completed later); {self.original_calls} more by its "
            "own forward",
        ]
        if self.last_run:
            total = self.last_run_macs + self.last_run_macs_saved
            lines.append(
                f"    last run: {self.last_run}, {self.last_run_macs / 1e9:.3g} GMAC instead of {total / 1e9:.3g} "
                f"({self.last_run_macs_saved / total if total else 0:.1%} saved)"
            )
        if self.rebound:
            lines.append(f"    other weights {self.rebound} times, without a capture")
        for title, reasons in (("kept full", self.kept_full), ("own forward", self.original_reasons)):
            lines += [f"    {title}: {count} x {reason}" for reason, count in reasons.items()]
        for item in self.signatures:
            shallow = (
                "no shallow call yet"
                if item.shallow_macs is None
                else f"shallow {item.shallow_macs / 1e9:.3g} ({item.shallow_residuals} of {item.residuals} residuals)"
            )
            lines.append(
                f"    captured {item.inputs} in {item.capture_seconds:.1f} s: full {item.full_macs / 1e9:.3g} GMAC, "
                f"{shallow}, {item.prompt_macs / 1e9:.3g} once per prompt and picture"
            )
            lines += [f"      {record}" for record in item.passes]
            lines.append(f"      CUDA graphs: {item.cuda_graphs}")
        return lines


@dataclass(frozen=True)
class Report:
    """What `report(target)` returns; print() it, or read the fields."""

    model: str
    schedule: str
    backend: str
    captures: int
    """Captures ever made; more than there are signatures means that something was evicted or a setting changed."""
    full_calls: int
    shallow_calls: int
    original_calls: int
    """Calls that went to the model's own forward, uncached."""
    forced_full: dict[str, int]
    """Steps that were full although the schedule said shallow, by reason."""
    original_reasons: dict[str, int]
    timestep_syncs: int
    """Steps at which the timestep's value had to be read back from a device."""
    last_run: str
    """The last run of this thread, a letter a UNet call: F full, s shallow, t, u, ... at deeper cuts."""
    last_forecast: str = ""
    """The order of the last run's forecast, and why it was taken."""
    calls_by_branch: dict[int, int] = field(default_factory=dict)
    """Of the shallow calls."""
    signatures: tuple[CaptureReport, ...] = ()
    companions: tuple[ControlNetReport, ...] = ()
    """The ControlNets of the pipelines that were optimised."""
    rebound: int = 0
    """How often what was captured went on with other weights, without a capture."""
    sizes: tuple[str, ...] = ()
    """What became of `dynamic`: which sizes one capture serves, or why each is captured by itself."""
    preset: str | None = None
    """What `optimize(preset=)` chose, and where it comes from; None where none was given."""

    @property
    def capture_seconds(self) -> float:
        return sum(s.capture_seconds for s in self.signatures)

    @property
    def precision(self) -> str | None:
        """Of arithmetic that is not PyTorch's: "fp32" or "bf16". None: in the types that the model has."""
        found = {item.precision for item in self.signatures} - {None}
        return "bf16" if "bf16" in found else next(iter(found), None)

    @property
    def precision_error(self) -> float | None:
        """Of the first full steps in that arithmetic, the largest relative L2 error against PyTorch."""
        return max((item.precision_error for item in self.signatures if item.precision_error is not None), default=None)

    @property
    def cache_bytes(self) -> int:
        return sum(s.cache_bytes for s in self.signatures)

    @property
    def engaged(self) -> bool:
        """True where at least one shallow step ran."""
        return self.shallow_calls > 0

    @property
    def graphs(self) -> tuple[Mapping[str, str], ...]:
        """Per signature, what runs as readable Python: "full", "shallow", "shallow_3" at branch 3, "full_prompt"."""
        return tuple(item.graphs for item in self.signatures)

    def to_dict(self, *, graphs: bool = False) -> dict[str, Any]:
        """Plain values, ready for JSON; `graphs` adds the text of every graph, which is long."""
        bare = replace(self, signatures=tuple(replace(item, graphs={}) for item in self.signatures))
        values = {
            **asdict(bare),
            "engaged": self.engaged,
            "precision": self.precision,
            "precision_error": self.precision_error,
        }
        values["calls_by_branch"] = {str(branch): calls for branch, calls in self.calls_by_branch.items()}
        for item, listed in zip(values["signatures"], self.graphs, strict=True):
            if graphs:
                item["graphs"] = dict(listed)
            else:
                del item["graphs"]
        return values

    def _arithmetic(self) -> str:
        if self.precision is None or self.precision_error is None:
            return "" if self.precision is None else f" in {self.precision}"
        return f" in {self.precision} (error of the first full step: {self.precision_error:.1e})"

    def __str__(self) -> str:
        calls = self.full_calls + self.shallow_calls
        lines = [
            f"{self.model}: {self.schedule}, backend {self.backend}{self._arithmetic()}",
            f"  {calls} calls: {self.full_calls} full, {self.shallow_calls} shallow; "
            f"{self.original_calls} more uncached",
        ]
        if self.preset is not None:
            lines.append(f"  preset: {self.preset}")
        if calls and not self.engaged:
            lines.append("  the shallow variant never ran: nothing was saved")
        if self.last_run:
            lines.append(f"  last run: {self.last_run}; forecast of order {self.last_forecast}")
        for title, reasons in (("forced full", self.forced_full), ("uncached", self.original_reasons)):
            lines += [f"  {title}: {count} x {reason}" for reason, count in reasons.items()]
        if self.rebound:
            lines.append(f"  other weights {self.rebound} times, without a capture")
        lines += [f"  {line}" for line in self.sizes]
        if self.timestep_syncs:
            lines.append(
                f"  timestep read back from the device {self.timestep_syncs} times: pass the pipeline to optimize"
            )
        if len(self.calls_by_branch) > 1:
            parts = (f"{count} at branch {branch}" for branch, count in self.calls_by_branch.items())
            lines.append(f"  shallow calls: {', '.join(parts)}")
        for item in self.signatures:
            origin = "captured" if item.source is None else f"loaded from {item.source}:"
            lines.append(
                f"  {origin} {item.inputs} in {item.capture_seconds:.1f} s: full {item.full_macs / 1e9:.3g} GMAC, "
                f"{item.prompt_macs / 1e9:.3g} once per prompt"
            )
            lines += [f"    {cut.line(item.full_macs, item.refreshes)}" for cut in item.cuts]
            lines += [f"    {record}" for record in item.passes]
            for name, seconds in item.first_call_seconds.items():
                lines.append(f"    first {name} call: {seconds:.2f} s")
            lines.append(f"    CUDA graphs: {item.cuda_graphs}")
        for controlnet in self.companions:
            lines += controlnet.lines()
        return "\n".join(lines)


@dataclass
class Counts:
    """The running totals behind a report."""

    full: int = 0
    shallow: int = 0
    syncs: int = 0
    by_cut: Counter[int] = field(default_factory=Counter)
    """Shallow calls by the number of the skip connection."""
    forced: Counter[str] = field(default_factory=Counter)
    original: Counter[str] = field(default_factory=Counter)
