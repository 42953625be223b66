"""Runs the ControlNet of a pipeline whose UNet is optimised: all of it in full steps, next to nothing in shallow ones.

A shallow step of the UNet reads few of a ControlNet's residuals, at branch 0 the first. Which, a full step shows: the
UNet's runtime finds the very tensors that the ControlNet returned among its inputs. From then on, where the UNet's next
call is going to be shallow, the ControlNet's runtime computes those alone and returns deferred tensors for the
others (see `deferred`). That a step turns out full after all, that a pipeline looks at a residual or makes another
tensor of it: all of this costs the time of a full ControlNet call, and never gives another value.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from deepcache_fx.controlnet.conditioning import CONDITION, ConditioningReader
from deepcache_fx.controlnet.controlnet_programs import ControlNetEntry, assemble_controlnet
from deepcache_fx.controlnet.deferred import Deferral, DeferredTensor
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.execution.programs import PromptValues, Values
from deepcache_fx.graph.capture import capture, refuse_layerwise_offload
from deepcache_fx.graph.signature import Call, UnsupportedInput
from deepcache_fx.guards.fingerprint import Settings
from deepcache_fx.guards.model_state import ModelState
from deepcache_fx.runtime.captures import Captures
from deepcache_fx.runtime.pairing import PrecomputedInputs, UpcomingCall
from deepcache_fx.runtime.report import ControlNetCapture, ControlNetReport
from deepcache_fx.runtime.runtime import Runtime, why_original

_FAILURES_KEPT = 64


class _Run:
    """One thread's run."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.prompts: dict[int, PromptValues] = {}
        self.trace: list[str] = []
        self.plain_macs = self.computed_macs = 0
        self.read_by_pipeline = False
        self.is_over = False


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.run = _Run(-1)

    def begin(self, number: int) -> None:
        self.run.is_over = True
        self.run = _Run(number)


