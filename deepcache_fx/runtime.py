"""What the pipeline calls instead of the UNet's forward: follows the run, owns the caches, picks a variant."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deepcache_fx.capture import CAPTURE_LOCK, Captured, capture
from deepcache_fx.compile import Program, compile_variant, pick_backend
from deepcache_fx.config import Options
from deepcache_fx.errors import DeepCacheError, ScheduleError
from deepcache_fx.fingerprint import fingerprint
from deepcache_fx.report import CaptureReport, Counts, Report
from deepcache_fx.signature import Call, CallReader, UnsupportedInput
from deepcache_fx.split import Variants, find_skip_connections, pick_branch, split
from deepcache_fx.steps import StepTracker, Tick, position_of, value_position
from passes import Canonicalize, Pass, PassError, PassRecord, pass_name, run_passes

DEFAULT_PASSES = (Canonicalize(),)
"""Exact passes, in order, applied to the captured graph before the split."""


@dataclass
class Entry:
    """One signature: its captured graph, split and compiled."""

    captured: Captured
    variants: Variants
    full: Program
    shallow: Program
    passes: tuple[PassRecord, ...]
    inputs: str
    seconds: float
    first_call_seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Slot:
    """The cached values of one UNet call of a step, and the entry that made them."""

    entry: Entry
    cache: tuple[torch.Tensor, ...]


class Watch(Protocol):
    """Something that follows a pipeline's scheduler for a runtime (see `attach.SchedulerWatch`)."""

    def __call__(self) -> None: ...

    def pipeline(self) -> Any: ...

    def stop(self) -> None: ...


class ThreadState(threading.local):
    """One thread's run: never shared, so that no thread reads another's cache."""

    def __init__(self) -> None:
        self.tracker = StepTracker()
        self.slots: dict[int, Slot] = {}
        self.fingerprint: Hashable = None
        self.trace: list[str] = []

    def forget(self) -> None:
        self.tracker.reset()
        self.slots.clear()


