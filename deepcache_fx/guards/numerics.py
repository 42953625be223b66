"""PyTorch's switches for how things are computed, which a compiled program or a recorded graph has frozen in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import partial
from operator import methodcaller

import torch

_C = torch._C

SWITCHES = (
    partial(_C._get_fp32_precision_getter, "cuda", "matmul"),
    partial(_C._get_fp32_precision_getter, "cuda", "conv"),
    _C._get_cublas_allow_fp16_reduced_precision_reduction,
    _C._get_cublas_allow_bf16_reduced_precision_reduction,
    _C._get_cublas_allow_fp16_accumulation,
    _C._get_deterministic_algorithms,
    _C._get_cudnn_deterministic,
    _C._get_cudnn_enabled,
    _C._get_flash_sdp_enabled,
    _C._get_mem_efficient_sdp_enabled,
    _C._get_math_sdp_enabled,
    _C._get_cudnn_sdp_enabled,
    _C._get_math_sdp_allow_fp16_bf16_reduction,
)
"""Kernels are chosen alike where all of these say the same: TF32, sums in half precision, determinism, attention.

From below the public functions: `torch.backends` refuses to tell the old name of a setting whose new one is in use.
Read by `tuple(map(read, SWITCHES))`, at every step: without a Python call for each.
"""

read = methodcaller("__call__")


def settled(values: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """What the switches say, where a precision that nobody has set is that of float32 itself."""
    return tuple("ieee" if value == "none" else value for value in values)
