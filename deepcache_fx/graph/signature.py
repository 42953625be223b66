"""A call of the model in canonical form: its tensors in a fixed order, and a key for everything else about it."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from deepcache_fx.errors import DeepCacheError, FakeTensorError
from deepcache_fx.graph.constants import PLAIN, constant
from deepcache_fx.graph.constants import UnsupportedInput as UnsupportedInput
from deepcache_fx.graph.containers import Copies, leaves, members
from deepcache_fx.graph.ignoring import Describe, Ignored
from deepcache_fx.graph.lazy import plain_type
from deepcache_fx.graph.records import attributes, is_record

ExampleInputs = Mapping[str, Any] | Sequence[Any]
"""Arguments of a UNet call, by name or by position."""

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "noise_labels", "sigma")


_MISSING = inspect.Parameter.empty
_VALUES = (torch.Tensor, int, float, complex, str, bytes, Enum, type)
"""Types whose instances hold nothing (see also `constants.PLAIN`)."""
_MOST_REFUSED = 4


@dataclass(slots=True)
class Call:
    """One call, canonical: equal `key` means the same graph serves, with `tensors` as its inputs in order."""

    arguments: Mapping[str, Any]
    tensors: tuple[torch.Tensor, ...]
    key: Hashable
    timestep: torch.Tensor | None
    sample: torch.Tensor
    prompt_inputs: tuple[int, ...]
    """Which of `tensors` are likely to stay through a run: conditioning, that is all but the sample, the timestep and
    feature maps (a ControlNet's residuals)."""
    maps: tuple[int, ...] = ()
    """Which of `tensors` are feature maps besides the sample."""
    is_plain: bool = True
    """False where one of `tensors` may be deferred."""
    numbers: tuple[int, ...] = ()
    """Which of `tensors` were given as Python numbers, besides the timestep (see `conditioning`)."""

    def objects(self) -> list[object]:
        """The functions and other objects among the arguments: a graph bakes in what they are and hold."""
        found = self._leaves(".")
        return [value for _, value in found if type(value) not in PLAIN and not isinstance(value, _VALUES)]

    def tensor_names(self) -> list[str]:
        """A name for each of `tensors`, after the way to it, that Python can read: added_cond_kwargs_text_embeds."""
        names: dict[str, None] = {}
        for path, value in self._leaves("_"):
            if isinstance(value, torch.Tensor):
                name = re.sub(r"\W", "_", path)
                name = f"_{name}" if keyword.iskeyword(name) or name[0].isdigit() else name
                while name in names:
                    name += "_"
                names[name] = None
        return list(names)

    def _leaves(self, joint: str) -> Iterator[tuple[str, Any]]:
        for name, value in self.arguments.items():
            yield from leaves(value, name, joint=joint)


class CallReader:
    """Brings calls of one `forward` function into canonical form.

    Defaults are filled in, dictionaries are read in sorted order, and a timestep given as a Python number becomes a 0-d
    tensor of the type diffusers gives it (int64 or float64), so that a new number is not a new graph. Beside a sample
    on CUDA a timestep on the CPU becomes one on the sample's device, without a synchronisation: a recorded graph could
    not read it else. What is no tensor is part of the key by its value, or by what it holds (see `constants`).

    Args:
        forward: As a class has it, `self` first.
        ignore: Names of arguments, and dotted paths into dictionaries, that are left out of the key but for tensors.

    Raises:
        UnsupportedInput: forward takes no named argument.
        OptionError: forward has no such argument to ignore.
    """

    def __init__(self, forward: Callable[..., Any], ignore: Sequence[str] = ()) -> None:
        self.signature = inspect.signature(forward)
        parameters = list(self.signature.parameters.values())[1:]  # without self
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not named:
            raise UnsupportedInput("forward takes no named argument")
        self.sample_name = named[0]
        self.timestep_name = next((n for n in named[1:] if n in TIMESTEP_NAMES), named[1] if len(named) > 1 else None)
        self.timestep_named = self.timestep_name in TIMESTEP_NAMES
        self._parameters = parameters
        self._plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        self._names = tuple(named)
        self._defaults = {p.name: p.default for p in parameters}
        self._fitting: set[tuple[object, ...]] = set()
        """Numbers of positional arguments, and names of the others, that are known to fit."""
        self._required = tuple(name for name, default in self._defaults.items() if default is _MISSING)
        rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        self._refused: dict[Hashable, str] = {}
        self._ignored = Ignored(ignore, known, rest, getattr(forward, "__qualname__", "forward"))
        self._ignores = bool(self._ignored)

    def read(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call `module(*args, **kwargs)`.

        Raises:
            TypeError: the arguments do not fit `forward`, as Python would say.
            FakeTensorError: one of them has no values, and nobody is tracing.
            UnsupportedInput: an argument cannot be part of a key, or the first one is no tensor.
        """
        if (len(args), *kwargs) in self._fitting:
            arguments = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        else:
            arguments = self._bind(module, args, kwargs)
        sample = arguments[self.sample_name]
        if not isinstance(sample, torch.Tensor):
            raise UnsupportedInput(f"argument {self.sample_name} is no tensor but {type(sample).__name__}")
        timestep = None
        if self.timestep_name is not None:
            timestep = arguments[self.timestep_name]
            if isinstance(timestep, (int, float)) and not isinstance(timestep, bool):
                kind = torch.float64 if isinstance(timestep, float) else torch.int64
                timestep = torch.tensor(timestep, dtype=kind)
                arguments[self.timestep_name] = timestep
            elif not isinstance(timestep, torch.Tensor) or (timestep.ndim > 1 and not self.timestep_named):
                timestep = None
            if timestep is not None and sample.device.type == "cuda" and timestep.device.type == "cpu":
                arguments[self.timestep_name] = _on_device(timestep, sample.device)
        tensors: list[torch.Tensor] = []
        try:
            parts = self._parts(arguments, tensors, module)
        except (UnsupportedInput, RecursionError):
            tensors.clear()  # once more, to say which argument it is
            parts = self._named_parts(arguments, tensors, module)
        given = arguments[self.timestep_name] if self.timestep_name is not None else None
        prompt, maps, is_plain = list[int](), list[int](), True
        for index, tensor in enumerate(tensors):
            is_plain = is_plain and type(tensor) is torch.Tensor
            if tensor is not sample and tensor is not given:
                (prompt if tensor.ndim < 4 else maps).append(index)
        device_type = sample.device.type  # what the surrounding code sets, and a capture bakes in:
        is_cast = torch._C._is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        key = (parts, torch.get_autocast_dtype(device_type) if is_cast else None)
        if self._refused:
            self._check_refused(key)
        return Call(arguments, tuple(tensors), key, timestep, sample, tuple(prompt), tuple(maps), is_plain)

    def refuse(self, call: Call, reason: str) -> None:
        """Have every call like this one be an UnsupportedInput from now on; after many such, every call."""
        self._refused[call.key] = reason

    def _check_refused(self, key: Hashable) -> None:
        reason = self._refused.get(key)
        if reason is None and len(self._refused) >= _MOST_REFUSED:
            reason = next(iter(self._refused.values()))  # their keys grow, as a list that forward appends to
        if reason is not None:
            raise UnsupportedInput(reason)

    def _parts(self, arguments: Mapping[str, Any], tensors: list[torch.Tensor], module: torch.nn.Module) -> Hashable:
        """The key of the arguments, whose tensors are added to `tensors`. Runs at every call."""
        if self._ignores:
            return self._named_parts(arguments, tensors, module)
        parts: list[Hashable] = []
        for value in arguments.values():
            if value is None:
                parts.append(None)
            elif type(value) is torch.Tensor:  # as most are; what `_describe` says of it
                tensors.append(value)
                parts.append((torch.Tensor, value.shape, value.stride(), value.dtype, value.device))
            else:
                parts.append(_describe(value, tensors, module))
        return tuple(parts)

    def _named_parts(
        self, arguments: Mapping[str, Any], tensors: list[torch.Tensor], module: torch.nn.Module
    ) -> Hashable:
        describe = functools.partial(_describe, known=module)
        return tuple([self._argument_key(*item, tensors, describe) for item in arguments.items()])

    def _argument_key(self, name: str, value: Any, tensors: list[torch.Tensor], describe: Describe) -> Hashable:
        try:
            return self._ignored.describe(name, value, tensors, describe)
        except UnsupportedInput as error:
            raise UnsupportedInput(f"argument {name} cannot be part of a key: {error}") from None
        except RecursionError:
            raise UnsupportedInput(f"argument {name} holds itself, or is nested too deeply") from None

    def _bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument by name, in order, without self: what `inspect.Signature.bind` does, ten times as fast."""
        if self._plain and len(args) <= len(self._names):
            given = {*self._names[: len(args)], *kwargs}
            fits = given <= set(self._names) and len(given) == len(args) + len(kwargs)
            if fits and given.issuperset(self._required):
                self._fitting.add((len(args), *kwargs))
                return {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        bound = self.signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        del bound.arguments[next(iter(bound.arguments))]
        return bound.arguments

    def read_example(self, module: torch.nn.Module, example_inputs: ExampleInputs) -> Call:
        """The call that a user describes by its arguments, by name or position.

        Raises:
            DeepCacheError: they do not fit.
        """
        args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
        try:
            return self.read(module, args, kwargs)
        except (TypeError, UnsupportedInput) as error:
            raise DeepCacheError(f"example_inputs do not fit {type(module).__name__}: {error}") from error

    def rebuild(self, call: Call, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's (args, kwargs), without self, with dictionaries sorted and its tensors replaced in order.

        Dictionaries and other containers are copies. All but the first are given by name, as pipelines do: diffusers
        looks for a LoRA's scale among the keywords alone.
        """
        copies = Copies(iter(tensors))
        arguments = {name: copies.of(value) for name, value in call.arguments.items()}
        parameters = [p for p in self._parameters if p.name in arguments]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            parameters[1:] = [
                p.replace(kind=p.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p for p in parameters[1:]
            ]
        bound = inspect.BoundArguments(inspect.Signature(parameters), arguments)
        return bound.args, bound.kwargs


def _on_device(timestep: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that nothing waits for."""
    if timestep.numel() == 1:
        return torch.full(timestep.shape, timestep.item(), dtype=timestep.dtype, device=device)
    return timestep.to(device, non_blocking=not timestep.is_pinned())  # pinned memory would be read later


def _describe(value: Any, tensors: list[torch.Tensor], known: object = None) -> Hashable:
    """A value's part of the key, and its tensors. `known` is the model, whose state is not the key's to describe."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        kind = type(value)
        if kind is not torch.Tensor:
            kind = _unusual(value)
        return (kind, value.shape, value.stride(), value.dtype, value.device)
    kind = type(value)
    if kind in PLAIN:
        return (kind, value)
    if kind is dict:
        items = [(_name(name), _describe(value[name], tensors, known)) for name in sorted(value, key=str)]
        return (dict, tuple(items))
    if kind is list or kind is tuple:
        return (kind, tuple([_describe(item, tensors, known) for item in value]))
    found = members(value)
    if found is None:
        return constant(value, known)
    held = [item for _, item in found]
    own = [] if is_record(value) else [own for own in attributes(value) if not any(own[1] is item for item in held)]
    parts = tuple([(_name(name), _describe(item, tensors, known)) for name, item in found])
    return (kind, parts, constant(own, known) if own else None)


def _name(key: Any) -> Hashable:
    return key if type(key) is str else constant(key)


def _unusual(tensor: torch.Tensor) -> type[torch.Tensor]:
    """The class of a tensor that is no plain one (see `plain_type`)."""
    if isinstance(tensor, FakeTensor):
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            raise UnsupportedInput("called with FakeTensors, under a FakeTensorMode")
        raise FakeTensorError(
            f"a FakeTensor came in, of shape {tuple(tensor.shape)}: it has no values. torch.export or torch.compile "
            "traced a model, and that kept it in a variable, an attribute or a list that was read since: look where "
            "the pipeline takes this argument from. No capture of deepcache_fx leaves any behind"
        )
    return plain_type(tensor)