class Runtime:
    """Runs one optimised module. Holds no reference to it: the module holds this."""

    def __init__(self, model_class: type[torch.nn.Module], options: Options) -> None:
        self.model_class = model_class
        self.options = options
        self.reader = CallReader(model_class.forward)
        self.counts = Counts()
        self.device: torch.device | None = None
        self.on_first_failure: Callable[[torch.nn.Module], object] = lambda module: None
        self._watches: list[Watch] = []
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._state = ThreadState()

    def adopt(self, before: Runtime) -> None:
        """Take over the programs of a runtime whose options differ in the schedule alone."""
        self._entries = before._entries
        self.counts.captures, self.device = before.counts.captures, before.device

    # What schedulers announce.

    def watch(self, watch: Watch) -> None:
        """Follow a pipeline's scheduler: `watch` is called before every UNet call."""
        self._watches = [known for known in self._watches if known.pipeline() is not None] + [watch]
        watch()

    def pipelines(self) -> list[Any]:
        """The living pipelines whose schedulers are followed."""
        return [pipeline for pipeline in (watch.pipeline() for watch in self._watches) if pipeline is not None]

    def stop_watching(self) -> None:
        """Until the next call."""
        for watch in self._watches:
            watch.stop()

    def run_announced(self, num_steps: int | None) -> None:
        self._state.tracker.run_announced(num_steps)

    def step_ended(self) -> None:
        self._state.tracker.step_ended()

    def reset(self) -> None:
        """Forget the current run of this thread."""
        self._state.forget()

    # The step path.

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        reason = _why_original(module, args, kwargs)
        if reason is not None:
            return self._original(reason, module, args, kwargs)
        try:
            call = self.reader.read(module, args, kwargs)
        except UnsupportedInput as error:
            return self._original(str(error), module, args, kwargs)
        state = self._state
        try:
            with torch.no_grad():
                return self._step(state, module, call)
        except BaseException:
            state.forget()
            raise

    def _step(self, state: ThreadState, module: torch.nn.Module, call: Call) -> Any:
        for watch in self._watches:
            watch()
        position = position_of(call.timestep)
        if call.timestep is not None and state.tracker.needs_value(position):
            self.counts.syncs += 1
            position = value_position(call.timestep)
        tick = state.tracker.observe(position, call.timestep, call.sample)
        if tick.new_run:
            state.slots.clear()
            state.trace = []
            settings = fingerprint(module)
            if settings != state.fingerprint:  # else the same object: then every look-up is quick
                state.fingerprint = settings
            self._check_num_steps(module, tick)
        entry = self.entry(module, call, state.fingerprint)
        slot = state.slots.get(tick.call)
        forced = tick.doubt
        if slot is None:
            forced = forced or "no cached feature for this call of the step"
        elif slot.entry is not entry:
            forced = forced or "inputs changed shape or type within a run"
        wanted_full = tick.step == 0 or self.options.schedule.is_full(tick.step, tick.num_steps)
        if forced is not None and not wanted_full:
            self.counts.forced[forced] += 1
        if wanted_full or slot is None or forced is not None:
            if wanted_full and tick.call == 0:
                state.slots.clear()  # a call that is missing from this step must not find its old feature later
            state.slots.pop(tick.call, None)
            leaves = self._run(entry, "full", entry.full, call.tensors)
            count = entry.variants.num_outputs
            state.slots[tick.call] = Slot(entry, tuple(leaves[count:]))
            leaves = leaves[:count]
            self.counts.full += 1
            state.trace.append("F")
        else:
            leaves = self._run(entry, "shallow", entry.shallow, (*call.tensors, *slot.cache))
            self.counts.shallow += 1
            state.trace.append("s")
        return entry.captured.outputs(leaves)

    def _check_num_steps(self, module: torch.nn.Module, tick: Tick) -> None:
        if tick.num_steps is None and self.options.schedule.needs_num_steps:
            if not self.counts.captures:
                self.on_first_failure(module)
            raise ScheduleError(
                f"{self.options.schedule} needs the number of denoising steps, and this call does not tell it: pass "
                "the pipeline instead of its UNet to optimize(), iterate over scheduler.timesteps, or use Uniform or "
                "Steps"
            )

    def _run(self, entry: Entry, name: str, program: Program, tensors: tuple[torch.Tensor, ...]) -> Any:
        if name in entry.first_call_seconds:
            return program(*tensors)
        with CAPTURE_LOCK:
            started = time.perf_counter()
            leaves = program(*tensors)
            entry.first_call_seconds[name] = time.perf_counter() - started
        return leaves

    def _original(self, reason: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._state.forget()
        if reason not in self.counts.original:
            warnings.warn(f"{self.model_class.__name__} runs uncached: {reason}", stacklevel=5)
        self.counts.original[reason] += 1
        return self.model_class.forward(module, *args, **kwargs)

    # Capturing.

    def entry(self, module: torch.nn.Module, call: Call, settings: Hashable) -> Entry:
        """The programs for calls like this one, captured now if there are none yet."""
        key = (settings, call.key)
        entry = self._entries.get(key)
        if entry is None:
            with CAPTURE_LOCK:
                entry = self._entries.get(key)  # another thread may have been first
                if entry is None:
                    entry = self._make_entry(module, call)
                    self._drop_replaced_weights(module)
                    self._entries[key] = entry
                    while len(self._entries) > self.options.max_captures:
                        self._entries.popitem(last=False)
        elif len(self._entries) > 1:
            with CAPTURE_LOCK:
                if key in self._entries:
                    self._entries.move_to_end(key)
        return entry

    def _drop_replaced_weights(self, module: torch.nn.Module) -> None:
        """Programs over parameters that the module no longer has can never run again: let go of those."""
        live = {id(p) for p in module.parameters()}
        for key, entry in list(self._entries.items()):
            if any(id(p) not in live for p in entry.captured.graph.parameters()):
                del self._entries[key]

    def _make_entry(self, module: torch.nn.Module, call: Call) -> Entry:
        started = time.perf_counter()
        try:
            captured = capture(module, call, self.reader, self.model_class)
            captured, records = apply_passes(captured, self.options)
            branches = find_skip_connections(captured.graph.graph)
            branch = pick_branch(branches, self.options.branch, self.model_class.__name__)
            variants = split(captured, branch)
            device = call.sample.device
            full = compile_variant(variants.full, self.options, device)
            shallow = compile_variant(variants.shallow, self.options, device)
        except DeepCacheError:
            if not self.counts.captures:
                self.on_first_failure(module)
            raise
        self.counts.captures += 1
        self.device = device
        inputs = ", ".join("x".join(map(str, t.shape)) or "scalar" for t in call.tensors)
        seconds = time.perf_counter() - started
        return Entry(captured, variants, full, shallow, records, inputs, seconds)

    def report(self) -> Report:
        """The totals so far, and the last run of the calling thread."""
        counts = self.counts
        signatures = tuple(
            CaptureReport(
                inputs=entry.inputs,
                branch=entry.variants.branch.index,
                block=entry.variants.branch.block,
                layer=entry.variants.branch.layer,
                full_macs=entry.variants.full_macs.total,
                shallow_macs=entry.variants.shallow_macs.total,
                cache_bytes=entry.variants.cache_bytes,
                capture_seconds=entry.seconds,
                passes=entry.passes,
                first_call_seconds=dict(entry.first_call_seconds),
            )
            for entry in tuple(self._entries.values())
        )
        backend = self.options.backend if self.device is None else pick_backend(self.options, self.device)
        return Report(
            model=self.model_class.__name__,
            schedule=str(self.options.schedule),
            backend=backend if isinstance(backend, str) else getattr(backend, "__name__", repr(backend)),
            captures=counts.captures,
            full_calls=counts.full,
            shallow_calls=counts.shallow,
            original_calls=sum(counts.original.values()),
            forced_full=dict(counts.forced),
            original_reasons=dict(counts.original),
            timestep_syncs=counts.syncs,
            last_run="".join(self._state.trace),
            signatures=signatures,
        )


def default_passes(options: Options) -> tuple[Pass, ...]:
    """The default passes that are not disabled.

    Raises:
        DeepCacheError: `disable` names no default pass.
    """
    known = [pass_name(item) for item in DEFAULT_PASSES]
    unknown = set(options.disable) - {*known, "all"}
    if unknown:
        raise DeepCacheError(
            f"disable names no default pass: {', '.join(sorted(unknown))}; there are: {', '.join(known)}"
        )
    return tuple(p for p in DEFAULT_PASSES if "all" not in options.disable and pass_name(p) not in options.disable)


def apply_passes(captured: Captured, options: Options) -> tuple[Captured, tuple[PassRecord, ...]]:
    """Run the default passes that are not disabled, then the user's.

    Raises:
        DeepCacheError: a pass failed (named), or `disable` names no default pass.
    """
    try:
        graph, records = run_passes(captured.graph, (*default_passes(options), *options.passes))
    except PassError as error:
        raise DeepCacheError(str(error)) from error
    return captured.with_graph(graph), records


def _why_original(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why this call must run the model's own forward, or None."""
    if torch.compiler.is_compiling():
        return "called inside another compilation"
    if torch.is_grad_enabled():
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters()):
            return "gradients are enabled and required: call it under torch.no_grad()"
    return None
