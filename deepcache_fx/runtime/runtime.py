"""What the pipeline calls instead of the UNet's forward: follows the run, owns the caches, picks a variant."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from deepcache_fx.errors import CompileError, DeepCacheError, ScheduleError, Uncapturable
from deepcache_fx.execution.assemble import Entry, assemble
from deepcache_fx.execution.compile import name_of, pick_backend
from deepcache_fx.execution.cuda_graphs import Recorder
from deepcache_fx.graph.capture import capture, is_compiling_here, refuse_layerwise_offload
from deepcache_fx.graph.lazy import all_computed, computed
from deepcache_fx.graph.listing import Listings
from deepcache_fx.graph.signature import Call, CallReader, UnsupportedInput
from deepcache_fx.guards.fingerprint import Settings
from deepcache_fx.guards.model_state import ModelState
from deepcache_fx.options import Options
from deepcache_fx.runtime.captures import Captures
from deepcache_fx.runtime.decision import StepDecision, decide
from deepcache_fx.runtime.forecast_order import (
    LISTENING_STEPS,
    ForecastOrder,
    order_of,
    order_with_noise,
    order_without_forecast,
)
from deepcache_fx.runtime.pairing import Expectation, PrecomputedInputs, UpcomingCall, pair
from deepcache_fx.runtime.report import CaptureReport, ControlNetReport, Counts, CutReport, Report
from deepcache_fx.runtime.sizes_met import SizesMet
from deepcache_fx.runtime.slots import NO_FEATURE, Slot, Slots
from deepcache_fx.runtime.steps import StepInfo, StepTracker, position_of, value_position
from deepcache_fx.schedules.branch import Branch
from deepcache_fx.schedules.schedule import Schedule


class Follower(Protocol):
    """Something that follows a pipeline for a runtime (see `follow.PipelineFollower`)."""

    def __call__(self) -> None: ...

    def pipeline(self) -> Any: ...

    def stop(self) -> None: ...

    def undo_layout(self) -> None: ...

    def release(self) -> None: ...

    def report(self) -> ControlNetReport | None: ...


@dataclass(frozen=True)
class Wanted:
    """Whose programs are looked for, or have been made."""

    module: torch.nn.Module
    model_class: type[torch.nn.Module]
    call: Call
    options: Options
    model_state: ModelState
    recorders: dict[torch.device, Recorder]


class ProgramStore(Protocol):
    """Where programs are kept between processes (see `artefacts.store.ProgramDirectory`)."""

    def find(self, wanted: Wanted) -> Entry | None:
        """The programs, where there are some that were made for exactly this."""

    def add(self, wanted: Wanted, entry: Entry) -> None:
        """Keep programs that have just been made."""


SHALLOW_LETTERS = "stuvwxyz"
"""By cut, what a shallow step is written as in `Report.last_run`."""

_FAILURES_KEPT = 64
_CALLS_KEPT = 256

_clock = itertools.count(1)


class Observation(NamedTuple):
    """What is known of a UNet call before anything runs."""

    info: StepInfo
    is_scheduled: bool
    """Whether the schedule makes the step full."""
    branch: Branch | None
    """Where the schedule lets a shallow step begin."""
    entry: Entry
    """The programs of the call's signature, under the settings that the model has now."""
    slot: Slot
    """That of the call's conditioning; a new one where there is none."""
    missing: str | None
    """Why no cached feature may be read."""


_observation = functools.partial(tuple.__new__, Observation)
"""Makes one of a tuple, without a Python call (as in `steps`)."""


@dataclass(slots=True)
class _Known:
    """The entry of a thread's last call, and what it was found by."""

    settings: Settings
    call: Hashable
    made: int
    """How many captures there had been: for another one it may have been given up."""
    entry: Entry


