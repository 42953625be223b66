"""The weights of one model, and its settings: what its graphs bake in, and the memory they would rather read."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import torch

from deepcache_fx import memory_format
from deepcache_fx.compile import pick_backend
from deepcache_fx.config import Options
from deepcache_fx.fingerprint import fingerprint
from passes.weight_layout import WeightLayout


class Weights:
    """Arranges a model's weights for its programs, and undoes that. Holds no reference to the model."""

    def __init__(self, options: Options) -> None:
        self.layout = WeightLayout()
        """Of sibling projections (see `FuseLinears`)."""
        self._options = options
        self._format = memory_format.ChannelsLastWeights()

    def settings(self, module: torch.nn.Module, device: torch.device) -> Hashable:
        """What a graph of the module bakes in, the strides of its weights among it: those are made to be fast first."""
        if self.are_moved(device):
            self._format.convert(module)
            self.layout.renew(module)
        return fingerprint(module)

    def are_moved(self, device: torch.device) -> bool:
        """True where programs are compiled for a device on which it matters how weights lie."""
        return device.type in memory_format.DEVICE_TYPES and pick_backend(self._options, device) != "eager"

    def keep_only(self, live: Collection[int]) -> None:
        """Let go of parameters that the model no longer has; `live` are the ids of those it has."""
        self.layout.keep_only(live)

    def restore(self) -> None:
        """Give the model's weights the strides and the memory that they had, whatever their values are by now."""
        self._format.undo()
        self.layout.undo()
