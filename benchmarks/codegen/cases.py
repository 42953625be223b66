"""The feature maps for which the library's own kernels are compiled: those of SD1.5 and SDXL, in either layout."""

from __future__ import annotations

from benchmarks.codegen.machine import NormCase

_MAPS = ((320, 64), (640, 32), (1280, 16), (2560, 8), (960, 64), (1920, 32), (320, 128), (640, 64), (1280, 32))
"""Channels and positions."""


def own_cases() -> list[NormCase]:
    """One norm, one with an addend, one over two halves, and one that is contiguous, of a few sizes each."""
    return [
        *(NormCase(channels, positions) for channels, positions in _MAPS),
        *(NormCase(channels, positions, addend=True) for channels, positions in _MAPS[:4]),
        *(NormCase(channels, positions, cat=True) for channels, positions in ((640, 64), (1920, 32), (2560, 16))),
        *(NormCase(channels, positions, channels_last=False) for channels, positions in ((320, 64), (1280, 16))),
    ]
