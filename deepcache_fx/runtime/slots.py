"""The cached features of one run. A feature belongs to what its refresh was conditioned on, not to a call's number.

A step makes one UNet call or several: guidance as two calls, the areas of a picture, the views of a panorama. Which
calls there are, and their order, may change from step to step. A call finds the slot whose refresh was given the same
conditioning: every tensor but the sample and the timestep.

- The same tensor object, not written into since, is the same conditioning. Of several calls with one conditioning in a
  step each has a slot of its own, by order.
- Another object may hold the same values, as where a pipeline joins its embeddings anew at every step. On a CPU the
  values are compared. On CUDA they are compared on the device, and the answer is read when it has arrived, so that
  nothing waits: a change is then noticed a step late. What had held until now and is another object there is a change.
- Feature maps (four dimensions and more) are taken to be made for one step, as a ControlNet's residuals are, unless
  they were the same object at two calls in a row: then another one is a change too.
- A caller who names what a call is conditioned on (`deepcache_fx.condition`) decides; no tensor is looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch

from deepcache_fx.execution.programs import FeatureCache, PromptStage, PromptValues, Values
from deepcache_fx.graph.lazy import LazyTensor
from deepcache_fx.graph.signature import Call

NO_FEATURE = "no cached feature for this call of the step"
CHANGED = "inputs or settings changed within a run"
CONDITIONING_CHANGED = "the conditioning changed within a run"

SPARE_SLOTS = 8
"""How many slots are kept beside those that a step uses: conditionings that come back, as in alternating prompts."""


class Answer(Protocol):
    """Whether two tensors are equal: None while it is not known."""

    def __call__(self) -> bool | None: ...


def _compare_on_cuda(first: torch.Tensor, second: torch.Tensor) -> Answer:
    """Two launches and a copy to pinned memory, which nothing waits for."""
    flag = torch.empty((), dtype=torch.bool, pin_memory=True)
    flag.copy_((first == second).all(), non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return lambda: bool(flag) if arrived.query() else None  # type: ignore[no-untyped-call]


COMPARE_LATER: dict[str, Callable[[torch.Tensor, torch.Tensor], Answer]] = {"cuda": _compare_on_cuda}
"""Per device type, what compares without waiting. Where there is none, values are compared at once."""


class _Value:
    """A conditioning tensor, as the last call that had it gave it."""

    __slots__ = ("address", "copy", "held", "index", "tensor", "version")

    def __init__(self, index: int) -> None:
        self.index = index
        self.held = False
        """Whether two calls in a row gave the same object."""
        self.copy: torch.Tensor | None = None

    def set(self, tensor: torch.Tensor, keep_copy: bool) -> None:
        counted = not tensor.is_inference()
        self.tensor = tensor
        self.version = tensor._version if counted else None  # changes in place of inference tensors are not counted
        self.address = tensor.data_ptr()
        self.copy = None if counted and not keep_copy else tensor.clone()

    def original(self) -> torch.Tensor | None:
        """The values it had; None where they have been overwritten."""
        if self.copy is not None:
            return self.copy
        unchanged = self.tensor._version == self.version and self.tensor.data_ptr() == self.address
        return self.tensor if unchanged else None


class _Map:
    """A feature map that a call was given; not kept alive."""

    __slots__ = ("held", "index", "reference", "version")

    def __init__(self, index: int) -> None:
        self.index = index
        self.held = False

    def set(self, tensor: torch.Tensor) -> None:
        self.reference = weakref.ref(tensor)
        self.version = None if tensor.is_inference() else tensor._version

    def is_same(self, tensor: torch.Tensor) -> bool:
        return self.reference() is tensor and (self.version is None or tensor._version == self.version)


class Slot:
    """One conditioning of one signature's calls, and the deep feature that a full step left for it.

    `entry` holds the programs that made the feature; `name` is what the caller calls the conditioning, if anything.
    """

    __slots__ = (
        "_maps",
        "_values",
        "entry",
        "feature",
        "is_wrong",
        "keep_copies",
        "name",
        "pairings",
        "prompts",
        "refresh",
        "used",
    )

    def __init__(self, entry: Any, call: Call, name: Hashable, keep_copies: bool) -> None:
        self.entry = entry
        self.name = name
        self.feature: FeatureCache | None = None
        self.refresh = -1
        """The run's last refresh when the feature was made (see `Slots.refresh`)."""
        self.used = -1
        """The step in which it was used last."""
        self.prompts: dict[str, PromptValues] = {}
        """By variant, what was computed of the prompt."""
        self.pairings: Sequence[Any] = ()
        """For each cut, how what runs before the UNet feeds its shallow steps."""
        self.is_wrong = False
        """True once a device has said that its conditioning had changed."""
        self.keep_copies = keep_copies
        tensors = call.tensors
        self._values = [] if name is not None else [_Value(index) for index in call.prompt_inputs]
        self._maps = [] if name is not None else [_Map(i) for i in call.maps if type(tensors[i]) is not LazyTensor]
        for value in self._values:
            value.set(tensors[value.index], keep_copies)
        for item in self._maps:
            item.set(tensors[item.index])

    def renew(self, call: Call) -> None:
        """The feature is being made anew, for this call, which was found to have the same conditioning."""
        for value in self._values:
            tensor = call.tensors[value.index]
            is_written = value.version is not None and tensor._version != value.version
            if tensor is not value.tensor or is_written or (self.keep_copies and value.copy is None):
                value.set(tensor, self.keep_copies)

    def prompt(self, stage: PromptStage | None, name: str, tensors: Sequence[torch.Tensor]) -> Values:
        """What a variant's steps need of the prompt: computed now, unless an earlier step of this slot has."""
        if stage is None:
            return ()
        values = self.prompts[name] = stage(tensors, self.prompts.get(name))
        return values.values

    def is_same(self, call: Call) -> bool:
        """True where the call has the very tensors of the last one."""
        tensors = call.tensors
        for value in self._values:
            tensor = tensors[value.index]
            if (
                tensor is not value.tensor
                or value.version is None
                or tensor._version != value.version
                or tensor.data_ptr() != value.address
            ):
                return False
        if self._maps and not self._are_maps_same(tensors):
            return False
        for value in self._values:
            value.held = True
        return True

    def is_equal(self, call: Call) -> list[Answer] | None:
        """None where the call's conditioning is another one; else what is still to be heard from a device."""
        tensors, answers = call.tensors, list[Answer]()
        for value in self._values:
            tensor, original = tensors[value.index], value.original()
            if tensor is value.tensor and original is tensor:
                continue
            if original is None:
                self.keep_copies = True  # written into: from now on values can be compared
                return None
            later = COMPARE_LATER.get(tensor.device.type)
            if later is None:
                if not torch.equal(original, tensor):
                    return None
            elif value.held and tensor is not value.tensor:
                return None
            else:
                answers.append(later(original, tensor))
        if self._maps and not self._are_maps_same(tensors):
            return None
        for value in self._values:
            value.held |= tensors[value.index] is value.tensor
        if not answers:
            self.renew(call)
        return answers

    def _are_maps_same(self, tensors: Sequence[torch.Tensor]) -> bool:
        same = [item.is_same(tensors[item.index]) for item in self._maps]
        if any(item.held and not equal for item, equal in zip(self._maps, same, strict=True)):
            return False
        for item, equal in zip(self._maps, same, strict=True):
            if equal:
                item.held = True
            elif type(tensors[item.index]) is not LazyTensor:
                item.set(tensors[item.index])
        return True


