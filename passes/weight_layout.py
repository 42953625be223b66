"""Let weights lie one after another in one storage, so that a graph can read several as one matrix, without a copy.

Every parameter keeps its identity, its name, its shape and its values, and is written to as before; only its memory
moves. `model.to(...)`, offloading, `parameter.data = ...` and whatever else replaces a parameter's data part them
again. That must never be a wrong result, so nobody keeps the matrix: `Joined.tensor` takes it anew from the parameters
at every use. It is a view where they lie together at that moment, and else a copy of what they hold: slower, never
stale. `lay_out` and `renew`, which move weights, belong where no program is reading them.

A weight moves only where the layout knows all that shares its memory. Two parameters over one storage, or a parameter
within a larger one (a flat buffer of the user's), stay as they are. Tensors outside the model that alias a weight are
parted from it, as by `model.to`. In a plain pickle, which stores the storage of each parameter, weights that lie
together are stored as often as they are many; `torch.save`, safetensors and `copy.deepcopy` are as before.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import accumulate, chain

import torch

_MOVING = threading.RLock()
"""Of all layouts: two models may share parameters."""


class Joined:
    """Neighbours in a layout, read as one."""

    __slots__ = ("_size", "weights")

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.weights = tuple(weights)
        self._size = (sum(map(len, weights)), *weights[0].shape[1:])

    def tensor(self) -> torch.Tensor:
        """The weights end to end, as they are now. Read it and let go of it: it holds the memory of all of them."""
        weights = self.weights  # once: another thread may replace them
        if not lie_together(weights):
            return torch.cat([weight.data for weight in weights])
        first = weights[0].data
        return first.as_strided(self._size, first.stride()).data  # from where it begins; to autograd, no view

    def replace(self, others: Mapping[int, torch.Tensor]) -> None:
        """Read other weights of the same kind, given by the ids of those that they replace."""
        self.weights = tuple([others.get(id(weight), weight) for weight in self.weights])


class _Group:
    """Weights that lie, or are to lie, one after another in a storage of their own."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.weights = tuple(weights)
        self._storage: tuple[int, int] | None = None
        """Where they were last put: its address and size in bytes."""
        self._starts: dict[int, int] = {}
        """By the id of a weight, where it begins there, in elements."""

    def put_together(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # else no gradient could ever be taken of them
            before = [weight.data for weight in self.weights]
            joined = torch.cat(before)
            self._storage = joined.data_ptr(), joined.nbytes
            starts = accumulate((one.numel() for one in before), initial=0)
            self._starts = dict(zip(map(id, self.weights), starts, strict=False))
            for weight, part in zip(self.weights, torch.split(joined, [len(one) for one in before]), strict=True):
                weight.data = part
            _finish_reading(before)

    def take_apart(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            before = [weight.data for weight in self.weights]
            for weight in filter(self.holds, self.weights):
                weight.data = weight.data.clone()
            _finish_reading(before)

    def forget_place(self) -> None:
        """Know of no storage: what lies at its address from now on is another."""
        self._storage, self._starts = None, {}

    def holds(self, weight: torch.Tensor) -> bool:
        """True where the weight is one of the group and still lies where it was put."""
        storage = weight.untyped_storage()
        at_home = self._storage == (storage.data_ptr(), storage.nbytes())
        return at_home and self._starts.get(id(weight)) == weight.storage_offset()

    def is_movable(self, owners: dict[int, set[int]]) -> bool:
        alike = len({_kind(weight) for weight in self.weights}) == 1
        members = set(map(id, self.weights))
        return alike and all(_is_movable(weight, owners, self.holds(weight), members) for weight in self.weights)


class WeightLayout:
    """Groups of weights, each in one storage of its own.

    Example:
        >>> layout = WeightLayout()
        >>> layout.lay_out([[attention.to_q.weight, attention.to_k.weight]], within=unet)
        >>> layout.undo()
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._place: dict[int, tuple[int, int]] = {}
        """By the id of a weight: the number of its group, and its place there."""

    def lay_out(self, groups: Iterable[Sequence[torch.Tensor]], *, within: torch.nn.Module) -> None:
        """Move each group of weights into one storage, in order. Needs memory for one group besides the weights.

        Groups that share a weight become one: the second adds to the first what that does not have. Of weights that
        differ in kind (dtype, device, width) only those like the first move; and none moves whose memory a parameter or
        buffer of the model `within` which they are shares, or that lies in a group already.
        """
        with _MOVING:
            merged = _merged(groups)
            owners = _owners(within, merged)
            for group in merged:
                movable = [weight for weight in group if not self.has(weight) and _is_movable(weight, owners)]
                alike = [weight for weight in movable if _kind(weight) == _kind(movable[0])]
                if len(alike) > 1:
                    made = _Group(alike)
                    made.put_together()  # may find no memory: then there is no such group
                    self._groups.append(made)
            self._number()

    def has(self, weight: torch.Tensor) -> bool:
        """True for a weight of one of the groups."""
        return id(weight) in self._place

    def runs(self, weights: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Those of the weights that lie one after another now, in that order: two or more at a time."""
        runs: list[list[torch.Tensor]] = []
        for weight in sorted(filter(self.has, weights), key=lambda weight: self._place[id(weight)]):
            if runs and lie_together([runs[-1][-1], weight]):
                runs[-1].append(weight)
            else:
                runs.append([weight])
        return [run for run in runs if len(run) > 1]

    def renew(self, within: torch.nn.Module) -> None:
        """Put the weights of every group together again that have come apart, if they are still free to move."""
        if all(lie_together(group.weights) for group in self._groups):
            return
        with _MOVING:
            owners = _owners(within, [group.weights for group in self._groups])
            for group in self._groups:
                if not lie_together(group.weights) and group.is_movable(owners):
                    group.put_together()

    def replace(self, others: Mapping[int, torch.Tensor], *, within: torch.nn.Module) -> None:
        """Lay out other weights, given by the ids of those that they replace, as those were laid out.

        What is replaced gets memory of its own; what replaces it moves only where it is free to, as in `lay_out`.
        """
        changed = [group for group in self._groups if any(id(weight) in others for weight in group.weights)]
        if not changed:
            return
        with _MOVING:
            for group in changed:
                group.take_apart()
                group.forget_place()
                group.weights = tuple(others.get(id(weight), weight) for weight in group.weights)
            owners = _owners(within, [group.weights for group in changed])
            for group in changed:
                if group.is_movable(owners):
                    group.put_together()
            self._number()

    def keep_only(self, known: Collection[int]) -> None:
        """Forget groups with a weight that is not known by its id: what remains of one gets memory of its own."""
        gone = [group for group in self._groups if any(id(weight) not in known for weight in group.weights)]
        if gone:
            with _MOVING:
                for group in gone:
                    group.take_apart()
                self._groups = [group for group in self._groups if group not in gone]
                self._number()

    def undo(self) -> None:
        """Give every weight memory of its own again. Values stay, and `renew` knows the groups still."""
        with _MOVING:
            for group in self._groups:
                group.take_apart()

    def _number(self) -> None:
        self._place = {
            id(weight): (number, place)
            for number, group in enumerate(self._groups)
            for place, weight in enumerate(group.weights)
        }


def lie_together(weights: Sequence[torch.Tensor]) -> bool:
    """True where each of the weights is dense, and begins in the memory of the first where the one before it ends."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            return False
        end += weight.nbytes
    # Separate allocations may be neighbours as well.
    storage = first.untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes()


def _finish_reading(memory: Sequence[torch.Tensor]) -> None:
    """Wait for whoever reads memory that is about to be freed, on any stream: it may be given to another at once."""
    device = memory[0].device
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _is_movable(
    weight: torch.Tensor, owners: dict[int, set[int]], is_held: bool = False, members: Set[int] = frozenset()
) -> bool:
    """True where nobody shares the weight's memory but the members of a group that holds it, and its strides stay."""
    if type(weight) is not torch.nn.Parameter or type(weight.data) is not torch.Tensor:
        return False
    if weight.is_inference() or weight.is_meta or not weight.is_contiguous():
        return False
    sharing = owners[weight.untyped_storage().data_ptr()]
    if weight.untyped_storage().nbytes() == weight.nbytes:
        return sharing == {id(weight)}
    return is_held and sharing <= members


def _owners(within: torch.nn.Module, groups: Iterable[Iterable[torch.Tensor]]) -> dict[int, set[int]]:
    """By the address of a storage, the ids of the tensors that lie in it."""
    owners: dict[int, set[int]] = defaultdict(set)
    for tensor in chain(within.parameters(), within.buffers(), *groups):
        if type(tensor.data) is torch.Tensor:
            owners[tensor.untyped_storage().data_ptr()].add(id(tensor))
    return owners


def _merged(groups: Iterable[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    merged: list[list[torch.Tensor]] = []
    home: dict[int, list[torch.Tensor]] = {}
    for group in groups:
        target = next((home[id(weight)] for weight in group if id(weight) in home), None)
        if target is None:
            target = []
            merged.append(target)
        for weight in group:
            if id(weight) not in home:
                target.append(weight)
                home[id(weight)] = target
    return merged


def _kind(weight: torch.Tensor) -> tuple[object, ...]:
    return (weight.dtype, weight.device, weight.shape[1:])
