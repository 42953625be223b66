"""Channels-last convolution weights: what tensor cores want, and what Inductor would else convert at every step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import MutableMapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

DEVICE_TYPES = ("cuda",)
"""Where convolutions want channels-last weights."""

WEIGHTS_LOCK = threading.RLock()
"""Held while a weight is moved, and from the look at where weights are to the launch of what reads them there."""

_users: MutableMapping[torch.Tensor, weakref.WeakSet[ChannelsLastWeights]] = WeakTensorKeyDictionary()
"""Of every converted weight, whose programs read it: two UNets may share a ControlNet."""


class ChannelsLastWeights:
    """Converts a model's 2-d convolution weights in place, and back.

    A parameter stays the same object; only `parameter.data` changes its strides. 1x1 convolutions are left alone: their
    weights are the same memory in both formats. What several use stays converted until the last of them undoes it.
    """

    def __init__(self) -> None:
        self._used: dict[int, weakref.ref[torch.Tensor]] = {}

    def convert(self, module: torch.nn.Module) -> int:
        """Make every contiguous `Conv2d` weight channels-last; the number of weights converted now."""
        count = 0
        with WEIGHTS_LOCK:
            for conv in module.modules():
                if not isinstance(conv, torch.nn.Conv2d):
                    continue
                weight = conv.weight
                if _in_channels_first(weight):
                    _move(weight, torch.channels_last)
                    count += 1
                elif weight not in _users:
                    continue
                _users.setdefault(weight, weakref.WeakSet()).add(self)
                self._used[id(weight)] = weakref.ref(weight)
        return count

    def undo(self) -> None:
        """Give the weights that nobody else uses their contiguous format back, whatever their values are by now."""
        with WEIGHTS_LOCK:
            for reference in self._used.values():
                weight = reference()
                if weight is None:
                    continue
                users = _users[weight]
                users.discard(self)
                if users:
                    continue
                del _users[weight]
                if weight.is_contiguous(memory_format=torch.channels_last):
                    _move(weight, torch.contiguous_format)
            self._used.clear()


def _move(weight: torch.Tensor, memory_format: torch.memory_format) -> None:
    """Other strides, in other memory. That before is not given to anybody while work under way may read it."""
    before = weight.data
    with torch.inference_mode(False):  # else no gradient could ever be taken of it
        weight.data = before.contiguous(memory_format=memory_format)
    if before.device.type != "cpu":  # of whichever stream: the allocator knows of the one it was made on alone
        torch.accelerator.synchronize(before.device)


def _in_channels_first(weight: torch.Tensor) -> bool:
    plain = type(weight.data) is torch.Tensor  # a quantised weight decides about its own layout
    return plain and weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
