"""A call of the model in canonical form: its tensors in a fixed order, and a key for everything else about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcache_fx.errors import DeepCacheError

ExampleInputs = Mapping[str, Any] | Sequence[Any]
"""Arguments of a UNet call, by name or by position."""

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "noise_labels", "sigma")


class UnsupportedInput(Exception):
    """An argument that cannot be part of a key: neither a tensor, nor hashable, nor a container of such."""


@dataclass(frozen=True)
class Call:
    """One call, canonical: equal `key` means the same graph serves, with `tensors` as its inputs in order."""

    arguments: inspect.BoundArguments
    tensors: tuple[torch.Tensor, ...]
    key: Hashable
    timestep: torch.Tensor | None
    sample: torch.Tensor


class CallReader:
    """Brings calls of one `forward` function into canonical form.

    Defaults are filled in, dictionaries are read in sorted order, and a timestep given as a Python number becomes a 0-d
    tensor of the type diffusers gives it (int64 or float64), so that a new number is not a new graph.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.signature = inspect.signature(forward)
        named = [
            p.name
            for p in list(self.signature.parameters.values())[1:]  # without self
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if not named:
            raise UnsupportedInput("forward takes no named argument")
        self.sample_name = named[0]
        self.timestep_name = next((n for n in named[1:] if n in TIMESTEP_NAMES), named[1] if len(named) > 1 else None)
        self.timestep_named = self.timestep_name in TIMESTEP_NAMES

    def read(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call `module(*args, **kwargs)`.

        Raises:
            TypeError: the arguments do not fit `forward`, as Python would say.
            UnsupportedInput: an argument cannot be part of a key, or the first one is no tensor.
        """
        bound = self.signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        del arguments[next(iter(arguments))]
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
        tensors: list[torch.Tensor] = []
        key = tuple(_describe(value, tensors) for value in arguments.values())
        return Call(bound, tuple(tensors), (key, _ambient(sample.device.type)), timestep, sample)

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
        """The call's (args, kwargs), without self, with dictionaries sorted and its tensors replaced in order."""
        remaining = iter(tensors)
        arguments = {name: _replace(value, remaining) for name, value in call.arguments.arguments.items()}
        parameters = [p for p in list(self.signature.parameters.values())[1:] if p.name in arguments]
        bound = inspect.BoundArguments(inspect.Signature(parameters), arguments)
        return bound.args, bound.kwargs


def _ambient(device_type: str) -> Hashable:
    """What the surrounding code sets and a capture bakes in."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, dict):
        return ("dict", tuple((k, _describe(value[k], tensors)) for k in sorted(value, key=str)))
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_describe(item, tensors) for item in value))
    try:
        hash(value)
    except TypeError:
        raise UnsupportedInput(f"{type(value).__name__} {value!r:.80} is neither a tensor nor hashable") from None
    return (type(value), value)


def _replace(value: Any, tensors: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {k: _replace(value[k], tensors) for k in sorted(value, key=str)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(item, tensors) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(item, tensors) for item in value)
    return value
