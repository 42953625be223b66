"""GroupNorm over one or two parts of a tensor: what arguments go together, and the implementation in plain PyTorch.

The operators run it where Triton does not. Unlike `torch.nn.functional.group_norm` it takes the parts of a
concatenation and statistics computed earlier, keeps intermediate values in fp32, and never computes a variance as a
difference of squares (as PyTorch 2.13 does on a CPU for channels-last inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator(x: Tensor) -> torch.dtype:
    """The type that statistics of x are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def segments(channels: int, group_channels: int, first_channel: int) -> int:
    """How many groups have channels in a part of that many channels from `first_channel` on."""
    return -(-(first_channel % group_channels + channels) // group_channels)


def check(
    parts: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    addend: Tensor | None,
    given: Sequence[Tensor | None] = (),
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
    start = 0
    for part, table in zip(parts, given, strict=False):
        shape = (2, first.shape[0], segments(part.shape[1], channels // num_groups, start))
        if table is not None and (tuple(table.shape), table.dtype) != (shape, accumulator(part)):
            raise ValueError(
                f"statistics of {tuple(part.shape)} must be {accumulator(part)} {shape}, as group_statistics(x, "
                f"{channels // num_groups}, {start}) returns; got {table.dtype} {tuple(table.shape)}"
            )
        start += part.shape[1]


def check_statistics(x: Tensor, group_channels: int, first_channel: int) -> None:
    """Raise ValueError where the arguments of `group_statistics` are out of range."""
    if x.ndim < 3 or not x.is_floating_point():
        raise ValueError(f"group_statistics takes floating (N, C, *positions), got {x.dtype} {tuple(x.shape)}")
    if group_channels < 1 or first_channel < 0:
        raise ValueError(
            f"group_channels must be positive and first_channel not negative, got {group_channels}, {first_channel}"
        )


def statistics(x: Tensor, group_channels: int, first_channel: int) -> Tensor:
    """(2, N, segments): mean and biased variance of x's part of every group."""
    channels = x.shape[1]
    head = min(-first_channel % group_channels, channels)
    whole = (channels - head) // group_channels * group_channels
    found = []
    for piece in torch.split(x, [head, whole, channels - head - whole], dim=1):
        if piece.shape[1]:
            groups = max(1, piece.shape[1] // group_channels)
            values = torch.unflatten(piece.to(accumulator(x)), 1, (groups, -1))
            variance, mean = torch.var_mean(values, dim=list(range(2, values.ndim)), correction=0)
            found.append(torch.stack([mean, variance]))
    return torch.cat(found, dim=2)


def write_norm(
    out: Tensor,
    parts: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    addend: Tensor | None,
    given: Sequence[Tensor | None],
) -> None:
    """Write the normalised concatenation of the parts (+ addend (N, C), + SiLU) into `out`.

    `given` has one entry per part: its `statistics`, or None. An addend takes one part with none given.
    """
    kind = accumulator(out)
    channels = out.shape[1]
    group = channels // num_groups
    column = (..., *[None] * (out.ndim - 2))
    if addend is not None:
        parts = [parts[0].to(kind) + addend.to(kind)[column]]
    starts = [0, parts[0].shape[1]]
    tables = [
        statistics(part, group, start) if table is None else table
        for part, start, table in zip(parts, starts, given, strict=False)
    ]
    mean, variance = _joined(tables, starts[1], group)
    scale = (variance + eps).rsqrt().repeat_interleave(group, 1)
    if weight is not None:
        scale = scale * weight.to(kind)
    center = mean.repeat_interleave(group, 1)
    for part, start in zip(parts, starts, strict=False):
        here = slice(start, start + part.shape[1])
        y = (part.to(kind) - center[:, here][column]) * scale[:, here][column]
        if bias is not None:
            y += bias[here].to(kind)[column]
        out[:, here].copy_(F.silu(y) if silu else y)


def _joined(tables: Sequence[Tensor], boundary: int, group: int) -> Tensor:
    """The statistics of all groups, the two halves of one that straddles the boundary merged (Chan et al., 1979)."""
    straddling = boundary % group
    if len(tables) == 1 or not straddling:
        return torch.cat(list(tables), dim=2)
    (mean_a, variance_a), (mean_b, variance_b) = tables[0][..., -1:], tables[1][..., :1]
    share = straddling / group
    mean = share * mean_a + (1 - share) * mean_b
    variance = share * (variance_a + (mean_a - mean) ** 2) + (1 - share) * (variance_b + (mean_b - mean) ** 2)
    return torch.cat([tables[0][..., :-1], torch.stack([mean, variance]), tables[1][..., 1:]], dim=2)
