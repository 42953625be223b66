"""GroupNorm over one or two parts of a tensor: what arguments go together, and the implementation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def check(
    parts: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    addend: Tensor | None,
) -> None:
    """Raise ValueError where the arguments of a norm over these parts do not fit together."""
    first = parts[0]
    channels = sum(part.shape[1] for part in parts)
    for part in parts:
        if part.ndim < 3 or not part.is_floating_point():
            raise ValueError(f"group_norm takes floating (N, C, *positions), got {part.dtype} {tuple(part.shape)}")
        if (part.shape[0], *part.shape[2:], part.dtype) != (first.shape[0], *first.shape[2:], first.dtype):
            raise ValueError(
                "cat_group_norm takes tensors that differ in channels only, got "
                f"{first.dtype} {tuple(first.shape)} and {part.dtype} {tuple(part.shape)}"
            )
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}")
    if addend is not None:
        rest = tuple(addend.shape[2:])
        if addend.ndim < 2 or addend.shape[0] not in (1, first.shape[0]) or addend.shape[1] != channels or (
            any(size != 1 for size in rest) or addend.ndim > first.ndim
        ):  # fmt: skip
            raise ValueError(
                f"addend must be (N or 1, C) with further axes of size 1, N = {first.shape[0]} and C = {channels}, "
                f"got {tuple(addend.shape)}"
            )


def write_norm(
    out: Tensor,
    parts: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    addend: Tensor | None,
) -> None:
    """Write the normalised concatenation of the parts (+ addend (N, C), + SiLU) into `out`, by way of fp32 or fp64."""
    kind = torch.promote_types(out.dtype, torch.float32)
    x = torch.cat([part.to(kind) for part in parts], 1)
    if addend is not None:
        x = x + addend.to(kind)[(..., *[None] * (out.ndim - 2))]
    weight, bias = (None if vector is None else vector.to(kind) for vector in (weight, bias))
    # Of channels-last inputs PyTorch 2.13 computes the variance as a difference of squares, on a CPU.
    y = torch.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    out.copy_(F.silu(y) if silu else y)
