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


def all_computed(arguments: Any) -> Any:
    """A tuple or a dictionary of arguments, with the values of the lazy tensors among them.

    Where an argument holds none, it is the same object: what a model writes into it is there for who passed it.
    """
    if isinstance(arguments, dict):
        return {name: _with_values(value) for name, value in arguments.items()}
    return type(arguments)(map(_with_values, arguments))


def _with_values(tree: Any) -> Any:
    if not any(isinstance(leaf, LazyTensor) for leaf in pytree.tree_leaves(tree)):
        return tree
    return pytree.tree_map(lambda leaf: leaf.value() if isinstance(leaf, LazyTensor) else leaf, tree)


def plain_type(tensor: torch.Tensor) -> type[torch.Tensor]:
    """A tensor's class; of a lazy one, the class of its value."""
    return torch.Tensor if isinstance(tensor, LazyTensor) else type(tensor)
