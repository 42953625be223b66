"""Replace GroupNorm and what stands around it by one operator of `passes.kernels`.

    h = add(x, t)              t: (N, C, 1, 1)
    n = group_norm(h, ...)                            y = deepcache_fx.group_norm(x, ..., silu=True, addend=t)
    y = silu(n)

    h = cat([a, b], 1)
    n = group_norm(h, ...)                            y = deepcache_fx.cat_group_norm(a, b, ..., silu=True)
    y = silu(n)

Add, `cat` and SiLU may each be missing. The SiLU goes where nothing else reads the norm, the add where nothing else
reads the sum: one that is computed anyway costs no more to read than x does. So it is with a `cat`: next to a 1x1
shortcut convolution that reads it (in every decoder block of diffusers) it stays. To be run after a split at a
concatenation, which takes the plain operators apart and would leave these whole.

Opt-in, for it changes roundings: sums and norms are no longer rounded to the storage type in between. It is for GPUs;
elsewhere the operators run plain PyTorch. On CUDA the norm keeps channels-last inputs channels-last, where PyTorch's
makes its output contiguous; it is left alone if something downstream (a `view`, an output) depends on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import passes.kernels  # noqa: F401 (registers the operators)
from passes.shared.match import is_op, only_user, tensor, value
from passes.shared.operators import argument
from passes.shared.rewrite import Declined, add_call, strides_matter

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FuseGroupNorm(PassBase):
    """See the module's first lines.

    Args:
        cat: Whether to absorb concatenations.

    Attributes:
        declined: The norms that the last call left alone, and why.
    """

    after_split = True  # SplitOverCat takes plain norms apart, not these operators

    def __init__(self, *, cat: bool = True) -> None:
        super().__init__()
        self.cat = cat
        self.declined: tuple[Declined, ...] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        declined = []
        modified = False
        for norm in graph_module.graph.find_nodes(op="call_function", target=aten.group_norm.default):
            reason = _why_not(norm) or self._fuse(norm)
            if reason is None:
                modified = True
            else:
                declined.append(Declined((norm.name,), reason))
        self.declined = tuple(declined)
        return PassResult(graph_module, modified)

    def _fuse(self, norm: fx.Node) -> str | None:
        """Rewrite one norm; says why not where it cannot be."""
        source = norm.args[0]
        assert isinstance(source, fx.Node)
        user = only_user(norm)
        last = user if user is not None and is_op(user, aten.silu.default) else norm
        names = ("weight", "bias", "num_groups", "eps")
        settings = (*(argument(norm, name) for name in names), last is not norm)

        halves = self._halves(source, norm)
        if halves is None:
            target = torch.ops.deepcache_fx.group_norm.default
            x, addend = _sum(source, norm) or (source, None)
            args: tuple[Any, ...] = (x, *settings, addend)
        else:
            target = torch.ops.deepcache_fx.cat_group_norm.default
            args = (*halves, *settings)
        fused = add_call(target, args, before=norm, like=norm)
        if strides_matter(last, value(fused)):
            norm.graph.erase_node(fused)
            return "its output would change from contiguous to channels-last, and what reads it depends on that"
        last.replace_all_uses_with(fused)
        for node in dict.fromkeys((last, norm, source)):
            if not node.users:
                norm.graph.erase_node(node)
        return None

    def _halves(self, source: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The operands of a `cat` that the norm is to read itself."""
        if not self.cat or not is_op(source, aten.cat.default) or only_user(source) is not norm:
            return None
        operands, joined = source.args[0], tensor(source)
        assert isinstance(operands, Sequence)
        if len(operands) != 2 or joined is None or argument(source, "dim") not in (1, 1 - joined.ndim):
            return None
        first, second = operands
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        for half in (first, second):
            val = tensor(half)
            if val is None or (val.ndim, val.dtype) != (joined.ndim, joined.dtype) or not val.shape[1]:
                return None
        return first, second


def _why_not(norm: fx.Node) -> str | None:
    x = tensor(norm.args[0])
    if x is None or tensor(norm) is None:
        return "nothing is known of its input or output"
    if x.ndim < 3:
        return f"its input has {x.ndim} axes: there are no positions to normalise over"
    if x.dtype not in DTYPES:
        return f"its input is {x.dtype}"
    return None


def _sum(source: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The feature map and the one number per sample and channel whose sum the norm alone reads."""
    if not is_op(source, aten.add.Tensor) or only_user(source) is not norm or argument(source, "alpha") != 1:
        return None
    total = value(source)
    for x, addend in (source.args, source.args[::-1]):
        map_, column = tensor(x), tensor(addend)
        if map_ is None or column is None or (map_.shape, map_.dtype) != (total.shape, total.dtype):
            continue
        if column.ndim == total.ndim and column.shape[1] == total.shape[1] and column.shape[2:].numel() == 1:
            assert isinstance(x, fx.Node)
            assert isinstance(addend, fx.Node)
            return x, addend
    return None
