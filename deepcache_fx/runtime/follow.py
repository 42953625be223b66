"""Follow a scheduler, which marks the steps. It too gets a dynamic subclass (see `attach`), and loses it again."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from deepcache_fx.runtime.attach import MARK, give_subclass, original_class
from deepcache_fx.runtime.runtime import Runtime


class Listeners:
    """The runtimes that follow a scheduler. Weak: a scheduler keeps no model alive."""

    def __init__(self) -> None:
        self.runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()

    def announce(self, num_steps: int | None) -> None:
        for runtime in tuple(self.runtimes):
            runtime.run_announced(num_steps)

    def step(self) -> None:
        for runtime in tuple(self.runtimes):
            runtime.step_ended()


def listen(scheduler: Any, runtime: Runtime) -> None:
    """Tell the runtime when the scheduler's `set_timesteps` and `step` are called. Idempotent."""
    listeners = type(scheduler).__dict__.get(MARK)
    if listeners is None:
        listeners = Listeners()
        cls = type(scheduler)
        members: dict[str, Any] = {MARK: listeners}
        if hasattr(cls, "set_timesteps"):
            members["set_timesteps"] = _announcing(cls.set_timesteps, listeners)
        if hasattr(cls, "step"):
            members["step"] = _stepping(cls.step, listeners)
        give_subclass(scheduler, members)
    listeners.runtimes.add(runtime)


def _hears(runtime: Runtime, scheduler: Any) -> bool:
    """False where another pipeline's watch has stopped listening to this scheduler for the same runtime."""
    listeners = type(scheduler).__dict__.get(MARK)
    return listeners is not None and runtime in listeners.runtimes


def unlisten(scheduler: Any, runtime: Runtime) -> None:
    """Undo `listen`; the scheduler gets its class back when nobody listens any more."""
    listeners = type(scheduler).__dict__.get(MARK)
    if listeners is None:
        return
    listeners.runtimes.discard(runtime)
    if not listeners.runtimes:
        scheduler.__class__ = original_class(scheduler)


def _announcing(function: Any, listeners: Listeners) -> Any:
    @functools.wraps(function)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        timesteps = getattr(self, "timesteps", None)
        listeners.announce(None if timesteps is None else len(timesteps))
        return result

    return set_timesteps


def _stepping(function: Any, listeners: Listeners) -> Any:
    @functools.wraps(function)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        listeners.step()
        return result

    return step


class SchedulerWatch:
    """Keeps listening to a pipeline's scheduler, also after the user has replaced it by another."""

    def __init__(self, pipeline: Any, runtime: Runtime) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._runtime = weakref.ref(runtime)
        self._scheduler: weakref.ref[Any] | None = None

    def pipeline(self) -> Any:
        """The pipeline, or None where it is gone."""
        return self._pipeline()

    def __call__(self) -> None:
        """Called before every UNet call: cheap where nothing has changed."""
        pipeline, runtime = self._pipeline(), self._runtime()
        scheduler = getattr(pipeline, "scheduler", None)
        known = self._scheduler() if self._scheduler is not None else None
        if runtime is None or (scheduler is known and (scheduler is None or _hears(runtime, scheduler))):
            return
        if known is not None and known is not scheduler:
            unlisten(known, runtime)
        self._scheduler = None
        if scheduler is not None:
            listen(scheduler, runtime)
            self._scheduler = weakref.ref(scheduler)
            timesteps = getattr(scheduler, "timesteps", None)
            runtime.run_announced(None if timesteps is None else len(timesteps))

    def stop(self) -> None:
        scheduler, runtime = (self._scheduler() if self._scheduler else None), self._runtime()
        if scheduler is not None and runtime is not None:
            unlisten(scheduler, runtime)
        self._scheduler = None
