"""What the graphs of one model bake in, its Python-level settings, and how its weights lie in memory for them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch

from deepcache_fx import memory_format
from deepcache_fx.capture import CAPTURE_LOCK
from deepcache_fx.compile import pick_backend
from deepcache_fx.config import Options
from deepcache_fx.fingerprint import Fingerprint
from deepcache_fx.side_effects import SideEffects, Watched
from passes.weight_layout import WeightLayout


class ModelState:
    """Follows one model, arranges its weights for its programs, and undoes that. Holds no reference to the model."""

    def __init__(self, options: Options) -> None:
        self.layout = WeightLayout()
        """Of sibling projections (see `FuseLinears`)."""
        self._options = options
        self._format = memory_format.ChannelsLastWeights()
        self._fingerprint = Fingerprint()
        self._effects = SideEffects()

    def settings(self, module: torch.nn.Module, device: torch.device, *, thorough: bool) -> Hashable:
        """What a graph of the module bakes in, the strides of its weights among it: those are made to be fast first.

        `thorough` at the start of a run; within one settings alone are looked at, not PyTorch's own layers and weights.
        """
        last = self._fingerprint.last
        if not thorough and last is not None and last.module is module and last.settings_read.holds_settings():
            settings: Hashable = last.settings  # as at most calls
        else:
            settings = self._settings(module, device, thorough)
        return (settings, self._effects.doubts) if self._effects.doubts else settings

    def _settings(self, module: torch.nn.Module, device: torch.device, thorough: bool) -> Hashable:
        if thorough and self.are_moved(device):
            self.layout.renew(module)
        known = self._fingerprint.known(module, thorough=thorough)
        if known is not None:
            return known
        with CAPTURE_LOCK:  # while another thread captures the module it holds stand-ins of its weights
            known = self._fingerprint.known(module, thorough=thorough)
            if known is not None:
                return known
            if self.are_moved(device):
                self._format.convert(module)
            return self._fingerprint.read(module)

    @contextmanager
    def watching(self, module: torch.nn.Module, also: Iterable[object] = ()) -> Iterator[Watched]:
        """Raise an Uncapturable where a graph of the module would leave out something that its forward does.

        The block captures the module, whose settings have just been read, and says so (`Watched.captured`). `also` are
        functions and objects that forward is given as arguments.
        """
        with self._effects.watching(module, self._fingerprint.objects(), also) as watched:
            yield watched

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
        self._fingerprint.expire()  # else what another model's programs keep as it is would count as ours
