"""Triton kernels for GroupNorm: one tensor, or a pair that is never concatenated.

A tile is a few positions by whole groups of channels. In either layout its innermost run is long enough for wide,
coalesced accesses although one group has as few as ten channels: values are reduced per channel first, and per group
only once a program is done, by a table of which channel is in which group. There are two ways through the data:

    small   one program holds all of its groups: the input is read once
    large   `statistics` reduces one part of the positions per program, with Welford's recurrence in every lane;
            `normalize` merges the parts by the formula of Chan et al. (1979) and reads the input again, from the L2
            cache where it fits

Storage is fp32, fp16 or bf16; all arithmetic is fp32. Variances come from squared distances to a mean, never from a
difference of squares: a mean far from zero costs a few roundings of that mean, no more.

Tensors are dense, contiguous or channels-last; `a` and `b` are one tensor's first and last channels, and `b` may be
None. `size` is the number of positions of a feature map. `passes.kernels.group_norm_launch` sets the rest.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

import triton
import triton.language as tl


@triton.jit
def _tile(c, s, channels, size, CHANNELS_LAST: tl.constexpr):
    """Offsets of elements [s, c] within a dense sample."""
    return s[:, None] * channels + c[None, :] if CHANNELS_LAST else c[None, :] * size + s[:, None]


@triton.jit
def _load(a, b, addend, n, c, s, inside, a_channels, b_channels, size, CHANNELS_LAST: tl.constexpr):
    """Elements [s, c] of sample n of cat(a, b), plus the addend [c], in fp32; what is not `inside` is unspecified."""
    x = tl.zeros([s.shape[0], c.shape[0]], tl.float32)
    sample = a + n.to(tl.int64) * a_channels * size
    there = inside & (c < a_channels)[None, :]
    x += tl.load(sample + _tile(c, s, a_channels, size, CHANNELS_LAST), mask=there, other=0.0).to(tl.float32)
    if b is not None:
        sample = b + n.to(tl.int64) * b_channels * size
        there = inside & (c >= a_channels)[None, :]
        local = c - a_channels
        x += tl.load(sample + _tile(local, s, b_channels, size, CHANNELS_LAST), mask=there, other=0.0).to(tl.float32)
    return x + addend[None, :]


@triton.jit
def _per_channel(vector, c, inside, default: tl.constexpr):
    """An optional vector over channels, in fp32."""
    if vector is None:
        values = tl.full([c.shape[0]], default, tl.float32)
    else:
        values = tl.load(vector + c, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _addend(addend, n, c, inside, sample_stride, channel_stride):
    if addend is None:
        values = tl.zeros([c.shape[0]], tl.float32)
    else:
        values = tl.load(addend + n * sample_stride + c * channel_stride, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _to_groups(values, member):
    """Sums per group of values per channel."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _to_channels(values, member):
    """Every channel's value of its group."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def _store(out, y, n, c, s, inside, channels, size, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr):
    if SILU:
        y = y * tl.sigmoid(y)
    sample = out + n.to(tl.int64) * channels * size
    tl.store(sample + _tile(c, s, channels, size, CHANNELS_LAST), y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def whole_groups(
    a,
    b,
    addend,
    weight,
    bias,
    out,
    a_channels,
    b_channels,
    size,
    addend_sample_stride,
    addend_channel_stride,
    eps,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """Normalise GROUPS groups of one sample, held at once."""
    tile, n = tl.program_id(0), tl.program_id(1)
    channels = a_channels + b_channels
    c = tile * (GROUPS * GROUP) + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    present = (c < channels) & (c < (tile + 1) * (GROUPS * GROUP))
    inside = (s < size)[:, None] & present[None, :]
    member = (c // GROUP - tile * GROUPS)[:, None] == tl.arange(0, PADDED_GROUPS)[None, :]
    shift = _addend(addend, n, c, present, addend_sample_stride, addend_channel_stride)
    x = _load(a, b, shift, n, c, s, inside, a_channels, b_channels, size, CHANNELS_LAST)
    count = size * (GROUP * 1.0)
    mean = _to_groups(tl.sum(tl.where(inside, x, 0.0), 0), member) / count
    x = tl.where(inside, x - _to_channels(mean, member)[None, :], 0.0)
    variance = _to_groups(tl.sum(x * x, 0), member) / count
    scale = _to_channels(1.0 / tl.sqrt(variance + eps), member) * _per_channel(weight, c, present, 1.0)
    y = x * scale[None, :] + _per_channel(bias, c, present, 0.0)[None, :]
    _store(out, y, n, c, s, inside, channels, size, CHANNELS_LAST, SILU)


@triton.jit
def statistics(
    a,
    b,
    addend,
    table,
    a_channels,
    b_channels,
    size,
    addend_sample_stride,
    addend_channel_stride,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Mean and variance of STEPS * BLOCK_S positions of GROUPS groups of one sample.

    table: (2, samples, splits, groups), means before variances.
    """
    tile, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = a_channels + b_channels
    c = tile * (GROUPS * GROUP) + tl.arange(0, BLOCK_C)
    present = (c < channels) & (c < (tile + 1) * (GROUPS * GROUP))
    shift = _addend(addend, n, c, present, addend_sample_stride, addend_channel_stride)
    begin = split * (STEPS * BLOCK_S)
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_S], tl.float32)
    for step in range(STEPS):
        s = begin + step * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (s < size)[:, None] & present[None, :]
        x = _load(a, b, shift, n, c, s, inside, a_channels, b_channels, size, CHANNELS_LAST)
        count += (s < size).to(tl.float32)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / tl.maximum(count, 1.0))[:, None]
        squares += tl.where(inside, distance * (x - mean), 0.0)

    groups = tl.arange(0, PADDED_GROUPS)
    member = ((c // GROUP - tile * GROUPS)[:, None] == groups[None, :]) & present[:, None]
    number = tl.sum(count, 0) * tl.sum(member.to(tl.float32), 0)
    divisor = tl.maximum(number, 1.0)
    group_mean = _to_groups(tl.sum(mean * count[:, None], 0), member) / divisor
    distance = mean - _to_channels(group_mean, member)[None, :]
    squares += count[:, None] * distance * distance
    variance = _to_groups(tl.sum(squares, 0), member) / divisor

    num_groups = channels // GROUP
    at = (n * tl.num_programs(1) + split) * num_groups + tile * GROUPS + groups
    known = (groups < GROUPS) & (tile * GROUPS + groups < num_groups)
    tl.store(table + at, group_mean, mask=known)
    tl.store(table + tl.num_programs(2) * tl.num_programs(1) * num_groups + at, variance, mask=known)


@triton.jit
def _merge(
    table, n, samples, splits, rows, g, num_groups, size, GROUP: tl.constexpr, PADDED_SPLITS: tl.constexpr
):  # fmt: skip
    """Mean and variance of groups g from what the splits found, each for `rows` positions."""
    p = tl.arange(0, PADDED_SPLITS)
    length = tl.maximum(tl.minimum(size - p * rows, rows), 0).to(tl.float32)
    count = length[:, None] * tl.where(g < num_groups, GROUP * 1.0, 0.0)[None, :]
    at = (n * splits + p)[:, None] * num_groups + g[None, :]
    means = tl.load(table + at, mask=count > 0, other=0.0)
    variances = tl.load(table + samples * splits * num_groups + at, mask=count > 0, other=0.0)
    total = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(count * means, 0) / total
    distance = means - mean[None, :]
    return mean, tl.sum(count * (variances + distance * distance), 0) / total


@triton.jit
def normalize(
    a,
    b,
    addend,
    weight,
    bias,
    out,
    table,
    a_channels,
    b_channels,
    size,
    addend_sample_stride,
    addend_channel_stride,
    eps,
    splits,
    split_rows,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """Normalise STEPS * BLOCK_S positions of GROUPS groups of one sample by the statistics in the table."""
    tile, part, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = a_channels + b_channels
    c = tile * (GROUPS * GROUP) + tl.arange(0, BLOCK_C)
    present = (c < channels) & (c < (tile + 1) * (GROUPS * GROUP))
    g = tile * GROUPS + tl.arange(0, PADDED_GROUPS)
    member = (c // GROUP)[:, None] == g[None, :]
    mean, variance = _merge(
        table, n, tl.num_programs(2), splits, split_rows, g, channels // GROUP, size, GROUP, PADDED_SPLITS
    )
    center = _to_channels(mean, member)
    scale = _to_channels(1.0 / tl.sqrt(variance + eps), member) * _per_channel(weight, c, present, 1.0)
    offset = _per_channel(bias, c, present, 0.0)
    shift = _addend(addend, n, c, present, addend_sample_stride, addend_channel_stride)
    begin = part * (STEPS * BLOCK_S)
    for step in range(STEPS):
        s = begin + step * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (s < size)[:, None] & present[None, :]
        x = _load(a, b, shift, n, c, s, inside, a_channels, b_channels, size, CHANNELS_LAST)
        y = (x - center[None, :]) * scale[None, :] + offset[None, :]
        _store(out, y, n, c, s, inside, channels, size, CHANNELS_LAST, SILU)
