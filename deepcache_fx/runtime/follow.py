"""Follow a scheduler, which marks the steps. It too gets a dynamic subclass (see `attach`), and loses it again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from deepcache_fx.runtime.attach import MARK, give_subclass, original_class
from deepcache_fx.runtime.forecast_order import NoiseDetector, has_uneven_steps
from deepcache_fx.runtime.runtime import Runtime


class Listeners:
    """The runtimes that follow a scheduler. Weak: a scheduler keeps no model alive."""

    def __init__(self) -> None:
        self.runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()

    def announce(self, scheduler: Any) -> None:
        for runtime in tuple(self.runtimes):
            _announce(runtime, scheduler)

    def step(self, run: Callable[[], Any], *, has_noise: bool) -> Any:
        """A step of the scheduler; in a run's first ones it is heard whether noise is drawn, or was given."""
        runtimes = tuple(self.runtimes)
        curious = [runtime for runtime in runtimes if runtime.wants_to_hear_of_noise()]
        if curious and not has_noise:
            with NoiseDetector() as noise:
                result = run()
            has_noise = noise.seen
        else:
            result = run()
        for runtime in curious if has_noise else ():
            runtime.noise_drawn()
        for runtime in runtimes:
            runtime.step_ended()
        return result


def _announce(runtime: Runtime, scheduler: Any) -> None:
    timesteps = getattr(scheduler, "timesteps", None)
    num_steps = None if timesteps is None else len(timesteps)
    runtime.run_announced(num_steps, are_uneven=has_uneven_steps(scheduler))


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
    """False where another pipeline's follower has stopped listening to this scheduler for the same runtime."""
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
        listeners.announce(self)
        return result

    return set_timesteps


def _stepping(function: Any, listeners: Listeners) -> Any:
    @functools.wraps(function)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(function, self, *args, **kwargs)
        return listeners.step(run, has_noise=kwargs.get("variance_noise") is not None)

    return step


class SchedulerFollower:
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
            _announce(runtime, scheduler)

    def stop(self) -> None:
        scheduler, runtime = (self._scheduler() if self._scheduler else None), self._runtime()
        if scheduler is not None and runtime is not None:
            unlisten(scheduler, runtime)
        self._scheduler = None
