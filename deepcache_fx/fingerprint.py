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
        "forward",
        "_internal_dict",
        "_compiled_call_impl",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    }
)
"""Instance attributes that a graph of forward does not depend on."""

_DEPTH = 4


def fingerprint(module: torch.nn.Module) -> Hashable:
    """Equal for equal structure, settings and parameter objects; in-place changes of weights leave it as it is.

    Seen: submodules added, replaced or removed, parameters replaced, and every plain value in an instance attribute:
    training mode, LoRA scales and active adapters, IP-Adapter scale, attention processors, FreeU factors.
    """
    parts: list[object] = []
    for name, sub in module.named_modules():
        parts.append(name)
        if sub is not module:  # whose class may be our own subclass
            parts.append(type(sub))
        for key, value in sub.__dict__.items():
            if key not in _NOT_STATE and value is not None:
                parts.append((key, _freeze(value, _DEPTH)))
        for parameters in (sub._parameters, sub._buffers):
            for key, tensor in parameters.items():
                if tensor is not None:
                    parts.append((key, id(tensor), tensor.dtype, tensor.device, tensor.shape))
    return hash(tuple(parts))


def _freeze(value: Any, depth: int) -> Hashable:
    if isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.Tensor):
        return (id(value), value._version)
    if isinstance(value, torch.nn.Module) or depth == 0:
        return id(value)
    if isinstance(value, dict):
        return tuple((str(k), _freeze(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(str, value)))
    if callable(value) and hasattr(value, "__code__"):
        return id(value)
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return (type(value), id(value))
    return (type(value), tuple((k, _freeze(v, depth - 1)) for k, v in attributes.items()))
