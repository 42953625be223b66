"""Forecast the cached values from their last refreshes instead of repeating the last one.

    shallow.step(x, c)  ->  shallow.step(x, c_0, ..., c_m, w),   where c = w_0 c_0 + ... + w_m c_m

c_0 is the newest. The weights w are those of the polynomial of degree m through the last m + 1 refreshes (Lagrange),
taken at the current step; with m = 1, c_0 + (i - i_0) / (i_0 - i_1) * (c_0 - c_1). The abscissa is the number of the
step: over sigma and over the log-SNR images came out farther from the uncached ones (docs/fidelity.md). Until there
have been enough refreshes the degree is what there are, so that the first period repeats, as published DeepCache always
does. TaylorSeer (arXiv 2503.06923) does the same to the features of transformers. Repeating (degree 0) suits samplers
better that draw new noise at every step: that is no line to follow.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import fx

from passes.shared.rewrite import add_call
from passes.shared.sizes import symbols

aten = torch.ops.aten


@functools.lru_cache(maxsize=4096)
def coefficients(step: float, refreshes: tuple[float, ...], order: int, degree: int | None = None) -> tuple[float, ...]:
    """The weights of the last refreshes at a step, newest first; `order` + 1 of them, and 0 where there is no refresh.

    Args:
        step: The current step.
        refreshes: The steps of the last refreshes, newest first; at least one.
        order: How many refreshes there are weights for, less one.
        degree: Of the polynomial; `order` where it is None. 0 repeats the last refresh.
    """
    points = refreshes[: (order if degree is None else min(degree, order)) + 1]
    weights = []
    for point in points:
        weight = 1.0
        for other in points:
            if other != point:
                weight *= (step - other) / (point - other)
        weights.append(weight)
    return (*weights, *[0.0] * (order + 1 - len(points)))


def weights_on(device: torch.device, values: Sequence[float]) -> torch.Tensor:
    """The weights as a float32 tensor on a device; nothing waits for the device."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def combine_refreshes(shallow: fx.GraphModule, cached: Sequence[fx.Node], order: int) -> fx.GraphModule:
    """Let the shallow graph read order + 1 refreshes of every cached value, newest first, and their weights.

    Its inputs become (*inputs, *newest values, ..., *oldest values, weights). The sum is taken in float32 at least.
    """
    graph = shallow.graph
    last = cached[-1]
    older: list[list[fx.Node]] = []
    for age in range(1, order + 1):
        row = []
        for node in cached:
            with graph.inserting_after(last):
                last = graph.placeholder(f"older_{age}_{node.target}")
            last.meta = dict(node.meta)
            row.append(last)
        older.append(row)
    with graph.inserting_after(last):
        weights = graph.placeholder("forecast_weights")
    example = cached[0].meta["val"]
    weights.meta["val"] = example.new_empty((order + 1,), dtype=torch.float32)
    first = weights.next
    single = [add_call(aten.select.int, (weights, 0, age), before=first, like=weights) for age in range(order + 1)]
    for index, node in enumerate(cached):
        total = None
        users = list(node.users)
        for age, value in enumerate([node, *(row[index] for row in older)]):
            total = _add_weighted(total, value, single[age], first)
        assert total is not None
        total = _cast(total, node.meta["val"].dtype, first)
        for user in users:
            user.replace_input_with(node, total)
    return fx.GraphModule(shallow, graph)


def _add_weighted(total: fx.Node | None, value: fx.Node, weight: fx.Node, before: fx.Node) -> fx.Node:
    wide = torch.promote_types(value.meta["val"].dtype, torch.float32)
    value = _cast(value, wide, before)
    if total is None:
        return add_call(aten.mul.Tensor, (value, weight), before=before, like=value)
    if symbols(value.meta["val"]):  # of which PyTorch cannot tell what addcmul with a scalar makes
        term = add_call(aten.mul.Tensor, (value, weight), before=before, like=value)
        return add_call(aten.add.Tensor, (total, term), before=before, like=value)
    return add_call(aten.addcmul.default, (total, value, weight), before=before, like=value)


def _cast(node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return add_call(aten.to.dtype, (node, dtype), before=before, like=node)
