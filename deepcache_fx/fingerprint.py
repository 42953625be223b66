"""What a captured graph bakes in beyond its inputs: the model's structure and its Python-level settings."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

_NOT_STATE = frozenset(
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
    }
)
"""Instance attributes that a graph of forward does not depend on."""

_DEPTH = 4


class Settings:
    """What `fingerprint` returns. Compared in full: the hashes of -1 and -2 are equal."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[object, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Settings) and self._hash == other._hash and self._parts == other._parts
        )


class _Same:
    """Equal for the same object alone, which it keeps alive: an address may be given to another one."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


def fingerprint(module: torch.nn.Module) -> Hashable:
    """Equal for equal structure, settings and parameter objects; in-place changes of values leave it as it is.

    Seen: submodules added, replaced or removed, parameters replaced, and every plain value in an instance attribute:
    training mode, LoRA scales and active adapters, IP-Adapter scale, attention processors, FreeU factors.
    """
    parts: list[object] = []
    for name, sub in module.named_modules():
        parts.append(name)
        if sub is not module:  # whose class may be our own subclass
            parts.append(type(sub))
        for key, value in sub.__dict__.items():
            if key == "forward" and (sub is module or "_old_forward" in sub.__dict__):
                continue  # our own, or accelerate's
            if key not in _NOT_STATE and value is not None:
                parts.append((key, _freeze(value, _DEPTH)))
        for parameters in (sub._parameters, sub._buffers):
            for key, tensor in parameters.items():
                if tensor is not None:
                    parts.append((key, id(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()))
    return Settings(tuple(parts))


def _freeze(value: Any, depth: int) -> Hashable:
    if isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return (type(value), value)
    if isinstance(value, torch.Tensor):
        return (_Same(value), None if value.is_inference() else value._version)
    if isinstance(value, torch.nn.Module) or depth == 0:
        return _Same(value)
    if isinstance(value, dict):
        return tuple((str(k), _freeze(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(str, value)))
    if callable(value) and hasattr(value, "__code__"):
        return _Same(value)
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return _Same(value)
    return (type(value), tuple((k, _freeze(v, depth - 1)) for k, v in attributes.items()))
