"""The weights that the graphs of a capture hold, and how others take their place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def inner_names(tensor: torch.Tensor) -> Sequence[str]:
    """Under which attributes a tensor holds those that it wraps, as a quantised one does."""
    if type(tensor) is torch.nn.Parameter or type(tensor) is torch.Tensor or not is_traceable_wrapper_subclass(tensor):
        return ()
    names: Sequence[str] = tensor.__tensor_flatten__()[0]
    return names


def unwrapped(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the values: of a wrapper those inside, down to the last, else itself."""
    names = inner_names(tensor)
    if not names:
        yield tensor
    for name in names:
        yield from unwrapped(getattr(tensor, name))


def held(graph: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What a graph holds, once for each name, and what that wraps."""
    for tensor in (*graph.parameters(), *graph.buffers()):
        yield tensor
        if inner_names(tensor):
            yield from unwrapped(tensor)


Stamp = tuple[int, int, bytes]


def stamps(tensors: Iterable[torch.Tensor], *, addresses_and_samples: bool) -> list[Stamp]:
    """Others where a tensor has been written into or, asked for, moved.

    PyTorch counts what is written into a tensor, but not through `.data`, as when a LoRA is added in place. So, asked
    for, some of the values are read as well, on a CPU, where nothing has to be waited for.
    """
    inside = [one for tensor in tensors for one in unwrapped(tensor)]
    counts = [0 if t.is_inference() else t._version for t in inside]
    if not addresses_and_samples:
        return [(count, 0, b"") for count in counts]
    return [(count, t.data_ptr(), _sample(t)) for count, t in zip(counts, inside, strict=True)]


_SAMPLED = 64


def _sample(tensor: torch.Tensor) -> bytes:
    """Some of a tensor's values, evenly spaced in its memory."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return b""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if reach != tensor.numel():
        return b""  # not dense: some of that memory may belong to others
    count = min(tensor.numel(), _SAMPLED)
    values = tensor.detach().as_strided((count,), (tensor.numel() // count,))
    return bytes(values.contiguous().view(torch.uint8).numpy())


def is_aligned(tensor: torch.Tensor) -> bool:
    """True where a tensor begins where compilers take it that weights do, as all of PyTorch's allocations do."""
    return all(inside.data_ptr() % _ALIGNMENT == 0 for inside in unwrapped(tensor))


_ALIGNMENT = 16
"""In bytes, of Inductor's vector loads."""

_PREFIX = "model."
"""Of the model's names in a graph of it (see `capture`)."""

_UNWRAPPED = re.compile(r"(.+\.)?parametrizations\.([^.]+)\.original\d*")
"""What torch.export calls a tensor that it has taken out of the one that wraps it."""


def hold_own_weights(graph: fx.GraphModule, module: torch.nn.Module) -> None:
    """Let a graph of a model hold the model's own objects, where torch.export has made others of the same memory."""
    own: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for prefix, sub in graph.named_modules():
        for tensors in (sub._parameters, sub._buffers):
            for key, tensor in tensors.items():
                name = f"{prefix}.{key}".removeprefix(_PREFIX)
                found = _own(name, tensor, own) if tensor is not None else None
                if found is not None:
                    tensors[key] = found


def _own(name: str, tensor: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    if name in own:
        return own[name]
    taken_out = _UNWRAPPED.fullmatch(name)
    outer = own.get(f"{taken_out[1] or ''}{taken_out[2]}") if taken_out else None
    inside = unwrapped(outer) if outer is not None else ()
    return next((item for item in inside if _memory(item) == _memory(tensor)), None)


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


@contextmanager
def as_parameters(module: torch.nn.Module) -> Iterator[None]:
    """In the block, plain tensors that took the places of parameters are parameters over the same memory.

    `swap_tensors` leaves such: peft, where it grows the rank of an adapter that is swapped while hot. torch.export
    refuses them.
    """
    made: dict[int, torch.nn.Parameter] = {}
    put: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for sub in module.modules():
        tensors: dict[str, Any] = sub._parameters
        for name, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, torch.nn.Parameter):
                put.append((tensors, name, tensor))
                tensors[name] = made.setdefault(id(tensor), torch.nn.Parameter(tensor, requires_grad=False))
    try:
        yield
    finally:
        for tensors, name, tensor in put:
            tensors[name] = tensor


def let_go_of_weights(graph: fx.GraphModule) -> None:
    """Let the fake tensors of a graph forget which real ones they were made of.

    They remember by weak references, and of a tensor that has one, as of a quantised weight, `Module.to` does not take
    the contents out ("Cannot swap t1 because it has weakref associated with it").
    """
    mode = detect_fake_mode([node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")])
    if mode is not None:
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


class Binding:
    """Which of a model's weights some graphs read, by their places in the model.

    What a graph holds besides (constants that the capture or a pass has made) is none of the model's, and stays.

    Args:
        graphs: That share the weights.
        weights: All that the model has.
    """

    def __init__(self, graphs: Iterable[fx.GraphModule], weights: Sequence[torch.Tensor]) -> None:
        self._graphs = list(graphs)
        read = {id(tensor) for graph in self._graphs for tensor in held(graph)}
        self._bound = {place: weight for place, weight in enumerate(weights) if id(weight) in read}

    def add(self, graph: fx.GraphModule) -> None:
        """Let a graph that was made of the others follow as well."""
        self._graphs.append(graph)

    def all_in(self, live: Collection[int]) -> bool:
        """True where the model still has every weight that is read, by its id."""
        return all(id(weight) in live for weight in self._bound.values())

    def replaced(self, weights: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """What the model has in the place of weights that are read, by the ids of those. Its structure is the same."""
        others = ((bound, weights[place]) for place, bound in self._bound.items())
        return {id(bound): other for bound, other in others if other is not bound}

    def bind(self, weights: Sequence[torch.Tensor]) -> None:
        """Let the graphs read these."""
        others = self.replaced(weights)
        for graph in self._graphs:
            for module in graph.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if id(tensor) in others:
                            tensors[name] = others[id(tensor)]  # type: ignore[assignment]
        self._bound = {place: weights[place] for place in self._bound}
