"""What the pipeline calls instead of the UNet's forward: follows the run, owns the caches, picks a variant."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from deepcache_fx import memory_format
from deepcache_fx.capture import CAPTURE_LOCK, Captured, capture, refuse_layerwise_offload
from deepcache_fx.compile import compile_variant, pick_backend
from deepcache_fx.config import Options
from deepcache_fx.cuda_graphs import RECORDERS, Recorder
from deepcache_fx.errors import DeepCacheError, ScheduleError, Uncapturable
from deepcache_fx.fingerprint import Fingerprint
from deepcache_fx.listing import Listings
from deepcache_fx.macs import total_macs
from deepcache_fx.only import Only
from deepcache_fx.programs import Called, DeepFeature, Programs, PromptStage, PromptValues, Values
from deepcache_fx.recorded import Recorded
from deepcache_fx.report import CaptureReport, Counts, Report
from deepcache_fx.side_effects import SideEffects
from deepcache_fx.signature import Call, CallReader, UnsupportedInput
from deepcache_fx.skips import find_skip_connections, pick_branch
from deepcache_fx.sources import sources_forgotten
from deepcache_fx.split import RATES, Variant, Variants, split
from deepcache_fx.steps import StepTracker, Tick, position_of, value_position
from passes import (
    Canonicalize,
    ChooseAttention,
    FoldConstants,
    FuseLinears,
    MergeEqual,
    Pass,
    PassError,
    PassRecord,
    pass_name,
    run_passes,
)

DEFAULT_PASSES: tuple[Pass, ...] = (Canonicalize(), FoldConstants(), MergeEqual())
"""Exact passes, in order, applied to the captured graph before the split."""

LAST_PASSES: tuple[Pass, ...] = (FuseLinears(), ChooseAttention())
"""Those of them that run on each variant's step: after the user's passes, which match the plain operators."""


@dataclass
class Entry:
    """One signature: its captured graph, split and compiled."""

    captured: Captured
    variants: Variants
    prompts: Mapping[str, PromptStage]
    """By variant, where it has such a stage."""
    programs: Programs
    passes: tuple[PassRecord, ...]
    inputs: str
    seconds: float


@dataclass
class Slot:
    """The deep feature of one UNet call of a step, the entry that made it, and the step it was last refreshed in."""

    entry: Entry
    feature: DeepFeature
    refreshed: int


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
        self.refreshed = 0
        self.prompts: dict[tuple[str, int], PromptValues] = {}
        self.trace: list[str] = []

    def forget(self) -> None:
        self.tracker.reset()
        self.clear()

    def clear(self) -> None:
        """Let go of what earlier steps left."""
        self.slots.clear()
        self.prompts.clear()

    def prompt(self, entry: Entry, variant: str, call: int, tensors: tuple[torch.Tensor, ...]) -> Values:
        """What the variant's steps need of the prompt: computed now, unless this call of an earlier step has."""
        stage = entry.prompts.get(variant)
        if stage is None:
            return ()
        values = self.prompts[variant, call] = stage(tensors, self.prompts.get((variant, call)))
        return values.values


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
        self.weights_format = memory_format.ChannelsLastWeights()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._recorders: dict[torch.device, Recorder] = {}
        self._fingerprint = Fingerprint()
        self._effects = SideEffects()
        self._state = ThreadState()

    def adopt(self, before: Runtime) -> None:
        """Take over the programs of a runtime whose options differ in the schedule alone."""
        self._entries, self._recorders, self._fingerprint = before._entries, before._recorders, before._fingerprint
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
        except Uncapturable as error:
            return self._original(str(error), module, args, kwargs)
        except BaseException:
            state.forget()
            raise

    def _step(self, state: ThreadState, module: torch.nn.Module, call: Call) -> Any:
        for watch in self._watches:
            watch()
        position = position_of(call.timestep)
        if call.timestep is not None and call.timestep.numel() and state.tracker.needs_value(position):
            self.counts.syncs += 1
            position = value_position(call.timestep)
        tick = state.tracker.observe(position, call.timestep, call.sample)
        if tick.new_run:
            state.clear()
            state.trace = []
            self._check_num_steps(module, tick)
        settings = self._settings(module, call, thorough=tick.new_run)
        entry = self._entry(module, call, settings)
        slot = state.slots.get(tick.call)
        forced = tick.doubt
        if slot is None or slot.refreshed != state.refreshed:
            forced = forced or "no cached feature for this call of the step"
        elif slot.entry is not entry:
            forced = forced or "inputs or settings changed within a run"
        wanted_full = tick.step == 0 or self.options.schedule.is_full(tick.step, tick.num_steps)
        if forced is not None and not wanted_full:
            self.counts.forced[forced] += 1
        if wanted_full or slot is None or forced is not None:
            if wanted_full and tick.call == 0:
                state.refreshed = tick.step  # a call that is missing from this step has no feature until the next
            before = slot.feature if self.options.forecast and slot is not None and slot.entry is entry else None
            state.slots.pop(tick.call, None)
            slot = None  # else the old feature would be moved out of the way of the new one
            prompt = state.prompt(entry, "full", tick.call, call.tensors)
            leaves, feature = entry.programs.full(tick.step, call.tensors, prompt, before)
            state.slots[tick.call] = Slot(entry, feature, state.refreshed)
            self.counts.full += 1
            state.trace.append("F")
        else:
            prompt = state.prompt(entry, "shallow", tick.call, call.tensors)
            leaves = entry.programs.shallow(tick.step, call.tensors, slot.feature, prompt)
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

    def _original(self, reason: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._state.forget()
        if reason not in self.counts.original:
            warnings.warn(f"{self.model_class.__name__} runs uncached: {reason}", stacklevel=5)
        self.counts.original[reason] += 1
        return self.model_class.forward(module, *args, **kwargs)

    # Capturing.

    def prepare(self, module: torch.nn.Module, call: Call) -> Entry:
        """Capture and split for calls like this one, ahead of the first."""
        return self._entry(module, call, self._settings(module, call, thorough=True))

    def _settings(self, module: torch.nn.Module, call: Call, *, thorough: bool) -> Hashable:
        """What a graph of the module bakes in, the strides of its weights among it: those are made to be fast first.

        Within a run settings alone are looked at; the layers and weights of PyTorch where `thorough` at its start.
        """
        known = self._fingerprint.known(module, thorough=thorough)
        if known is not None:
            return known
        device = call.sample.device
        if device.type in memory_format.DEVICE_TYPES and pick_backend(self.options, device) != "eager":
            self.weights_format.convert(module)
        return self._fingerprint.read(module)

    def _entry(self, module: torch.nn.Module, call: Call, settings: Hashable) -> Entry:
        """The programs for calls like this one, captured now if there are none yet."""
        key = (settings, call.key)
        entry = self._entries.get(key)
        if entry is None:
            dropped: list[Entry] = []
            with CAPTURE_LOCK:
                entry = self._entries.get(key)  # another thread may have been first
                if entry is None:
                    with sources_forgotten():
                        entry = self._make_entry(module, call)
                    dropped += self._drop_replaced_weights(module)
                    self._entries[key] = entry
                    while len(self._entries) > self.options.max_captures:
                        dropped.append(self._entries.popitem(last=False)[1])
            for old in dropped:  # not under the lock, which recorded programs take after their own
                old.programs.release()
        elif len(self._entries) > 1:
            with CAPTURE_LOCK:
                if key in self._entries:
                    self._entries.move_to_end(key)
        return entry

    def _drop_replaced_weights(self, module: torch.nn.Module) -> list[Entry]:
        """Programs over parameters that the module no longer has can never run again: let go of those."""
        live = {id(p) for p in module.parameters()}
        replaced = [
            key for key, e in self._entries.items() if any(id(p) not in live for p in e.captured.graph.parameters())
        ]
        return [self._entries.pop(key) for key in replaced]

    def _make_entry(self, module: torch.nn.Module, call: Call) -> Entry:
        started = time.perf_counter()
        device = call.sample.device
        try:
            refuse_layerwise_offload(module)
            objects = self._fingerprint.objects()
            self._effects.check(module, objects)
            with self._effects.watching(objects):
                captured = capture(module, call, self.reader, self.model_class)
            captured, records = apply_passes(captured, self.options)
            branches = find_skip_connections(captured.graph.graph)
            branch = pick_branch(branches, self.options.branch, self.model_class.__name__)
            rates = [name for name in RATES if self.options.uses(name)]
            variants = split(
                captured, branch, rates=rates, prompt_inputs=call.prompt_inputs, forecast=self.options.forecast
            )
            variants, more = finish(variants, self.options)
            programs = self._make_programs(variants, call)
        except Uncapturable:
            raise
        except DeepCacheError:
            if not self.counts.captures:
                self.on_first_failure(module)
            raise
        self.counts.captures += 1
        self.device = device
        inputs = ", ".join("x".join(map(str, t.shape)) or "scalar" for t in call.tensors)
        prompts = {"full": _prompt_stage(variants.full), "shallow": _prompt_stage(variants.shallow)}
        return Entry(
            captured,
            variants,
            {name: stage for name, stage in prompts.items() if stage is not None},
            programs,
            (*records, *more),
            inputs,
            time.perf_counter() - started,
        )

    def _make_programs(self, variants: Variants, call: Call) -> Programs:
        device = call.sample.device
        why_not = _why_not_recorded(self.options, call)
        called = Called(
            full_program=compile_variant(variants.full.step, self.options, device),
            shallow_program=compile_variant(variants.shallow.step, self.options, device),
            num_outputs=variants.num_outputs,
            order=self.options.forecast,
            why_not_recorded=why_not or "off",
        )
        if why_not is not None:
            return called
        recorder = self._recorders.get(device)
        if recorder is None:
            recorder = self._recorders[device] = RECORDERS[device.type](device)
        steps = {"full": variants.full.step, "shallow": variants.shallow.step}
        return Recorded(
            called,
            recorder,
            {name: (*graph.parameters(), *graph.buffers()) for name, graph in steps.items()},
            variants.cache,
            device,
        )

    def report(self) -> Report:
        """The totals so far, and the last run of the calling thread."""
        counts = self.counts
        signatures = tuple(
            CaptureReport(
                inputs=entry.inputs,
                branch=entry.variants.branch.index,
                block=entry.variants.branch.block,
                layer=entry.variants.branch.layer,
                full_macs=entry.variants.full.macs.total,
                shallow_macs=entry.variants.shallow.macs.total,
                prompt_macs=entry.variants.full.prompt_macs.total + entry.variants.shallow.prompt_macs.total,
                cache_bytes=entry.variants.cost.cache_bytes,
                plain_shallow_macs=entry.variants.plain.macs.total,
                plain_cache_bytes=entry.variants.plain.cache_bytes,
                capture_seconds=entry.seconds,
                passes=entry.passes,
                first_call_seconds=dict(entry.programs.first_call_seconds),
                cuda_graphs=entry.programs.cuda_graphs(),
                graphs=Listings(entry.variants),
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


def default_names() -> list[str]:
    """What `disable` takes: the default passes and the rates."""
    return [*map(pass_name, (*DEFAULT_PASSES, *LAST_PASSES)), *RATES]


def check_disabled(options: Options) -> None:
    """Raise a DeepCacheError where `disable` names neither a default pass nor a rate."""
    known = default_names()
    unknown = set(options.disable) - {*known, "all"}
    if unknown:
        raise DeepCacheError(
            f"disable names no default pass: {', '.join(sorted(unknown))}; there are: {', '.join(known)}"
        )


def apply_passes(captured: Captured, options: Options) -> tuple[Captured, tuple[PassRecord, ...]]:
    """Run the default passes that are not disabled, then the user's, on what was captured.

    Raises:
        DeepCacheError: a pass failed (named), or `disable` names no default pass.
    """
    check_disabled(options)
    first = [item for item in DEFAULT_PASSES if options.uses(pass_name(item))]
    own = [item for item in options.passes if not isinstance(item, Only)]
    try:
        graph, records = run_passes(captured.graph, (*first, *own))
    except PassError as error:
        raise DeepCacheError(str(error)) from error
    return captured.with_graph(graph), records


def finish(variants: Variants, options: Options) -> tuple[Variants, tuple[PassRecord, ...]]:
    """Run the user's passes for one variant alone, and the last default ones, on each variant's step.

    Raises:
        DeepCacheError: a pass failed (named).
    """
    last = [item for item in LAST_PASSES if options.uses(pass_name(item))]
    everything: list[PassRecord] = []
    steps: dict[str, Variant] = {}
    for name, variant in (("full", variants.full), ("shallow", variants.shallow)):
        own = [item.item for item in options.passes if isinstance(item, Only) and item.variant == name]
        try:
            step, records = run_passes(variant.step, (*own, *last))
        except PassError as error:
            raise DeepCacheError(f"{name} variant: {error}") from error
        steps[name] = replace(variant, step=step, macs=total_macs(step.graph.nodes))
        everything += [replace(record, name=f"{record.name} ({name})") for record in records]
    return replace(variants, full=steps["full"], shallow=steps["shallow"]), tuple(everything)


def _prompt_stage(variant: Variant) -> PromptStage | None:
    if variant.prompt is None:
        return None
    weights = (*variant.prompt.parameters(), *variant.prompt.buffers())
    return PromptStage(variant.prompt.forward, variant.prompt_inputs, weights)


def _why_not_recorded(options: Options, call: Call) -> str | None:
    """Why a call's programs are not to be recorded as CUDA graphs, or None."""
    device = call.sample.device
    if options.cuda_graphs is False:
        return "off: cuda_graphs=False"
    if device.type not in RECORDERS:
        return f"off: the model runs on {device}"
    if options.cuda_graphs == "auto" and pick_backend(options, device) == "eager":
        return "off: the backend is eager (cuda_graphs=True records it all the same)"
    elsewhere = [t.device for t in call.tensors if t.device != device]
    return f"off: an input lies on {elsewhere[0]}, the sample on {device}" if elsewhere else None


def _why_original(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why this call must run the model's own forward, or None."""
    if torch.compiler.is_compiling():
        return "called inside another compilation"
    if torch.is_grad_enabled():
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters()):
            return "gradients are enabled and required: call it under torch.no_grad()"
    return None
