"""Channels-last convolution weights: what tensor cores want, and what Inductor would else convert at every step."""

from __future__ import annotations

import weakref

import torch

DEVICE_TYPES = ("cuda",)
"""Where convolutions want channels-last weights."""


class ChannelsLastWeights:
    """Converts a model's 2-d convolution weights in place, and back.

    A parameter stays the same object; only `parameter.data` changes its strides. 1x1 convolutions are left alone: their
    weights are the same memory in both formats.
    """

    def __init__(self) -> None:
        self._converted: dict[int, weakref.ref[torch.Tensor]] = {}

    def convert(self, module: torch.nn.Module) -> int:
        """Make every contiguous `Conv2d` weight channels-last; the number of weights converted."""
        before = len(self._converted)
        for conv in module.modules():
            if not isinstance(conv, torch.nn.Conv2d) or not _in_channels_first(conv.weight):
                continue
            weight = conv.weight
            with torch.inference_mode(False):  # else no gradient could ever be taken of it
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            self._converted[id(weight)] = weakref.ref(weight)
        return len(self._converted) - before

    def undo(self) -> None:
        """Give every converted weight its contiguous format back, whatever its values are by now."""
        for reference in self._converted.values():
            weight = reference()
            if weight is not None and weight.is_contiguous(memory_format=torch.channels_last):
                with torch.inference_mode(False):
                    weight.data = weight.data.contiguous()
        self._converted.clear()


def _in_channels_first(weight: torch.Tensor) -> bool:
    plain = type(weight.data) is torch.Tensor  # a quantised weight decides about its own layout
    return plain and weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
