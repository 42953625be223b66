"""Tensors that are computed when something asks for their values.

A shallow step of a ControlNet leaves most residuals out, for the UNet's shallow step reads few. In their place stand
tensors of the same shape, strides, dtype and device. Any operator that meets one computes it first: whatever a pipeline
does with a residual, it sees the value, and never a stale one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree


class Deferral:
    """One computation that gives several tensors. It runs at most once, when the first of them is asked for.

    Args:
        compute: Takes whether an operator asked, and not one who knows that the tensors are deferred.
    """

    def __init__(self, compute: Callable[[bool], Sequence[Any]]) -> None:
        self._compute: Callable[[bool], Sequence[Any]] | None = compute
        self._values: Sequence[Any] = ()
        self._lock = threading.RLock()

    def values(self, *, by_operator: bool) -> Sequence[Any]:
        with self._lock:
            if self._compute is not None:
                with torch.no_grad():
                    self._values = self._compute(by_operator)
                self._compute = None  # and with it what it holds
            return self._values


class DeferredTensor(torch.Tensor):
    """Number `index` of the tensors that a `Deferral` gives; `like` has its shape, strides, dtype and device.

    What does not read values leaves it as it is: `shape`, `to` the device where it is, being put into a list.
    """

    _deferral: Deferral
    _index: int

    @staticmethod
    def __new__(cls, like: torch.Tensor, deferral: Deferral, index: int) -> DeferredTensor:
        made: DeferredTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        return made

    def __init__(self, like: torch.Tensor, deferral: Deferral, index: int) -> None:
        self._deferral, self._index = deferral, index

    def value(self, *, by_operator: bool = False) -> torch.Tensor:
        """The tensor itself, computed now unless it has been."""
        value = self._deferral.values(by_operator=by_operator)[self._index]
        assert isinstance(value, torch.Tensor)
        return value

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*pytree.tree_map(_asked, args), **pytree.tree_map(_asked, kwargs or {}))

    # What reads values past the operators.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return _asked(self).numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return _asked(self).tolist()

    def data_ptr(self) -> int:
        address: int = _asked(self).data_ptr()
        return address

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(_asked(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _asked(self).__reduce_ex__(protocol)


def _asked(value: Any) -> Any:
    return value.value(by_operator=True) if isinstance(value, DeferredTensor) else value


def computed(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors, with the values of those that are deferred."""
    return tuple([t.value() if isinstance(t, DeferredTensor) else t for t in tensors])


def all_computed(arguments: Any) -> Any:
    """A tuple or a dictionary of arguments, with the values of the deferred tensors among them.

    Where an argument holds none, it is the same object: what a model writes into it is there for who passed it.
    """
    if isinstance(arguments, dict):
        return {name: _with_values(value) for name, value in arguments.items()}
    return type(arguments)(map(_with_values, arguments))


def _with_values(tree: Any) -> Any:
    if not any(isinstance(leaf, DeferredTensor) for leaf in pytree.tree_leaves(tree)):
        return tree
    return pytree.tree_map(lambda leaf: leaf.value() if isinstance(leaf, DeferredTensor) else leaf, tree)


def plain_type(tensor: torch.Tensor) -> type[torch.Tensor]:
    """A tensor's class; of a deferred one, the class of its value."""
    return torch.Tensor if type(tensor) is DeferredTensor else type(tensor)
