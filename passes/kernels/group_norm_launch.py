"""Choose tiles and launch the Triton kernels for GroupNorm.

Imports triton: `passes.kernels.group_norm` imports this file when a tensor on a GPU first needs it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from passes.kernels import group_norm_triton as kernels

RUN = 128
"""Channels that a tile aims at: whole groups of 10, 20, 40 or 60 channels fill 120 of them, in 16-byte vectors."""
TILE = 4096
"""Elements per step of a program: 16 per thread of 8 warps, which leaves registers for three programs per processor."""
HELD = 16384
"""Elements that one program may hold at once: 32 per thread of 16 warps."""
MAX_SPLITS = 64
"""Parts of the positions that every program of `normalize` merges."""
MAX_GROUP = TILE
"""Channels per group beyond which one row of a tile would be too wide."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(x: torch.Tensor, group_channels: int) -> bool:
    """True where the kernels' 32-bit offsets within a sample, their tiles and their arithmetic do for this tensor."""
    fits = 0 < x[:1].numel() < 2**31 and x.shape[0] < 2**16
    return fits and x.dtype in DTYPES and group_channels <= MAX_GROUP


@dataclass(frozen=True)
class Tiles:
    """How a row of channels is cut into tiles of whole groups."""

    groups: int
    """Groups per tile."""
    padded_groups: int
    block_c: int
    """Channels per tile, padded to a power of two."""
    count: int


def tiles(group: int, num_groups: int, run: int) -> Tiles:
    """Tiles of about `run` channels; multiples of 8 channels where there is more than one, to keep accesses aligned."""
    groups = max(1, min(num_groups, run // group))
    if groups < num_groups:
        groups = next((k for k in range(groups, 0, -1) if k * group % 8 == 0), groups)
    return Tiles(groups, _power(groups), _power(groups * group), _ceil(num_groups, groups))


def share(size: int, block: int, most: int) -> tuple[int, int]:
    """Programs, at most `most`, that share `size` rows, and the steps of `block` rows that each of them makes."""
    blocks = _ceil(size, block)
    steps = _ceil(blocks, max(1, min(most, blocks)))
    return _ceil(blocks, steps), steps


def reads_once(size: int, channels: int, num_groups: int) -> bool:
    """True where one kernel does it all: a program can hold its groups. Else one takes the statistics first."""
    return _power(size) * tiles(channels // num_groups, num_groups, RUN // 2).block_c <= HELD


def normalize(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    addend: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> None:
    """Write GroupNorm of cat(a, b) (+ addend, + SiLU) into `out`: see `passes.kernels.group_norm`.

    All feature maps have the layout of `out`; `addend` is (N, C) with any strides.
    """
    samples, channels = out.shape[:2]
    size = out[0, 0].numel()
    group = channels // num_groups
    strides = (0, 0) if addend is None else addend.stride()
    inputs = (a, b, addend, weight, bias, out)
    shape = (a.shape[1], 0 if b is None else b.shape[1], size, *strides)

    if reads_once(size, channels, num_groups):
        held, block_s = tiles(group, num_groups, RUN // 2), _power(size)
        with _device(out):
            kernels.whole_groups[(held.count, samples)](
                *inputs, *shape, eps,
                GROUP=group, GROUPS=held.groups, PADDED_GROUPS=held.padded_groups,
                BLOCK_C=held.block_c, BLOCK_S=block_s, CHANNELS_LAST=channels_last, SILU=silu,
                num_warps=min(16, max(4, block_s * held.block_c // 1024)),
            )  # fmt: skip
        return

    wide = tiles(group, num_groups, RUN)
    block_s = _block_s(size, wide.block_c)
    programs = samples * wide.count
    splits, split_steps = share(size, block_s, min(MAX_SPLITS, 3 * _processors(out.device) // programs))
    parts, steps = share(size, block_s, 8 * _processors(out.device) // programs)
    table = torch.empty(2, samples, splits, num_groups, dtype=torch.float32, device=out.device)
    with _device(out):
        kernels.statistics[(wide.count, splits, samples)](
            a, b, addend, table, *shape,
            GROUP=group, GROUPS=wide.groups, PADDED_GROUPS=wide.padded_groups,
            BLOCK_C=wide.block_c, BLOCK_S=block_s, STEPS=split_steps, CHANNELS_LAST=channels_last, num_warps=8,
        )  # fmt: skip
        kernels.normalize[(wide.count, parts, samples)](
            *inputs, table, *shape, eps, splits, split_steps * block_s,
            GROUP=group, GROUPS=wide.groups, PADDED_GROUPS=wide.padded_groups, PADDED_SPLITS=_power(splits),
            BLOCK_C=wide.block_c, BLOCK_S=block_s, STEPS=steps, CHANNELS_LAST=channels_last, SILU=silu, num_warps=8,
        )  # fmt: skip


def _block_s(size: int, block_c: int) -> int:
    return max(1, min(_power(size), TILE // block_c))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(value: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (value - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; those of an H200 where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
