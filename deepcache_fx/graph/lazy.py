"""Tensors that are computed when something asks for their values: inputs of a call, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree


class LazyTensor(torch.Tensor):
    """Stands for a plain tensor of the same shape, strides, dtype and device."""

    def value(self, *, by_operator: bool = False) -> torch.Tensor:
        """The tensor itself, computed now unless it has been.

        Args:
            by_operator: Whether an operator asks, and not one who knows that the tensor is lazy.
        """
        raise NotImplementedError


def computed(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors, with the values of those that are lazy."""
    return tuple([t.value() if isinstance(t, LazyTensor) else t for t in tensors])


def all_computed(tree: Any) -> Any:
    """Nested arguments of a call, with the values of the lazy tensors among them."""
    return pytree.tree_map(lambda leaf: leaf.value() if isinstance(leaf, LazyTensor) else leaf, tree)


def plain_type(tensor: torch.Tensor) -> type[torch.Tensor]:
    """A tensor's class; of a lazy one, the class of its value."""
    return torch.Tensor if isinstance(tensor, LazyTensor) else type(tensor)
