"""What a captured graph bakes in beyond its inputs: the model's structure and settings. And the weights it reads."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import count
from operator import is_
from typing import Any

import torch

from deepcache_fx.graph.identity import Same as Same
from deepcache_fx.graph.weights import inner_names
from deepcache_fx.guards.namespaces import is_library
from deepcache_fx.guards.unchanged import IdentitySnapshot

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


class Structure:
    """What a model's graph depends on. Compared in full: the hashes of -1 and -2 are equal.

    Of a weight that is its kind (type, dtype, device, shape, strides), and which of the names share one tensor.
    """

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[object, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    @property
    def parts(self) -> tuple[object, ...]:
        return self._parts

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Structure) and self._hash == other._hash and self._parts == other._parts
        )


@dataclass(frozen=True)
class Settings:
    """The structure of a model, and a number that stands for the very weights it has: others make another number."""

    structure: Hashable
    weights: int


_numbers = count()


class Fingerprint:
    """A model's fingerprint, kept: while all that was read is still the same, it is not read again.

    To find a Stable Diffusion UNet unchanged takes a tenth of the time of reading it, to find its settings unchanged a
    tenth of that.
    """

    def __init__(self) -> None:
        self.last: Known | None = None

    def known(self, module: torch.nn.Module, *, at_run_start: bool) -> Settings | None:
        """The settings, where nothing has changed; None where something has.

        Without `at_run_start` settings alone are compared: not structure, weights, hooks and PyTorch's own layers.
        """
        known = self.last
        if known is None or known.module is not module:
            return None
        if at_run_start:
            unchanged = known.settings_read.holds() and known.layers_read.holds()
        else:
            unchanged = known.settings_read.holds_settings()
        return known.settings if unchanged else None

    def objects(self) -> list[object]:
        """Every submodule, and every other object with attributes in them, as last read."""
        known = self.last
        return [*known.settings_read.objects, *known.layers_read.objects] if known is not None else []

    def read(self, module: torch.nn.Module) -> Settings:
        """The settings as of now: equal structure whatever values the weights have and which objects they are.

        Seen: submodules added, replaced or removed, weights of another kind, weights that share one tensor where they
        did not or the reverse, and every plain value in an instance attribute: training mode, LoRA scales and active
        adapters, IP-Adapter scale, attention processors, FreeU factors. So is what functions held there have in their
        closures and defaults, and what classes hold that are no library's.
        """
        before, now = self.last, _read(module)
        if before is not None and now.settings.structure == before.settings.structure:
            structure = before.settings.structure  # the same object: then every look-up is quick
            settings = replace(now.settings, structure=structure)
            if all(map(is_, now.weights, before.weights)):
                settings = before.settings
            now = replace(now, settings=settings)
        self.last = now
        return now.settings

    def weights(self) -> tuple[torch.Tensor, ...]:
        """Every parameter and buffer, as last read, each once; behind a wrapper what it wraps. Places are structure."""
        return self.last.weights if self.last is not None else ()

    def renumber(self) -> None:
        """Take the weights, though they are the same objects, for others from now on."""
        if self.last is not None:
            self.last = replace(self.last, settings=replace(self.last.settings, weights=next(_numbers)))

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
    settings_read: IdentitySnapshot
    layers_read: IdentitySnapshot
    weights: tuple[torch.Tensor, ...]


def _read(module: torch.nn.Module) -> Known:
    settings, layers = IdentitySnapshot(), IdentitySnapshot()
    frozen: list[object] = []
    weights: list[torch.Tensor] = []
    places: dict[int, int] = {}
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
                    frozen += (key, _read_weight(tensor, layers, weights, places))
    for kind in {cls: None for item in settings.objects for cls in type(item).__mro__}:
        if not is_library(kind.__module__) and not _is_attached(kind):
            frozen.append((kind, _freeze_class(kind, settings)))
    numbered = Settings(Structure(tuple(frozen)), next(_numbers))
    return Known(module, numbered, settings, layers, tuple(weights))


def _read_weight(
    tensor: torch.Tensor, read: IdentitySnapshot, weights: list[torch.Tensor], places: dict[int, int]
) -> tuple[object, ...]:
    """What a graph bakes in of a weight: its place among the `weights`, and its kind where it has none there yet."""
    place = places.setdefault(id(tensor), len(weights))
    if place < len(weights):
        return (place,)
    weights.append(tensor)
    kind = (place, type(tensor), *read.weight(tensor))
    names = inner_names(tensor)
    if not names:
        return kind
    inner = [read.inner(tensor, name) for name in names]
    about = _freeze(tensor.__tensor_flatten__()[1], _DEPTH, IdentitySnapshot())  # type: ignore[attr-defined]
    return (*kind, *names, about, *(_read_weight(item, read, weights, places) for item in inner))


def _freeze_class(cls: type, read: IdentitySnapshot) -> object:
    """The class attributes, and what its functions hold."""
    return tuple((name, _held(value, 2, read)) for name, value in read.dictionary(vars(cls)) if _is_own(name, value))


def _is_own(name: str, value: object) -> bool:
    return callable(value) or not name.startswith(("__", "_abc_"))


def _is_attached(cls: type) -> bool:
    """True for the subclass that `attach` makes: it comes and goes, and a graph does not depend on it."""
    return _MARK in vars(cls)


def _held(value: Any, depth: int, read: IdentitySnapshot) -> object:
    """What code holds: of a library's object no more than which one it is, for a scheduler counts its steps."""
    if isinstance(value, _READ) or not is_library(type(value).__module__):
        return _freeze(value, depth, read)
    return Same(value)


def _freeze(value: Any, depth: int, read: IdentitySnapshot) -> object:
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
