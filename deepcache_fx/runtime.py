"""What the pipeline calls instead of the UNet's forward: follows the run, owns the caches, picks a variant."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from deepcache_fx.assemble import Entry, ToLayOut, assemble
from deepcache_fx.branch import Branch
from deepcache_fx.capture import capture, refuse_layerwise_offload
from deepcache_fx.captures import find_or_make, is_at_hand
from deepcache_fx.compile import pick_backend
from deepcache_fx.config import Options
from deepcache_fx.cuda_graphs import Recorder
from deepcache_fx.deferred import all_computed, computed
from deepcache_fx.errors import DeepCacheError, ScheduleError, Uncapturable
from deepcache_fx.fingerprint import Settings
from deepcache_fx.listing import Listings
from deepcache_fx.model_state import ModelState
from deepcache_fx.pairing import Coming, Expectation, Handed, Pairing, pair
from deepcache_fx.programs import DeepFeature, PromptValues, Values
from deepcache_fx.report import CaptureReport, CompanionReport, Counts, CutReport, Report
from deepcache_fx.signature import Call, CallReader, UnsupportedInput
from deepcache_fx.steps import StepTracker, Tick, position_of, value_position


@dataclass
class Slot:
    """The deep feature of one UNet call of a step, the entry that made it, and the step it was last refreshed in."""

    entry: Entry
    feature: DeepFeature
    refreshed: int
    pairings: Sequence[Pairing | None] = ()
    """For each cut, how the ControlNet that runs before it feeds its shallow steps."""


class Watch(Protocol):
    """Something that follows a pipeline for a runtime (see `follow.PipelineWatch`)."""

    def __call__(self) -> None: ...

    def pipeline(self) -> Any: ...

    def stop(self) -> None: ...

    def report(self) -> CompanionReport | None: ...


SHALLOW_LETTERS = "stuvwxyz"
"""By cut, what a shallow step is written as in `Report.last_run`."""

_CHANGED = "inputs or settings changed within a run"

_clock = itertools.count(1)


class ThreadState(threading.local):
    """One thread's run: never shared, so that no thread reads another's cache."""

    def __init__(self) -> None:
        self.tracker = StepTracker()
        self.slots: dict[int, Slot] = {}
        self.refreshed = 0
        self.prompts: dict[tuple[str, int], PromptValues] = {}
        self.trace: list[str] = []
        self.answer: tuple[int, int | None, tuple[bool, Branch | None]] | None = None
        self.settings: Settings | None = None
        self.expected = Expectation()
        self.last_heard = 0

    def forget(self) -> None:
        self.tracker.reset()
        self.expected.begin()
        self.clear()

    def clear(self) -> None:
        """Let go of what earlier steps left."""
        self.answer = None
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
        self.model_state = ModelState(options)
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.recorders: dict[torch.device, Recorder] = {}
        self._state = ThreadState()

    def adopt(self, before: Runtime) -> None:
        """Take over the programs of a runtime whose options differ in the schedule alone."""
        self._entries, self.recorders, self.model_state = before._entries, before.recorders, before.model_state
        self.counts.captures, self.device = before.counts.captures, before.device
        self.counts.rebound = before.counts.rebound

    # What schedulers announce.

    def watch(self, watch: Watch) -> None:
        """Follow a pipeline: `watch` is called before every UNet call."""
        for known in self._watches:
            if known.pipeline() is None:
                known.stop()
        self._watches = [*self.watches(), watch]
        watch()

    def watches(self) -> list[Watch]:
        """Those of the living pipelines that are followed."""
        return [watch for watch in self._watches if watch.pipeline() is not None]

    def go_on_watching(self) -> None:
        for watch in self._watches:
            watch()

    def stop_watching(self) -> None:
        """Until the next call."""
        for watch in self._watches:
            watch.stop()

    def run_announced(self, num_steps: int | None) -> None:
        state = self._state
        state.tracker.run_announced(num_steps)
        state.expected.begin()
        state.last_heard = next(_clock)

    def step_ended(self) -> None:
        self._state.tracker.step_ended()
        self._state.last_heard = next(_clock)

    # What a companion asks and tells.

    def coming(self, call: Call) -> Coming:
        """What is known of this thread's next UNet call. To be asked once for every call of a companion, given here."""
        self.go_on_watching()
        state = self._state
        tick, is_told = state.tracker.peek(position_of(call.timestep), call.sample)
        run = state.expected.runs + tick.new_run
        number = state.expected.next_call(run, tick.step)
        coming = Coming(run, tick.new_run, number, is_told)
        slot = None if tick.new_run or not is_told else state.slots.get(number)
        if slot is None or self._is_stale(state, slot):
            return coming
        is_full, branch = self._kind(state, tick.step, tick.num_steps)
        if is_full:
            return coming
        return replace(coming, is_shallow=True, pairing=slot.pairings[slot.entry.cuts[branch]])

    def hand(self, call: int, handed: Handed) -> None:
        """What a companion's call returned; `call` is what `coming` said."""
        self._state.expected.handed[call] = handed

    def last_heard(self) -> int:
        """Grows: when this thread last heard of a scheduler."""
        return self._state.last_heard

    def reset(self) -> None:
        """Forget the current run of this thread."""
        self._state.forget()

    # The step path.

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        reason = why_original(module, args, kwargs)
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
        self.go_on_watching()
        position = position_of(call.timestep)
        if call.timestep is not None and call.timestep.numel() and state.tracker.needs_value(position):
            self.counts.syncs += 1
            position = value_position(call.timestep)
        tick = state.tracker.observe(position, call.timestep, call.sample)
        if tick.new_run:
            state.clear()
            state.trace = []
            state.expected.runs += 1
            self._check_num_steps(module, tick)
        wanted_full, branch = self._kind(state, tick.step, tick.num_steps)
        handed = state.expected.handed.pop(tick.call, None)
        if wanted_full:
            self._have_settings_changed(state, module, call, thorough=tick.new_run)
        state.settings, entry = self._entry(module, call, state.settings)
        slot = state.slots.get(tick.call)
        forced = tick.doubt
        if slot is None or self._is_stale(state, slot):
            forced = forced or "no cached feature for this call of the step"
        elif slot.entry is not entry:
            forced = forced or _CHANGED
        if slot is not None and forced is None and not wanted_full:
            # Settings are looked at once the device is at work. Where they have changed, what it computes, or fails to
            # compute of weights that were moved with them, counts for nothing.
            cut = entry.cuts[branch]
            try:
                leaves = self._shallow(state, entry, slot, cut, tick, call)
            except Exception:
                if not self._have_settings_changed(state, module, call):
                    raise
            else:
                if not self._have_settings_changed(state, module, call):
                    self.counts.shallow += 1
                    self.counts.by_cut[entry.variants.cuts[cut].branch.index] += 1
                    state.trace.append(SHALLOW_LETTERS[min(cut, len(SHALLOW_LETTERS) - 1)])
                    return entry.captured.outputs(leaves)
            forced, slot = _CHANGED, None  # the step may have refreshed caches of its feature: not to be forecast from
        elif not wanted_full:
            self._have_settings_changed(state, module, call)
        if not wanted_full:
            state.settings, entry = self._entry(module, call, state.settings)
            self.counts.forced[str(forced)] += 1
        elif tick.call == 0:
            state.refreshed = tick.step  # a call that is missing from this step has no feature until the next
        before = slot.feature if self.options.forecast and slot is not None and slot.entry is entry else None
        state.slots.pop(tick.call, None)
        slot = None  # else the old feature would be moved out of the way of the new one
        tensors = computed(call.tensors)
        prompt = state.prompt(entry, "full", tick.call, tensors)
        leaves, feature = entry.programs.full(tick.step, tensors, prompt, before)
        pairings = [pair(handed, call.tensors, tensors, reads) for reads in entry.reads]
        state.slots[tick.call] = Slot(entry, feature, state.refreshed, pairings)
        self.counts.full += 1
        state.trace.append("F")
        return entry.captured.outputs(leaves)

    @staticmethod
    def _shallow(state: ThreadState, entry: Entry, slot: Slot, cut: int, tick: Tick, call: Call) -> Sequence[Any]:
        """The outputs of a shallow step. It changes nothing but the slot's feature."""
        pairing = slot.pairings[cut]
        tensors = computed(pairing.inputs(call.tensors) if pairing is not None else call.tensors)
        prompt = state.prompt(entry, entry.names[cut], tick.call, tensors)
        return entry.programs.shallow(tick.step, tensors, slot.feature, prompt, cut)

    def _have_settings_changed(
        self, state: ThreadState, module: torch.nn.Module, call: Call, *, thorough: bool = False
    ) -> bool:
        """True where the model's settings are others than when this thread looked last; they are known from now on."""
        before = state.settings
        state.settings = self.model_state.settings(module, call.sample.device, thorough=thorough)
        return state.settings != before

    def _kind(self, state: ThreadState, step: int, num_steps: int | None) -> tuple[bool, Branch | None]:
        """What the schedule says of a step: whether it is full, else where it begins.

        Asked once a step, for a function of the user's may keep count.
        """
        if state.answer is None or state.answer[:2] != (step, num_steps):
            schedule = self.options.schedule
            is_full = step == 0 or schedule.is_full(step, num_steps)
            branch = None if is_full else schedule.branch_at(step, num_steps)
            if branch is not None and branch not in schedule.branches:
                raise ScheduleError(
                    f"{schedule} begins step {step} at branch {branch}, which its `branches` do not name: they are "
                    f"{schedule.branches}; None stands for the branch of optimize()"
                )
            state.answer = step, num_steps, (is_full, branch)
        return state.answer[2]

    @staticmethod
    def _is_stale(state: ThreadState, slot: Slot) -> bool:
        """True where this call of the step was missing from the last refresh."""
        return slot.refreshed != state.refreshed

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
        return self.model_class.forward(module, *all_computed(args), **all_computed(kwargs))

    # Capturing.

    def prepare(self, module: torch.nn.Module, call: Call) -> Entry:
        """Capture and split for calls like this one, ahead of the first."""
        return self._entry(module, call, self._look(module, call))[1]

    def _look(self, module: torch.nn.Module, call: Call) -> Settings:
        return self.model_state.settings(module, call.sample.device, thorough=True)

    def _entry(self, module: torch.nn.Module, call: Call, settings: Settings | None) -> tuple[Settings, Entry]:
        """The programs for calls like this one, captured now if there are none yet; and their settings."""
        if not is_at_hand(self._entries, settings, call.key):
            computed(call.tensors)  # now: what computes them may wait for a thread that waits to capture
        return find_or_make(
            self._entries,
            settings,
            call.key,
            look=functools.partial(self._look, module, call),
            make=functools.partial(self._make_entry, module, call),
            model_state=self.model_state,
            module=module,
            limit=self.options.max_captures,
            rebound=self._count_rebound,
        )

    def _count_rebound(self) -> None:
        self.counts.rebound += 1

    def _make_entry(self, module: torch.nn.Module, call: Call) -> Entry:
        started = time.perf_counter()
        try:
            refuse_layerwise_offload(module)
            with self.model_state.watching(module):
                captured = capture(module, call, self.reader, self.model_class)
            to_lay_out = ToLayOut(self.model_state.layout, module, in_use=bool(self._entries))
            entry = assemble(
                captured,
                call,
                self.options,
                name=self.model_class.__name__,
                recorders=self.recorders,
                weights=to_lay_out if self.model_state.are_moved(call.sample.device) else None,
            )
        except Uncapturable:
            raise
        except DeepCacheError:
            if not self.counts.captures:
                self.on_first_failure(module)
            raise
        self.counts.captures += 1
        self.device = call.sample.device
        entry.seconds = time.perf_counter() - started
        return entry

    def report(self) -> Report:
        """The totals so far, and the last run of the calling thread."""
        counts = self.counts
        signatures = tuple(
            CaptureReport(
                inputs=entry.inputs,
                full_macs=entry.variants.full.macs.total,
                prompt_macs=sum(variant.prompt_macs.total for variant in entry.variants.named().values()),
                cuts=tuple(
                    CutReport(
                        branch=cut.branch.index,
                        block=cut.branch.block,
                        layer=cut.branch.layer,
                        shallow_macs=cut.shallow.macs.total,
                        cache_bytes=cut.cost.cache_bytes,
                        plain_shallow_macs=cut.plain.macs.total,
                        plain_cache_bytes=cut.plain.cache_bytes,
                    )
                    for cut in entry.variants.cuts
                ),
                refreshes=self.options.forecast + 1,
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
            rebound=counts.rebound,
            full_calls=counts.full,
            shallow_calls=counts.shallow,
            calls_by_branch=dict(sorted(counts.by_cut.items())),
            original_calls=sum(counts.original.values()),
            forced_full=dict(counts.forced),
            original_reasons=dict(counts.original),
            timestep_syncs=counts.syncs,
            last_run="".join(self._state.trace),
            signatures=signatures,
            companions=tuple(found for found in (watch.report() for watch in self.watches()) if found is not None),
        )


def why_original(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why this call must run the model's own forward, or None."""
    if torch.compiler.is_compiling():
        return "called inside another compilation"
    if torch.is_grad_enabled():
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters()):
            return "gradients are enabled and required: call it under torch.no_grad()"
    return None
