"""What a captured graph bakes in beyond its inputs: the model's structure and its Python-level settings."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepcache_fx.identity import Same as Same
from deepcache_fx.reached_code import is_library
from deepcache_fx.unchanged import Reading

NOT_STATE = frozenset(
    {
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_hf_hook",
        "_old_forward",
        "_compiled_call_impl",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
"""Instance attributes that a graph of forward does not depend on."""

_SELDOM_CHANGED = frozenset({"_forward_hooks", "_forward_pre_hooks", "_internal_dict"})
"""Hooks, and diffusers' configuration: as structure and weights, not looked at within a run."""

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device)
_CODE = (types.FunctionType, types.MethodType, functools.partial)
_READ = (*_PLAIN, *_CODE, torch.Tensor, dict, list, tuple, set, frozenset, types.SimpleNamespace)

_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})
"""Called around a graph, or not captured at all (see `side_effects`): what they keep is no setting."""

_MARK = "_deepcache_fx"
"""As in `attach`."""

_DEPTH = 4


class Settings:
    """What a model's graph depends on. Compared in full: the hashes of -1 and -2 are equal."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[object, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Settings) and self._hash == other._hash and self._parts == other._parts
        )


def fingerprint(module: torch.nn.Module) -> Settings:
    """Equal for equal structure, settings and parameter objects; in-place changes of values leave it as it is.

    Seen: submodules added, replaced or removed, parameters replaced, and every plain value in an instance attribute:
    training mode, LoRA scales and active adapters, IP-Adapter scale, attention processors, FreeU factors. So is what
    functions held there have in their closures and defaults, and what classes hold that are no library's.
    """
    return _read(module).settings


class Fingerprint:
    """A model's fingerprint, kept: while all that was read is still the same, it is not read again.

    To find a Stable Diffusion UNet unchanged takes a tenth of the time of reading it, to find its settings unchanged a
    tenth of that.
    """

    def __init__(self) -> None:
        self.last: Known | None = None

    def known(self, module: torch.nn.Module, *, thorough: bool) -> Settings | None:
        """The fingerprint, where nothing has changed; None where something has.

        Without `thorough` settings alone are compared: not structure, weights, hooks and PyTorch's own layers.
        """
        known = self.last
        if known is None or known.module is not module:
            return None
        if thorough:
            unchanged = known.settings_read.holds() and known.layers_read.holds()
        else:
            unchanged = known.settings_read.holds_settings()
        return known.settings if unchanged else None

    def objects(self) -> list[object]:
        """Every submodule, and every other object with attributes in them, as last read."""
        known = self.last
        return [*known.settings_read.objects, *known.layers_read.objects] if known is not None else []

    def read(self, module: torch.nn.Module) -> Settings:
        """The fingerprint as of now."""
        before, now = self.last, _read(module)
        if before is not None and now.settings == before.settings:
            now = replace(now, settings=before.settings)  # the same object: then every look-up is quick
        self.last = now
        return now.settings

    def expire(self) -> None:
        """Have it read again at the next look, whether or not anything has changed."""
        if self.last is not None:
            self.last = replace(self.last, module=None)


@dataclass(frozen=True)
class Known:
    """A model as it was read."""

    module: torch.nn.Module | None
    """None: to be read again."""
    settings: Settings
    settings_read: Reading
    layers_read: Reading


def _read(module: torch.nn.Module) -> Known:
    settings, layers = Reading(), Reading()
    frozen: list[object] = []
    for name, sub in module.named_modules():
        frozen.append(name)
        if name:  # of the whole the class may be our own subclass
            frozen.append(type(sub))
        own = layers if type(sub).__module__.startswith("torch.nn.") else settings
        for key, value in own.attributes(sub):
            if key == "forward" and (not name or "_old_forward" in sub.__dict__):
                continue  # our own, or accelerate's
            if key not in NOT_STATE and value is not None:
                depth = 1 if key in _HOOKS else _DEPTH
                frozen.append((key, _freeze(value, depth, layers if key in _SELDOM_CHANGED else settings)))
        layers.dictionary(sub._modules)
        for tensors in (sub._parameters, sub._buffers):
            for key, tensor in layers.dictionary(tensors):
                if tensor is not None:
                    frozen.append((key, id(tensor), *layers.weight(tensor)))
    for kind in {cls: None for item in settings.objects for cls in type(item).__mro__}:
        if not is_library(kind.__module__) and not _is_attached(kind):
            frozen.append((kind, _freeze_class(kind, settings)))
    return Known(module, Settings(tuple(frozen)), settings, layers)


def _freeze_class(cls: type, read: Reading) -> object:
    """The class attributes, and what its functions hold."""
    return tuple((name, _held(value, 2, read)) for name, value in read.dictionary(vars(cls)) if _is_own(name, value))


def _is_own(name: str, value: object) -> bool:
    return callable(value) or not name.startswith(("__", "_abc_"))


def _is_attached(cls: type) -> bool:
    """True for the subclass that `attach` makes: it comes and goes, and a graph does not depend on it."""
    return _MARK in vars(cls)


def _held(value: Any, depth: int, read: Reading) -> object:
    """What code holds: of a library's object no more than which one it is, for a scheduler counts its steps."""
    if isinstance(value, _READ) or not is_library(type(value).__module__):
        return _freeze(value, depth, read)
    return Same(value)


def _freeze(value: Any, depth: int, read: Reading) -> object:
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, torch.Tensor):
        version = read.tensor(value)
        if version is not None and value.numel() == 1 and value.device.type != "meta":
            return (Same(value), repr(value.item()))  # as peft's scales, where adapters are swapped while hot
        return (Same(value), version)
    if isinstance(value, (torch.nn.Module, type, types.ModuleType)) or depth == 0:
        return Same(value)
    if isinstance(value, dict):
        items = read.dictionary(value)
        if type(value) not in (dict, OrderedDict):  # diffusers' configurations are read as attributes
            items += read.attributes(value)
        return tuple((str(k), _freeze(v, depth - 1, read)) for k, v in items)
    if isinstance(value, list):
        return tuple(_freeze(item, depth - 1, read) for item in read.sequence(value))
    if isinstance(value, tuple):
        return tuple(_freeze(item, depth - 1, read) for item in value)
    if isinstance(value, set):
        return tuple(sorted(map(str, read.set(value))))
    if isinstance(value, frozenset):
        return tuple(sorted(map(str, value)))
    if isinstance(value, functools.partial):
        return tuple(_freeze(item, depth - 1, read) for item in (value.func, value.args, value.keywords))
    if isinstance(value, types.FunctionType):
        return (Same(value), *(_held(item, depth - 1, read) for item in read.function(value)))
    if isinstance(value, types.MethodType):
        return (_freeze(value.__func__, depth, read), _held(value.__self__, depth - 1, read))
    if callable(value) and hasattr(value, "__code__"):
        return Same(value)
    if not isinstance(getattr(value, "__dict__", None), dict):
        return Same(value)
    return (type(value), tuple((k, _freeze(v, depth - 1, read)) for k, v in read.attributes(value)))
