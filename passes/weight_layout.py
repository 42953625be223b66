"""Let weights lie one after another in one storage, so that a graph can read several as one matrix, without a copy.

Every parameter keeps its identity, its name, its shape and its values, and is written to as before; only its memory
moves. `model.to(...)`, offloading and whatever else replaces a parameter's data part them again: ask `intact()` before
running a graph that relies on the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightLayout:
    """What `lay_out` did."""

    groups: tuple[tuple[torch.nn.Parameter, ...], ...]

    def has(self, weight: torch.Tensor) -> bool:
        """True for a weight that was laid out."""
        return any(weight is one for group in self.groups for one in group)

    def intact(self) -> bool:
        """True while the weights of every group still lie one after another."""
        return all(are_adjacent(group) for group in self.groups)

    def undo(self) -> None:
        """Give every weight memory of its own again. Values stay; once undone, does nothing."""
        for group in self.groups:
            for weight in group:
                if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
                    weight.data = weight.data.clone()


def lay_out(groups: Iterable[Sequence[torch.nn.Parameter]]) -> WeightLayout:
    """Move each group of weights into one storage of its own, in order.

    Needs memory for one group at a time besides the weights themselves. The caller sees to it that nothing else holds
    the old memory: a recorded CUDA graph, say.

    Raises:
        ValueError: the weights of a group differ in dtype, device or width, or one is given twice; nothing has moved.

    Example:
        >>> layout = lay_out([[attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]])
        >>> layout.undo()
    """
    result = WeightLayout(tuple(tuple(group) for group in groups))
    weights = [weight for group in result.groups for weight in group]
    if len({id(weight) for weight in weights}) < len(weights):
        raise ValueError("a weight is given twice: it can lie in one place only")
    for group in result.groups:
        kinds = {(weight.dtype, weight.device, weight.shape[1:]) for weight in group}
        if len(kinds) > 1:
            raise ValueError(
                f"weights that lie together must agree in dtype, device and width, got {sorted(map(str, kinds))}"
            )
    for group in result.groups:
        joined = torch.cat([weight.data for weight in group])
        for weight, part in zip(group, torch.split(joined, [len(weight) for weight in group]), strict=True):
            weight.data = part
    return result


def are_adjacent(weights: Sequence[torch.Tensor]) -> bool:
    """True where each of the weights is dense and begins in memory where the one before it ends."""
    first = weights[0]
    place = first.storage_offset()
    for weight in weights:
        if not (weight.is_contiguous() and weight.storage_offset() == place and weight.shape[1:] == first.shape[1:]):
            return False
        if place_of(weight)[0] != place_of(first)[0] or weight.dtype != first.dtype:
            return False
        place += weight.numel()
    return True


def place_of(weight: torch.Tensor) -> tuple[int, int]:
    """The storage a weight lies in, as a number, and its offset there. Works on the meta device, too."""
    return int(weight.untyped_storage()._cdata), int(weight.storage_offset())
