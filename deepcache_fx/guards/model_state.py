"""What the graphs of one model bake in: its Python-level settings, and the strides of its weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch

from deepcache_fx.execution import memory_format
from deepcache_fx.execution.compile import copies_weights, freezes, pick_backend
from deepcache_fx.execution.cuda_graphs import RECORDERS
from deepcache_fx.graph.capture import CAPTURE_LOCK
from deepcache_fx.graph.weights import Stamp, stamps
from deepcache_fx.guards.fingerprint import Fingerprint, Settings, Structure
from deepcache_fx.guards.numerics import SWITCHES, read, settled
from deepcache_fx.guards.side_effects import SideEffects, Watched
from deepcache_fx.options import Options


class ModelState:
    """Follows one model, arranges its weights for its programs, and undoes that. Holds no reference to the model."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._format = memory_format.ChannelsLastWeights()
        self._fingerprint = Fingerprint()
        self._effects = SideEffects()
        self._copied = self._frozen = False
        self._values: list[Stamp] = []
        self._last_extended: tuple[Settings, Hashable, Hashable, Settings] | None = None
        self._freezing: dict[torch.device, bool] = {}
        """By device, whether programs there go on computing as PyTorch's switches were set when they were made."""

    def settings(self, module: torch.nn.Module, device: torch.device, *, at_run_start: bool) -> Settings:
        """What a graph of the module bakes in, the strides of its weights among it: those are made to be fast first.

        Within a run settings alone are looked at, not PyTorch's own layers and weights.
        """
        last = self._fingerprint.last
        if not at_run_start and last is not None and last.module is module and last.settings_read.holds_settings():
            settings = last.settings  # as at most calls
        else:
            settings = self._settings(module, device, at_run_start)
        doubts = self._effects.doubts
        is_freezing = self._freezing.get(device)
        if is_freezing is None:
            is_freezing = self._freezing[device] = self._freezes_switches(device)
        if not doubts and not is_freezing:
            return settings
        frozen, known = tuple(map(read, SWITCHES)) if is_freezing else None, self._last_extended
        if known is None or known[0] is not settings or known[1] != doubts or known[2] != frozen:
            more = Settings((settings.structure, doubts, frozen and settled(frozen)), settings.weights)
            known = self._last_extended = settings, doubts, frozen, more
        return known[3]  # the same object for the same

    def _freezes_switches(self, device: torch.device) -> bool:
        if pick_backend(self._options, device) in ("eager", "openvino"):
            return device.type in RECORDERS and self._options.cuda_graphs is True
        return True

    def _settings(self, module: torch.nn.Module, device: torch.device, at_run_start: bool) -> Settings:
        if at_run_start:
            self._look_at_values(device)
        known = self._fingerprint.known(module, at_run_start=at_run_start)
        if known is not None:
            return known
        with CAPTURE_LOCK:  # while another thread captures the module it holds stand-ins of its weights
            known = self._fingerprint.known(module, at_run_start=at_run_start)
            if known is not None:
                return known
            if self.are_moved(device):
                self._format.convert(module)
            return self._fingerprint.read(module)

    def _look_at_values(self, device: torch.device) -> None:
        """Where programs may hold copies of values, take weights that have been written into for others."""
        self._copied, self._frozen = copies_weights(self._options, device), freezes(self._options, device)
        if self._copied and self._stamps() != self._values:
            with CAPTURE_LOCK:
                self.note_values()
                self._fingerprint.renumber()

    def note_values(self) -> None:
        """Take the values that the weights have now for those that programs were made with."""
        if self._copied:
            self._values = self._stamps()

    def _stamps(self) -> list[Stamp]:
        """In full where weights are known to be copied: what lies elsewhere, too, may have other values."""
        return stamps(self._fingerprint.weights(), addresses_and_samples=self._frozen)

    def weights(self) -> tuple[torch.Tensor, ...]:
        """All of the model's, as last looked at (see `Fingerprint.weights`)."""
        return self._fingerprint.weights()

    def structure(self) -> Structure | None:
        """As last looked at; None where the model was seen to write what its settings do not show."""
        last = self._fingerprint.last
        found = last.settings.structure if last is not None and not self._effects.doubts else None
        return found if isinstance(found, Structure) else None

    def objects(self) -> list[object]:
        """Every object with attributes that the model consists of, as last looked at."""
        return self._fingerprint.objects()

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

    def restore(self) -> None:
        """Give the model's weights the strides that they had, whatever their values are by now."""
        with CAPTURE_LOCK:  # a recording under way reads them where they are
            self._format.undo()
        self._fingerprint.expire()  # else what another model's programs keep as it is would count as ours
