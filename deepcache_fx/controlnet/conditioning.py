"""A ControlNet's call in canonical form: its strength is a tensor, and multiplies as the number would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from deepcache_fx.graph.signature import Call, CallReader
from passes.shared.match import is_op, tensor
from passes.shared.rewrite import add_call

aten = torch.ops.aten

CONDITION, SCALE = "controlnet_cond", "conditioning_scale"
"""Arguments of a ControlNet's forward, as diffusers names them."""


class ConditioningReader(CallReader):
    """Brings calls of a ControlNet's `forward` into canonical form.

    A strength (a number, or a list of them) becomes a 0-d tensor on the sample's device: another one is no new graph.
    The picture that conditions stays through a run, like the prompt.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__(forward)
        self.takes_condition = self._plain and CONDITION in self._names

    def read(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        if not self.takes_condition:
            return super().read(module, args, kwargs)
        arguments = self._bind(module, args, kwargs)
        sample, made = arguments[self.sample_name], set[int]()
        if SCALE in arguments and isinstance(sample, torch.Tensor):
            arguments[SCALE] = pytree.tree_map(lambda leaf: _as_tensor(leaf, sample, made), arguments[SCALE])
        call = super().read(module, (), arguments)
        staying = {id(leaf) for leaf in pytree.tree_leaves(arguments[CONDITION])}
        scales = {id(leaf) for leaf in pytree.tree_leaves(arguments.get(SCALE))}
        prompt, numbers = [], []
        for index, leaf in enumerate(call.tensors):
            if id(leaf) in staying or (index in call.prompt_inputs and id(leaf) not in scales):
                prompt.append(index)
            if id(leaf) in made:
                numbers.append(index)
        return replace(call, prompt_inputs=tuple(prompt), numbers=tuple(numbers))


def _as_tensor(leaf: Any, sample: torch.Tensor, made: set[int]) -> Any:
    if not isinstance(leaf, (int, float)) or isinstance(leaf, bool):
        return leaf
    dtype = torch.promote_types(sample.dtype, torch.float32)
    tensor = torch.full((), leaf, dtype=dtype, device=sample.device)  # nothing waits for it
    made.add(id(tensor))
    return tensor


def multiply_in_float32(graph: fx.Graph, scales: Sequence[fx.Node]) -> None:
    """Multiply half-precision features by a 0-d tensor as PyTorch does by a number: in float32, rounded once.

    mul(x, scale)  ->  to(mul(to(x, float32), scale), x.dtype)
    """
    for scale in scales:
        for node in list(scale.users):
            if not is_op(node, aten.mul.Tensor):
                continue
            [other] = [item for item in node.args if item is not scale] or [scale]
            value, factor = tensor(other), tensor(scale)
            if value is None or factor is None or not value.is_floating_point() or value.dtype == factor.dtype:
                continue
            assert isinstance(other, fx.Node)
            wide = add_call(aten.to.dtype, (other, factor.dtype), before=node, like=node)
            product = add_call(aten.mul.Tensor, (wide, scale), before=node, like=node)
            result = add_call(aten.to.dtype, (product, value.dtype), before=node, like=node)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
