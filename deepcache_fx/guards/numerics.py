"""PyTorch's switches for how things are computed, which a compiled program or a recorded graph has frozen in it."""

from __future__ import annotations

from collections.abc import Hashable

import torch

_C = torch._C


def switches() -> Hashable:
    """Equal where kernels are chosen alike: TF32, sums in half precision, determinism, which attention is allowed.

    Read from below the public functions: `torch.backends` refuses to tell the old name of a setting whose new one is in
    use.
    """
    return (
        _precision("matmul"),
        _precision("conv"),
        _C._get_cublas_allow_fp16_reduced_precision_reduction(),
        _C._get_cublas_allow_bf16_reduced_precision_reduction(),
        _C._get_cublas_allow_fp16_accumulation(),
        _C._get_deterministic_algorithms(),
        _C._get_cudnn_deterministic(),
        _C._get_cudnn_enabled(),
        _C._get_flash_sdp_enabled(),
        _C._get_mem_efficient_sdp_enabled(),
        _C._get_math_sdp_enabled(),
        _C._get_cudnn_sdp_enabled(),
        _C._get_math_sdp_allow_fp16_bf16_reduction(),
    )


def _precision(operation: str) -> str:
    """Of float32 on CUDA; where nobody has said anything that is float32 itself."""
    precision: str = _C._get_fp32_precision_getter("cuda", operation)
    return "ieee" if precision == "none" else precision