class Slots:
    """One thread's slots of one run."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.refresh = 0
        """The last step that the schedule made full. A slot that was missing from it is stale until it is full."""
        self._slots: list[Slot] = []
        self._step = -1
        self._row: list[Slot] = []
        self._row_before: list[Slot] = []
        self._pending: list[tuple[Slot, Answer]] = []
        self._keep_copies = False

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def usual(self, step: int, number: int) -> Slot | None:
        """The slot of this call number in the step before."""
        row = self._row_before if step == self._step else self._row
        return row[number] if number < len(row) else None

    def find(self, entry: Any, call: Call, step: int, number: int, name: Hashable = None) -> Slot | None:
        """The slot of a call's conditioning that this step has not used yet, or None.

        Args:
            entry: The programs of the call's signature.
            call: The call.
            step: The denoising step.
            number: Of the call in its step. Of slots that are equally right the one that had this number is taken.
            name: What the caller calls the conditioning: then that decides.
        """
        if self._pending:
            self._hear()
        row = self._row_before if step == self._step else self._row  # as in `usual`
        usual = row[number] if number < len(row) else None
        if usual is not None:
            if usual.entry is not entry or usual.used == step or usual.name != name or usual.is_wrong:
                usual = None
            elif usual.is_same(call):
                return usual
        others = [s for s in self._slots if s.entry is entry and s.used != step and s.name == name and s is not usual]
        for slot in others:
            if slot.is_same(call):
                return slot
        for slot in others if usual is None else (usual, *others):
            answers = slot.is_equal(call)
            if answers is not None:
                self._pending += [(slot, answer) for answer in answers]
                return slot
            self._keep_copies |= slot.keep_copies
        return None

    def add(self, entry: Any, call: Call, name: Hashable = None) -> Slot:
        """A new slot for a call's conditioning."""
        slot = Slot(entry, call, name, self._keep_copies)
        self._slots.append(slot)
        return slot

    def use(self, slot: Slot, step: int) -> None:
        """Note that a call of this step used the slot."""
        if step != self._step:
            self._step, self._row_before, self._row = step, self._row, []
            while len(self._slots) > len(self._row_before) + SPARE_SLOTS:
                self._slots.remove(min((s for s in self._slots if s is not slot), key=lambda s: s.used))
        self._row.append(slot)
        slot.used = step

    def why_none(self, entry: Any, step: int, number: int) -> str:
        """Why `find` found nothing."""
        usual = self.usual(step, number)
        if usual is None or usual.used == step:
            return NO_FEATURE
        return CHANGED if usual.entry is not entry else CONDITIONING_CHANGED

    def begin_refresh(self, step: int) -> None:
        """A step that the schedule makes full begins. Features that were missing from the last one are given up."""
        self._slots = [slot for slot in self._slots if slot.refresh == self.refresh]
        self.refresh = step

    def _hear(self) -> None:
        """Take what has arrived from the device: a slot whose conditioning turned out another one is gone."""
        waiting = []
        for slot, answer in self._pending:
            equal = answer()
            if equal is None:
                waiting.append((slot, answer))
            elif not equal and slot in self._slots:
                slot.is_wrong = True
                self._slots.remove(slot)
        self._pending = waiting