class ThreadState(threading.local):
    """One thread's run: never shared, so that no thread reads another's cache."""

    def __init__(self) -> None:
        self.tracker = StepTracker()
        self.slots = Slots()
        self.trace: list[str] = []
        self.answer: tuple[int, int | None, bool, Branch | None] | None = None
        self.known: _Known | None = None
        self.condition: Hashable = None
        """What the caller says the next call is conditioned on."""
        self.order = ForecastOrder(0, "")
        """Of this run."""
        self.announced_order: ForecastOrder | None = None
        self.expected = Expectation()
        self.last_heard = 0

    def forget(self) -> None:
        self.tracker.reset()
        self.expected.begin()
        self.clear()

    def clear(self) -> None:
        """Let go of what earlier steps left."""
        self.answer = self.known = self.condition = None
        self.slots.clear()


class Runtime:
    """Runs one optimised module. Holds no reference to it: the module holds this."""

    def __init__(self, model_class: type[torch.nn.Module], options: Options) -> None:
        self.model_class = model_class
        self.options = options
        self._names_branches = type(options.schedule).branch_at is not Schedule.branch_at
        self.reader = CallReader(model_class.forward, options.ignore)
        self.counts = Counts()
        self.device: torch.device | None = None
        self.on_first_failure: Callable[[torch.nn.Module], object] = lambda module: None
        self.kept_by = 0
        """How many with blocks are going to bring this runtime back."""
        self._followers: list[Follower] = []
        self.model_state = ModelState(options)
        self._entries: Captures[Entry] = Captures(options.max_captures)
        self._failures: dict[Hashable, str] = {}
        """By settings and call, why there are no programs, where such calls run uncached."""
        self.recorders: dict[torch.device, Recorder] = {}
        self.sizes_met = SizesMet(options)
        self.store: ProgramStore | None = None
        self._calls: dict[Hashable, Call] = {}
        """By key, without their arguments: what `made` tells of."""
        self._state = ThreadState()

    def adopt(self, before: Runtime) -> None:
        """Take over the programs of a runtime whose options differ in the schedule alone, and what cannot have any."""
        self._entries, self.recorders, self.model_state = before._entries, before.recorders, before.model_state
        self.device, self.sizes_met, self._calls = before.device, before.sizes_met, before._calls
        self.reader, self._failures = before.reader, before._failures

    def shares_programs(self, other: Runtime) -> bool:
        """True where either has adopted the other's programs."""
        return self._entries is other._entries

    def undo_layout(self) -> None:
        """Give weights the strides that the model had them in."""
        self.model_state.restore()
        for follower in self._followers:
            follower.undo_layout()

    def release(self) -> None:
        """Give all memory back: programs, recorded graphs and their buffers, cached features of every thread.

        Should it be called again, it captures anew. Not to be called under `CAPTURE_LOCK`.
        """
        self._state = ThreadState()
        self._entries.release()
        for follower in self._followers:
            follower.release()
        self.model_state.restore()
        for recorder in self.recorders.values():
            with recorder.lock:
                recorder.free()

    # What schedulers announce.

    def follow(self, follower: Follower) -> None:
        """Follow a pipeline: `follower` is called before every UNet call."""
        for known in self._followers:
            if known.pipeline() is None:
                known.stop()
                known.release()
        self._followers = [*self.followers(), follower]
        follower()

    def followers(self) -> list[Follower]:
        """Those of the living pipelines that are followed."""
        return [follower for follower in self._followers if follower.pipeline() is not None]

    def follow_pipelines(self) -> None:
        for follower in self._followers:
            follower()

    def stop_following(self) -> None:
        """Until the next call."""
        for follower in self._followers:
            follower.stop()

    def run_announced(
        self, num_steps: int | None, *, by_caller: bool = False, are_uneven: bool = False, may_forecast: bool = True
    ) -> None:
        """A scheduler, or the caller, begins a run. `are_uneven`: its steps are of very different lengths."""
        state = self._state
        state.tracker.run_announced(num_steps, by_caller=by_caller)
        order = order_of(self.options, None if by_caller else num_steps, are_uneven)
        state.announced_order = order if may_forecast else order_without_forecast(self.options, order)
        state.expected.begin()
        state.last_heard = next(_clock)

    def noise_drawn(self) -> None:
        """A scheduler's step drew random numbers."""
        self._state.order = order_with_noise(self.options, self._state.order)

    def wants_to_hear_of_noise(self) -> bool:
        """True in the first steps of a run where it decides on the forecast."""
        state = self._state
        return self.options.forecast == "auto" and state.order.degree > 0 and state.tracker.step < LISTENING_STEPS

    def step_ended(self) -> None:
        """A scheduler, or the caller, ends a step."""
        self._state.tracker.step_ended()
        self._state.last_heard = next(_clock)

    # What a ControlNet asks and tells.

    def upcoming_call(self, call: Call) -> UpcomingCall:
        """What is known of this thread's next UNet call. To be asked once for every call of a ControlNet."""
        self.follow_pipelines()
        state = self._state
        info, is_told = state.tracker.peek(position_of(call.timestep), call.sample)
        run = state.expected.runs + info.new_run
        number = state.expected.next_call(run, info.step)
        upcoming = UpcomingCall(run, info.new_run, number, is_told)
        slot = None if info.new_run or not is_told else state.slots.usual(info.step, number)
        if slot is None or slot.refresh != state.slots.refresh:
            return upcoming
        is_full, branch = self._scheduled(state, info)
        if is_full:
            return upcoming
        pairing = slot.pairings[slot.entry.cuts[branch]] if slot.pairings else None
        return replace(upcoming, is_shallow=True, pairing=pairing)

    def expect_inputs(self, call: int, precomputed: PrecomputedInputs) -> None:
        """What a ControlNet's call returned; `call` is what `upcoming_call` said."""
        self._state.expected.precomputed[call] = precomputed

    def last_heard(self) -> int:
        """Grows: when this thread last heard of a scheduler."""
        return self._state.last_heard

    def condition(self, key: Hashable) -> None:
        """What this thread's next call is conditioned on."""
        self._state.condition = key

    def reset(self) -> None:
        """Forget the current run of this thread."""
        self._state.forget()

    # The step path: observe, decide, execute, commit.

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        is_grad_enabled = torch.is_grad_enabled()
        if is_grad_enabled or torch.compiler.is_compiling():
            reason = why_original(module, args, kwargs)
            if reason is not None:
                return self._original(reason, module, args, kwargs)
        try:
            call = self.reader.read(module, args, kwargs)
        except UnsupportedInput as error:
            return self._original(str(error), module, args, kwargs)
        state = self._state
        try:
            if not is_grad_enabled:
                return self._step(state, module, call)
            with torch.no_grad():
                return self._step(state, module, call)
        except Uncapturable as error:
            return self._original(str(error), module, args, kwargs)
        except CompileError as error:
            state.forget()
            if self.options.on_failure == "raise":
                if not self.counts.full:
                    self.on_first_failure(module)
                raise
            structure = self.model_state.settings(module, call.sample.device, at_run_start=False).structure
            self._entries.give_up((structure, call.key))
            self._note_failure((structure, call.key), error)
            return self._original(str(error), module, args, kwargs)
        except BaseException:
            state.forget()
            raise

    def _step(self, state: ThreadState, module: torch.nn.Module, call: Call) -> Any:
        seen = self._observe(state, module, call)
        decision = decide(seen.is_scheduled, seen.branch, seen.info.doubt, seen.missing)
        if decision.is_full:
            leaves = self._full(state, seen, call)
        else:
            leaves = self._shallow(seen, decision.branch, call, state.order.degree)
        self._commit(state, seen, decision)
        return seen.entry.captured.outputs(leaves)

    def _observe(self, state: ThreadState, module: torch.nn.Module, call: Call) -> Observation:
        """Which step and call it is, which programs serve it now, and which cached feature is its own."""
        if self._followers:
            self.follow_pipelines()
        position = position_of(call.timestep)
        if position is None and call.timestep is not None and state.tracker.needs_value(position, call.timestep):
            self.counts.syncs += 1
            position = value_position(call.timestep)
        condition, state.condition = state.condition, None
        info = state.tracker.observe(position, call.timestep, call.sample)
        if info.new_run:
            state.clear()
            state.trace = []
            state.order = (state.tracker.is_hooked and state.announced_order) or order_of(self.options, None, False)
            state.expected.runs += 1
            self._check_num_steps(module, info)
        is_scheduled, branch = self._scheduled(state, info)
        entry = self._entry(state, module, call, begins_run=info.new_run)
        slots = state.slots
        if is_scheduled and info.call == 0:
            slots.begin_refresh(info.step)
        slot = slots.find(entry, call, info.step, info.call, condition)
        missing = None
        if slot is None:
            missing = slots.why_none(entry, info.step, info.call)
            slot = slots.add(entry, call, condition)
        elif slot.refresh != slots.refresh:
            missing = NO_FEATURE
        return _observation((info, is_scheduled, branch, entry, slot, missing))

    def _full(self, state: ThreadState, seen: Observation, call: Call) -> Sequence[Any]:
        """The outputs of a full step, which leaves its deep feature in the slot."""
        entry, slot, info = seen.entry, seen.slot, seen.info
        tensors = call.tensors if call.is_plain else computed(call.tensors)
        before, slot.feature = slot.feature if self.options.order else None, None  # let go of, unless it is read
        prompt = slot.prompt(entry.prompts.get("full"), "full", tensors)
        leaves, slot.feature = entry.programs.full(info.step, tensors, prompt, before)
        slot.renew(call)
        slot.refresh = state.slots.refresh
        precomputed = state.expected.precomputed.get(info.call)
        slot.pairings = (
            [pair(precomputed, call.tensors, tensors, reads) for reads in entry.reads] if precomputed else ()
        )
        return leaves

    @staticmethod
    def _shallow(seen: Observation, branch: Branch | None, call: Call, degree: int) -> Sequence[Any]:
        """The outputs of a shallow step, by a forecast of this degree. It changes nothing but the slot's feature."""
        entry, slot = seen.entry, seen.slot
        cut = entry.cuts[branch]
        tensors = call.tensors
        if not call.is_plain:
            pairing = slot.pairings[cut] if slot.pairings else None
            tensors = computed(pairing.inputs(tensors) if pairing is not None else tensors)
        name = entry.names[cut]
        prompt = slot.prompt(entry.prompts[name], name, tensors) if name in entry.prompts else ()
        assert slot.feature is not None, "a slot without a feature is missing something"
        slot.feature.degree = degree
        return entry.programs.shallow(seen.info.step, tensors, slot.feature, prompt, cut)

    def _commit(self, state: ThreadState, seen: Observation, decision: StepDecision) -> None:
        """Remember the step that has been made."""
        state.slots.use(seen.slot, seen.info.step)
        if state.expected.precomputed:
            state.expected.precomputed.pop(seen.info.call, None)
        counts = self.counts
        if decision.is_full:
            counts.full += 1
            state.trace.append("F")
            if decision.reason is not None:
                counts.forced[decision.reason] += 1
            return
        entry = seen.entry
        cut = entry.cuts[decision.branch]
        counts.shallow += 1
        counts.by_cut[entry.variants.cuts[cut].branch.index] += 1
        state.trace.append(SHALLOW_LETTERS[min(cut, len(SHALLOW_LETTERS) - 1)])

    def _scheduled(self, state: ThreadState, info: StepInfo) -> tuple[bool, Branch | None]:
        """What the schedule says of a step: whether it is full, else where it begins.

        Asked once a step, for a function of the user's may keep count.
        """
        step, num_steps = info.step, info.num_steps
        answer = state.answer
        if answer is None or answer[0] != step or answer[1] != num_steps:
            schedule = self.options.schedule
            is_full = step == 0 or schedule.is_full(step, num_steps)
            branch = None if is_full or not self._names_branches else schedule.branch_at(step, num_steps)
            if branch is not None and branch not in schedule.branches:
                raise ScheduleError(
                    f"{schedule} begins step {step} at branch {branch}, which its `branches` do not name: they are "
                    f"{schedule.branches}; None stands for the branch of optimize()"
                )
            answer = state.answer = step, num_steps, is_full, branch
        return answer[2], answer[3]

    def _check_num_steps(self, module: torch.nn.Module, info: StepInfo) -> None:
        if info.num_steps is None and self.options.schedule.needs_num_steps:
            if not self._entries.made:
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
        settings = self.model_state.settings(module, call.sample.device, at_run_start=True)
        return self._find_or_make(module, call, settings)[1]

    def _entry(self, state: ThreadState, module: torch.nn.Module, call: Call, *, begins_run: bool) -> Entry:
        """The programs for calls like this one, under the model's settings of now, which are looked at here alone."""
        settings = self.model_state.settings(module, call.sample.device, at_run_start=begins_run)
        known = state.known
        if (
            known is None
            or known.settings is not settings
            or known.call != call.key
            or known.made != self._entries.made
        ):
            settings, entry = self._find_or_make(module, call, settings)
            known = state.known = _Known(settings, call.key, self._entries.made, entry)
        return known.entry

    def _find_or_make(self, module: torch.nn.Module, call: Call, settings: Settings) -> tuple[Settings, Entry]:
        """The programs for calls like this one, captured now if there are none yet; and their settings.

        Raises:
            Uncapturable: there can be none, and such calls are to run uncached.
        """
        if not self._entries.is_at_hand(settings, call):
            if self._failures and (settings.structure, call.key) in self._failures:
                raise Uncapturable(self._failures[settings.structure, call.key])
            computed(call.tensors)  # now: what computes them may wait for a thread that waits to capture
        try:
            return self._entries.find_or_make(settings, call, self.model_state, module, self._make_entry)
        except Uncapturable:
            raise
        except DeepCacheError as error:
            if self.options.on_failure == "raise":
                if not self._entries.made:
                    self.on_first_failure(module)
                raise
            self._note_failure((settings.structure, call.key), error)
            raise Uncapturable(str(error)) from error

    def _note_failure(self, key: Hashable, error: DeepCacheError) -> None:
        if len(self._failures) >= _FAILURES_KEPT:
            self._failures.clear()
        self._failures[key] = str(error)

    def _make_entry(self, module: torch.nn.Module, call: Call) -> Entry:
        started = time.perf_counter()
        empty = torch.empty(0, device=call.sample.device)
        self._calls[call.key] = replace(call, arguments={}, tensors=(), timestep=None, sample=empty)
        while len(self._calls) > _CALLS_KEPT:
            del self._calls[next(iter(self._calls))]
        refuse_layerwise_offload(module, call.sample.device)
        entry = self._loaded(module, call)
        if entry is None:
            before = self.model_state.settings(module, call.sample.device, at_run_start=True)
            entry = self._captured_for_sizes(module, call) or self._captured(module, call)
            after = self.model_state.settings(module, call.sample.device, at_run_start=True)
            if before.structure != after.structure:
                entry.why_not_saved = "its first forward changed the model's settings, which programs would not"
        self.device = call.sample.device
        entry.seconds = time.perf_counter() - started
        if self.store is not None and entry.source is None:
            self.store.add(self._wanted(module, call), entry)
        return entry

    def _loaded(self, module: torch.nn.Module, call: Call) -> Entry | None:
        if self.store is None:
            return None
        self.sizes_met.note(call)
        return self.store.find(self._wanted(module, call))

    def _wanted(self, module: torch.nn.Module, call: Call) -> Wanted:
        return Wanted(module, self.model_class, call, self.options, self.model_state, self.recorders)

    def made(self, module: torch.nn.Module) -> list[tuple[Wanted, Entry]]:
        """What was made or loaded and is still there, under the settings that the model has now."""
        found = []
        entries = dict(self._entries)
        for call in list(self._calls.values()):
            settings = self.model_state.settings(module, call.sample.device, at_run_start=True)
            entry = entries.get((settings.structure, call.key))
            if entry is not None:
                found.append((self._wanted(module, call), entry))
        return found

    def keep_programs(self, module: torch.nn.Module, store: ProgramStore | None) -> None:
        """Load from this store and add to it from now on, beginning with what was made before; None: from none."""
        self.store = store
        if store is not None:
            for wanted, entry in self.made(module):
                store.add(wanted, entry)

    def _captured_for_sizes(self, module: torch.nn.Module, call: Call) -> Entry | None:
        """An entry whose capture serves many sizes; None where that is not wanted, or cannot be."""
        if not self.sizes_met.want_symbols(call):
            return None
        try:
            entry = self._captured(module, call, dynamic=True)
        except Uncapturable:
            raise
        except Exception as error:  # of any kind: what a model asks of symbols may fail anywhere
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.sizes_met.refuse(call, reason)
            if self.options.dynamic is True:
                warnings.warn(f"{self.model_class.__name__} is captured for each size: {reason}", stacklevel=2)
            return None
        if entry.many is None:
            self.sizes_met.refuse(call, "the model takes no other sizes")
        else:
            self.sizes_met.captured(entry.many.sizes.describe())
        return entry

    def _captured(self, module: torch.nn.Module, call: Call, *, dynamic: bool = False) -> Entry:
        with self.model_state.watching(module, call.objects()) as watched:
            captured = capture(module, call, self.reader, self.model_class, dynamic=dynamic, traced=watched.traced)
            watched.captured(captured.graph)
        name = self.model_class.__name__
        return assemble(captured, call, self.options, name=name, recorders=self.recorders)

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
                refreshes=self.options.order + 1,
                capture_seconds=entry.seconds,
                passes=entry.passes,
                first_call_seconds=dict(entry.programs.first_call_seconds),
                backend=entry.compiled.called.compilation.backend,
                precision=entry.compiled.called.compilation.precision,
                precision_error=entry.compiled.called.compilation.error,
                cuda_graphs=entry.programs.cuda_graphs(),
                graphs=Listings(entry.variants),
                source=entry.source,
            )
            for entry in tuple(self._entries.values())
        )
        wanted = self.options.backend if self.device is None else pick_backend(self.options, self.device)
        backends = dict.fromkeys(item.backend for item in signatures) or [name_of(wanted)]
        return Report(
            model=self.model_class.__name__,
            schedule=str(self.options.schedule),
            backend=", ".join(backends),
            captures=self._entries.captured,
            rebound=self._entries.rebound,
            full_calls=counts.full,
            shallow_calls=counts.shallow,
            calls_by_branch=dict(sorted(counts.by_cut.items())),
            original_calls=sum(counts.original.values()),
            forced_full=dict(counts.forced),
            original_reasons=dict(counts.original),
            timestep_syncs=counts.syncs,
            last_run="".join(self._state.trace),
            last_forecast=str(self._state.order) if self._state.trace else "",
            signatures=signatures,
            sizes=self.sizes_met.lines(),
            companions=tuple(filter(None, (follower.report() for follower in self.followers()))),
            preset=self.options.preset,
        )


def why_original(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why this call must run the model's own forward, or None."""
    if is_compiling_here():
        return "called inside another compilation"
    if torch.is_grad_enabled():
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters()):
            return "gradients are enabled and required: call it under torch.no_grad()"
    return None
