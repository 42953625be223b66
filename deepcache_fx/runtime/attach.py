"""Attach a runtime to a model in a way that comes off without a trace.

The instance gets a same-named dynamic subclass whose `forward` is the runtime's. Unlike an instance attribute this
survives accelerate's hooks, which replace and restore `instance.forward`; and `isinstance`, `config`, `state_dict`,
saving and loading see the class they know. Copies and pickles are of the original class.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.graph.capture import refuse_layerwise_offload
from deepcache_fx.runtime.runtime import Runtime

MARK = "_deepcache_fx"
"""Attribute of every dynamic subclass of ours: what is attached."""

T = TypeVar("T")


def original_class(instance: T) -> type[T]:
    """The class an instance had before anything was attached."""
    cls = type(instance)
    return cls.__mro__[1] if MARK in cls.__dict__ else cls


def give_subclass(instance: Any, members: dict[str, Any]) -> None:
    """Give the instance a subclass of its own with these members, and the name of its class."""
    cls = original_class(instance)
    hidden = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    ours = {
        "__reduce_ex__": _reduce_as_original,
        "__new__": lambda _, *args, **kwargs: cls(*args, **kwargs),  # type(unet).from_config(...) is a plain one
    }
    subclass = type(cls.__name__, (cls,), {**members, **hidden, **ours})
    subclass.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    instance.__class__ = subclass


def _reduce_as_original(self: Any, protocol: Any) -> Any:
    """Copies and pickles are plain: of the original class, without what `attach` put into the instance."""
    cls = original_class(self)
    state = {k: v for k, v in self.__dict__.items() if not _is_ours(v)}
    if isinstance(self, torch.nn.Module) and "_old_forward" in self.__dict__ and "_old_forward" not in state:
        state.pop("_hf_hook", None)
        state.pop("forward", None)
    return copyreg._reconstructor, (cls, object, None), state  # type: ignore[attr-defined]


def _is_ours(value: Any) -> bool:
    return isinstance(value, types.MethodType) and hasattr(value.__func__, MARK)


class Answers(Protocol):
    """What answers a model's calls in its forward's place."""

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


def attached_to(module: object) -> Answers | None:
    """What is attached to a model."""
    found: Answers | None = type(module).__dict__.get(MARK)
    return found


def runtime_of(module: object) -> Runtime | None:
    """The runtime attached to a model."""
    found = attached_to(module)
    return found if isinstance(found, Runtime) else None


def attach(module: torch.nn.Module, answers: Answers) -> None:
    """Let this answer `module`'s calls.

    Raises:
        DeepCacheError: something else has already replaced the model's forward.
    """
    check_attachable(module)
    detach(module)
    cls = type(module)
    if _is_own_forward(module):
        del module.__dict__["forward"]  # would hide the subclass's

    @functools.wraps(cls.forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return answers(self, args, kwargs)

    setattr(forward, MARK, True)
    give_subclass(module, {MARK: answers, "forward": forward})
    if "_old_forward" in module.__dict__:  # accelerate's hook is in place: it calls this
        module.__dict__["_old_forward"] = types.MethodType(forward, module)


def check_attachable(module: torch.nn.Module) -> None:
    """Raise a DeepCacheError where a model cannot be optimised, and say why."""
    if hasattr(module, "_orig_mod"):
        raise DeepCacheError(
            "this UNet is already wrapped by torch.compile: pass the original (unet._orig_mod). optimize() compiles "
            "the two variants itself"
        )
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise DeepCacheError(
            "compile() was called on this UNet: load it anew. optimize() compiles the two variants itself"
        )
    refuse_layerwise_offload(module)
    replaced = module.__dict__.get("forward")
    if replaced is not None and "_old_forward" not in module.__dict__ and not _is_own_forward(module):
        name = getattr(replaced, "__qualname__", repr(replaced))
        raise DeepCacheError(
            f"forward of this {type(module).__name__} has been replaced by {name}: undo that first "
            "(for DeepCacheSDHelper: helper.disable())"
        )


def _is_own_forward(module: torch.nn.Module) -> bool:
    """True where the instance holds nothing but its own class's forward, as after `DeepCacheSDHelper.disable()`."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) in (type(module).forward, original_class(module).forward)


def detach(module: torch.nn.Module) -> None:
    """Undo `attach`, exactly. Does nothing where nothing is attached."""
    if attached_to(module) is None:
        return
    cls, ours = original_class(module), type(module)
    module.__class__ = cls
    delattr(ours, MARK)  # a class outlives its last instance until garbage is collected: what it answers with need not
    del ours.forward
    if _is_ours(module.__dict__.get("_old_forward")):
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)
    if _is_ours(module.__dict__.get("forward")):
        del module.__dict__["forward"]


def pause(module: torch.nn.Module) -> Runtime | None:
    """Detach the runtime, which keeps all it has made, and the layout of the weights, to be brought back."""
    runtime = runtime_of(module)
    if runtime is not None:
        runtime.stop_following()
        detach(module)
    return runtime


def bring_back(module: torch.nn.Module, runtime: Runtime) -> None:
    """Attach a runtime that was there before; it goes on following its pipelines."""
    attach(module, runtime)
    runtime.follow_pipelines()
