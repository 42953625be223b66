"""GroupNorm operators that fuse what stands around it in a UNet: an addend, a concatenation, SiLU.

    torch.ops.deepcache_fx.group_norm(x, weight, bias, num_groups, eps, silu, addend)
    torch.ops.deepcache_fx.cat_group_norm(a, b, weight, bias, num_groups, eps, silu)

They run on every device: Triton kernels on CUDA where triton is installed, plain PyTorch elsewhere. Both compute in
fp32 (fp64 for fp64 inputs) whatever the storage, so that the result differs from the separate operators' by what these
lose when they round intermediate values. Inference only: there is no backward formula.

They are opaque to torch.compile and torch.export (`custom_op`, not `triton_op`) and marked `flexible_layout`: Inductor
may then hand them the layout that it chose for the convolutions around them. Kernels that it traces into, as those of a
`triton_op`, get the strides of the trace, at the price of a transposition before each.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from passes.kernels.group_norm_reference import check, write_norm

_TAGS = (torch.Tag.flexible_layout,)


@torch.library.custom_op(
    "deepcache_fx::group_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, SymInt num_groups, float eps, bool silu, Tensor? addend=None) "
    "-> Tensor",
    tags=_TAGS,
)
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    addend: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + addend)), the SiLU where `silu` is True.

    Args:
        x: (N, C, *positions), at least three axes, of any floating type and strides.
        weight, bias: (C,), of any floating type, or None.
        num_groups: divides C.
        addend: (N or 1, C) and as many further axes of size 1 as x has: one number per sample and channel, such as a
            projected time embedding. Added without rounding to x's type.

    Returns:
        As x in shape and type. Channels-last in, channels-last out; otherwise contiguous.

    Raises:
        ValueError: the shapes do not fit together.

    >>> import torch, passes.kernels
    >>> x = torch.randn(2, 8, 4, 4)
    >>> y = torch.ops.deepcache_fx.group_norm(x, None, None, 4, 1e-5, True)
    >>> torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)), atol=1e-6)
    True
    """
    check([x], weight, bias, num_groups, addend)
    return _norm([x], weight, bias, num_groups, eps, silu, addend)


@torch.library.custom_op(
    "deepcache_fx::cat_group_norm",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? weight, Tensor? bias, SymInt num_groups, float eps, bool silu) -> Tensor",
    tags=_TAGS,
)
def cat_group_norm(
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """silu(group_norm(cat([a, b], 1))) without making the concatenation, the SiLU where `silu` is True.

    Args:
        a, b: (N, A, *positions) and (N, B, *positions), of one type.
        weight, bias: (A + B,), or None.
        num_groups: divides A + B; a group may straddle the boundary.

    Returns:
        (N, A + B, *positions); channels-last where both a and b are, otherwise contiguous.

    Raises:
        ValueError: the shapes do not fit together.
    """
    check([a, b], weight, bias, num_groups, None)
    return _norm([a, b], weight, bias, num_groups, eps, silu, None)


@group_norm.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, num_groups: int, eps: float, silu: bool, addend: Tensor | None = None
) -> Tensor:
    check([x], weight, bias, num_groups, addend)
    return _empty([x])


@cat_group_norm.register_fake
def _(a: Tensor, b: Tensor, weight: Any, bias: Any, num_groups: int, eps: float, silu: bool) -> Tensor:
    check([a, b], weight, bias, num_groups, None)
    return _empty([a, b])


def _norm(
    parts: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    addend: Tensor | None,
) -> Tensor:
    """One or two parts of one tensor, normalised: by Triton where it can, else by PyTorch."""
    out = _empty(parts)
    if not out.numel():
        return out
    if addend is not None:
        addend = addend.flatten(1).expand(out.shape[:2])
    launch = _launcher(out, out.shape[1] // num_groups)
    if launch is None:
        write_norm(out, parts, weight, bias, num_groups, eps, silu, addend)
        return out
    channels_last = _is_channels_last(parts)
    a, b, *_ = *(_dense(part, channels_last) for part in parts), None
    launch.normalize(
        out, a, b, addend, *(None if vector is None else vector.contiguous() for vector in (weight, bias)),
        num_groups=num_groups, eps=eps, silu=silu, channels_last=channels_last,
    )  # fmt: skip
    return out


def _launcher(x: Tensor, group_channels: int) -> ModuleType | None:
    """The module that launches the Triton kernels, where they are to run for this tensor."""
    kernels = _kernels() if x.is_cuda else None
    return kernels if kernels is not None and kernels.supports(x, group_channels) else None


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from passes.kernels import group_norm_launch
    except ImportError as error:
        warnings.warn(f"GroupNorm runs as plain PyTorch: triton cannot be imported ({error})", stacklevel=2)
        return None
    return group_norm_launch


def _is_channels_last(parts: Sequence[Tensor]) -> bool:
    """True where all are dense with the channels innermost and not all are contiguous as well."""
    return all(part.movedim(1, -1).is_contiguous() for part in parts) and not all(p.is_contiguous() for p in parts)


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    """x in one of the two layouts that the kernels read, copied where it has neither."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _empty(parts: Sequence[Tensor]) -> Tensor:
    """Room for the concatenation of the parts, in their layout."""
    samples, _, *positions = parts[0].shape
    channels = sum(part.shape[1] for part in parts)
    if _is_channels_last(parts):
        return parts[0].new_empty((samples, *positions, channels)).movedim(-1, 1)
    return parts[0].new_empty((samples, channels, *positions))