class ControlNetRuntime:
    """Runs one ControlNet for one optimised UNet. The ControlNet's class holds this, and this neither of the two."""

    def __init__(self, model_class: type[torch.nn.Module], runtime: Runtime) -> None:
        self.model_class = model_class
        self.reader = ConditioningReader(model_class.forward)
        self.model_state = ModelState(runtime.options)
        self._options = runtime.options
        self._runtime = weakref.ref(runtime)
        self._recorders = runtime.recorders
        self._entries: Captures[ControlNetEntry] = Captures(self._options.max_captures)
        self._failures: dict[Hashable, str] = {}
        self._state = _ThreadState()
        self._full = self._shallow = self._completed = 0
        self._kept_full: Counter[str] = Counter()
        self._original_calls: Counter[str] = Counter()

    def adopt(self, before: ControlNetRuntime) -> None:
        """Take over the programs of another runtime of the same ControlNet."""
        self._entries, self.model_state = before._entries, before.model_state

    def release(self) -> None:
        """Give all memory back, and weights the strides that they had."""
        self._state = _ThreadState()
        self._entries.release()
        self.model_state.restore()

    def runtime(self) -> Runtime | None:
        """The UNet's; None where the UNet is gone."""
        return self._runtime()

    # The step path.

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        runtime = self._runtime()
        assert runtime is not None
        reason = why_original(module, args, kwargs)
        if reason is not None:
            return self._original(reason, module, args, kwargs)
        try:
            call = self.reader.read(module, args, kwargs)
        except UnsupportedInput as error:
            return self._original(str(error), module, args, kwargs)
        upcoming = runtime.upcoming_call(call)
        if upcoming.run != self._state.run.number:
            self._state.begin(upcoming.run)
        run = self._state.run
        with torch.no_grad():
            at_run_start = upcoming.begins_run or not run.trace
            entry = self._entry(
                module, call, self.model_state.settings(module, call.sample.device, at_run_start=at_run_start)
            )
            if isinstance(entry, ControlNetEntry):
                leaves = self._leaves(entry, call, upcoming, run)
                runtime.expect_inputs(upcoming.call, PrecomputedInputs(entry, leaves))
                return entry.captured.outputs(leaves)
        return self._original(entry, module, args, kwargs)

    def _leaves(self, entry: ControlNetEntry, call: Call, upcoming: UpcomingCall, run: _Run) -> tuple[Any, ...]:
        prompt: Values = ()
        if entry.stage is not None:
            before = run.prompts.get(upcoming.call)
            known = run.prompts[upcoming.call] = entry.stage(call.tensors, before)
            prompt = known.values
            run.computed_macs += 0 if known is before else entry.prompt_macs
        run.plain_macs += entry.plain_macs
        reason = _why_full(entry, upcoming, run)
        if upcoming.is_shallow and reason is None:
            assert upcoming.pairing is not None
            return self._shallow_leaves(entry, call, upcoming.pairing.read, upcoming.pairing.unread, prompt, run)
        if reason is not None:
            self._kept_full[reason] += 1
        self._full += 1
        run.trace.append("F")
        run.computed_macs += entry.full.macs
        return tuple(entry.full(call.tensors, prompt))

    def _shallow_leaves(
        self,
        entry: ControlNetEntry,
        call: Call,
        read: frozenset[int],
        like: Mapping[int, torch.Tensor],
        prompt: Values,
        run: _Run,
    ) -> tuple[Any, ...]:
        step = entry.step_for(read)
        computed = dict(zip(step.outputs, step(call.tensors, prompt), strict=True))
        # Changes in place of an inference tensor are not counted: keep what it is now.
        inputs = tuple([t.clone() if t.is_inference() else t for t in call.tensors])
        position = len(run.trace)
        deferral = Deferral(partial(self._complete, entry, inputs, _stamps(inputs), prompt, run, position))
        self._shallow += 1
        run.trace.append("s")
        run.computed_macs += step.macs
        return tuple(computed[i] if i in computed else DeferredTensor(like[i], deferral, i) for i in range(entry.count))

    def _complete(
        self,
        entry: ControlNetEntry,
        inputs: Values,
        stamps: Sequence[int],
        prompt: Values,
        run: _Run,
        position: int,
        by_operator: bool,
    ) -> Sequence[Any]:
        """The residuals that a shallow step left out, asked for after all."""
        name = self.model_class.__name__
        if run.is_over:
            raise DeepCacheError(
                f"a residual that a shallow step of {name} left out was asked for after its run: clone residuals that "
                "are to be kept while the pipeline runs, or leave the ControlNet as it is with optimize(pipe.unet)"
            )
        if stamps != _stamps(inputs):
            raise DeepCacheError(
                f"a residual that a shallow step of {name} left out was asked for after an input of that step had been "
                "changed in place, so that it cannot be computed any more: leave the ControlNet as it is with "
                "optimize(pipe.unet)"
            )
        values = entry.full(inputs, prompt)
        self._completed += 1
        run.read_by_pipeline |= by_operator
        run.trace[position] = "c"
        run.computed_macs += entry.full.macs
        return values

    def _original(self, reason: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if reason not in self._original_calls:
            warnings.warn(f"{self.model_class.__name__} computes everything at each step: {reason}", stacklevel=5)
        self._original_calls[reason] += 1
        return self.model_class.forward(module, *args, **kwargs)

    # Capturing.

    def _entry(self, module: torch.nn.Module, call: Call, settings: Settings) -> ControlNetEntry | str:
        """The programs for calls like this one, or why there are none."""
        key = (settings.structure, call.key)
        failure = self._failures.get(key)
        if failure is not None:
            return failure
        try:
            return self._entries.find_or_make(settings, call, self.model_state, module, self._make_entry)[1]
        except DeepCacheError as error:
            if len(self._failures) >= _FAILURES_KEPT:
                self._failures.clear()
            self._failures[key] = str(error)
            return str(error)

    def _make_entry(self, module: torch.nn.Module, call: Call) -> ControlNetEntry:
        started = time.perf_counter()
        refuse_layerwise_offload(module, call.sample.device)
        with self.model_state.watching(module, call.objects()) as watched:
            captured = capture(module, call, self.reader, self.model_class, traced=watched.traced)
            watched.captured(captured.graph)
        entry = assemble_controlnet(captured, call, self._options, self._recorders)
        entry.seconds = time.perf_counter() - started
        return entry

    def report(self) -> ControlNetReport:
        """The totals so far, and the last run of the calling thread."""
        run = self._state.run
        return ControlNetReport(
            model=self.model_class.__name__,
            captures=self._entries.captured,
            rebound=self._entries.rebound,
            full_calls=self._full,
            shallow_calls=self._shallow,
            completed_calls=self._completed,
            original_calls=sum(self._original_calls.values()),
            kept_full=dict(self._kept_full),
            original_reasons=dict(self._original_calls),
            last_run="".join(run.trace),
            last_run_macs=run.computed_macs,
            last_run_macs_saved=run.plain_macs - run.computed_macs,
            signatures=tuple(
                ControlNetCapture(
                    inputs=entry.inputs,
                    full_macs=entry.full.macs,
                    shallow_macs=max((step.macs for step in entry.shallow.values()), default=None),
                    prompt_macs=entry.prompt_macs,
                    residuals=entry.count,
                    shallow_residuals=max((len(read) for read in entry.shallow), default=None),
                    capture_seconds=entry.seconds,
                    passes=entry.passes,
                    cuda_graphs=entry.full.programs.cuda_graphs(),
                )
                for entry in tuple(self._entries.values())
            ),
        )


def _why_full(entry: ControlNetEntry, upcoming: UpcomingCall, run: _Run) -> str | None:
    """Why everything is computed though the UNet's step is going to be shallow, or nobody can tell; None else."""
    if not upcoming.is_told:
        return "no scheduler tells which step a call belongs to"
    if not upcoming.is_shallow:
        return None
    if upcoming.pairing is None:
        return "at the last full step the UNet was given other tensors (guess mode joins residuals and zeros)"
    if upcoming.pairing.source is not entry:
        return "inputs changed shape or type within a run"
    if run.read_by_pipeline:
        return "the pipeline reads residuals that the UNet does not"
    return None if upcoming.pairing.unread else "the UNet's shallow step reads every residual"


def _stamps(tensors: Values) -> Sequence[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


class ControlNetRuntimes:
    """What answers a ControlNet's calls: a runtime for each UNet that it is used with."""

    def __init__(self, model_class: type[torch.nn.Module]) -> None:
        self._model_class = model_class
        self._each: list[ControlNetRuntime] = []

    def __contains__(self, controlnet_runtime: object) -> bool:
        return controlnet_runtime in self._each

    def __len__(self) -> int:
        return len(self._each)

    def add(self, controlnet_runtime: ControlNetRuntime) -> None:
        self._each = [known for known in self._each if known.runtime() is not None] + [controlnet_runtime]

    def remove(self, controlnet_runtime: ControlNetRuntime) -> None:
        self._each = [known for known in self._each if known is not controlnet_runtime and known.runtime() is not None]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """By the runtime that belongs to the UNet that is running: the one whose scheduler was last heard of."""
        found: ControlNetRuntime | None = None
        latest = -1
        for controlnet_runtime in self._each:
            runtime = controlnet_runtime.runtime()
            if runtime is not None and runtime.last_heard() > latest:
                found, latest = controlnet_runtime, runtime.last_heard()
        if found is None:
            return self._model_class.forward(module, *args, **kwargs)
        return found(module, args, kwargs)


def why_controlnet_runs_alone(model_class: type[torch.nn.Module]) -> str | None:
    """Why a network is left alone, or None."""
    try:
        takes = ConditioningReader(model_class.forward).takes_condition
    except UnsupportedInput as error:
        return str(error)
    return None if takes else f"its forward takes no {CONDITION}"
