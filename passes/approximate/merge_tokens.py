"""Let self-attention work on fewer tokens: merge those that are most alike, and copy the result to each of them.

                                      m = merge(x)
    q, k, v = linear(x, ...)          q, k, v = linear(m, ...)
    a = attention(q, k, v)      ->    a = attention(q, k, v)
    y = linear(a, ...)                y = unmerge(linear(a, ...))
    z = y + x                         z = y + x

Token Merging for Fast Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604). Of every 2x2 pixels the first is a
destination. Of the others, those that are most like a destination (by cosine, before the norm that x comes from) are
averaged into it: `ratio` times the number of pixels, so that attention costs (1 - ratio) ** 2 of what it did. Which
ones is computed at every run; how many is fixed. The paper draws the destination among the 2x2 pixels; here it is
always the first, which its authors' tomesd calls `use_rand=False`: a static graph does the same at every run.

Found by dataflow: `scaled_dot_product_attention` whose Q, K and V are computed, token by token, of the same
(batch, tokens, channels), the pixels of a feature map. Left alone, and listed in `declined`: cross-attention, masked
attention, attention between frames, and feature maps that are small already. Attention that is spelled in other
operators is not seen. The layer after the attention runs on the merged tokens, too, unless several read the attention
(LoRA that is not fused).

Opt-in: the result differs, the more the larger the ratio. On CUDA the averages are summed in no fixed order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.approximate.pixel_attention import PixelAttention, find_pixel_attention, run_on_fewer
from passes.shared.match import is_op, tensor, value
from passes.shared.rewrite import Declined, add_call, origin, propagate

aten = torch.ops.aten

_CELL = 2
"""The destinations lie this many pixels apart, down and across."""

_SHORTEST = 1e-6
"""Tokens are divided by their length, or by this where they are shorter."""

Emit = Callable[..., fx.Node]


class MergeTokens(PassBase):
    """See the module's first lines.

    Args:
        ratio: Of the tokens of a feature map, how many are merged into others: 0 (none) to 0.75 (all but the
            destinations).
        max_downsample: Merge in feature maps that are at most this many times smaller, down and across, than the first
            input of four or more dimensions. Stable Diffusion attends at 1, 2, 4 and 8; SDXL at 2 and 4.

    Attributes:
        declined: The attentions that the last call left alone, and why.

    Example:
        >>> deepcache_fx.optimize(pipe, passes=[MergeTokens(0.5)])
    """

    keeps_metadata = True

    def __init__(self, ratio: float = 0.5, *, max_downsample: int = 1) -> None:
        super().__init__()
        largest = 1 - 1 / _CELL**2
        if not 0 <= ratio <= largest:
            raise ValueError(f"ratio must be from 0 to {largest}, for one token in {_CELL**2} stays, got {ratio!r}")
        if isinstance(max_downsample, bool) or not isinstance(max_downsample, int) or max_downsample < 1:
            raise ValueError(f"max_downsample must be an integer of at least 1 (the full size), got {max_downsample!r}")
        self.ratio = ratio
        self.max_downsample = max_downsample
        self.declined: tuple[Declined, ...] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        declined = []
        modified = False
        if self.ratio > 0:
            pixels = _pixels_of_input(graph_module.graph)
            target = aten.scaled_dot_product_attention.default
            for attention in graph_module.graph.find_nodes(op="call_function", target=target):
                found = find_pixel_attention(attention)
                reason = found if isinstance(found, str) else self._merge(graph_module, found, pixels)
                if reason is None:
                    modified = True
                else:
                    declined.append(Declined((attention.name,), reason))
        self.declined = tuple(declined)
        return PassResult(graph_module, modified)

    def _merge(self, module: fx.GraphModule, found: PixelAttention, pixels: int) -> str | None:
        """Rewrite one self-attention; says why not where it is to be left alone."""
        tokens = found.height * found.width
        if pixels // tokens > self.max_downsample**2:
            return f"works on {found.height}x{found.width} pixels, and max_downsample is {self.max_downsample}"
        destinations = (found.height // _CELL) * (found.width // _CELL)
        merged = min(int(self.ratio * tokens), tokens - destinations)
        if merged == 0 or destinations == 0:
            return f"merges no token of {found.height}x{found.width} pixels"
        emit = partial(add_call, before=next(iter(found.axes)), like=found.tokens)
        matching = _match(emit, found.tokens, *_orders(module, found), destinations, merged)
        run_on_fewer(found, _merge(emit, found.tokens, matching))
        readers = list(found.result.users)
        emit = partial(add_call, before=found.result.next, like=found.result)
        whole = emit(aten.gather.default, (found.result, 1, _wide(emit, matching.places, found.result)))
        for reader in readers:
            reader.replace_input_with(found.result, whole)
        propagate(module.graph, [whole])
        return None


def _pixels_of_input(graph: fx.Graph) -> int:
    """Height times width of the first input that is an image, or a video: the latent. 0 where there is none."""
    shapes = [val.shape for node in graph.find_nodes(op="placeholder") if (val := tensor(node)) is not None]
    return next((shape[-2:].numel() for shape in shapes if len(shape) >= 4), 0)


def _orders(module: fx.GraphModule, found: PixelAttention) -> tuple[fx.Node, fx.Node]:
    """Buffers of the module: all tokens with the destinations last, and where in that order each of them is."""
    pixels = torch.arange(found.height * found.width).view(found.height, found.width)
    is_destination = torch.zeros_like(pixels, dtype=torch.bool)
    rows, columns = (size // _CELL * _CELL for size in (found.height, found.width))
    is_destination[:rows:_CELL, :columns:_CELL] = True
    order = torch.cat([pixels[~is_destination], pixels[is_destination]])
    nodes = []
    for name, buffer in (("order", order), ("places", order.argsort())):
        name = f"tokens_{found.height}x{found.width}_{name}"
        tokens = value(found.tokens)
        module.register_buffer(name, buffer.to(tokens.device), persistent=False)
        with module.graph.inserting_before(next(iter(found.axes))):
            nodes.append(module.graph.get_attr(name))
        mode = detect_fake_mode(tokens)
        real = module.get_buffer(name)
        nodes[-1].meta = {**origin(found.tokens), "val": real if mode is None else mode.from_tensor(real)}
    return nodes[0], nodes[1]


@dataclass(frozen=True)
class _Matching:
    """Which tokens merge into which. The indices have one row a sample."""

    order: fx.Node
    """All tokens, the sources before the destinations."""
    sources: int
    kept: fx.Node
    merged: fx.Node
    """Which sources stay as they are, and which do not."""
    into: fx.Node
    """For each of the latter, its destination."""
    places: fx.Node
    """For each pixel, its place among the kept sources and the destinations behind them."""


def _match(emit: Emit, tokens: fx.Node, order: fx.Node, places: fx.Node, destinations: int, merged: int) -> _Matching:
    batch, count, _ = value(tokens).shape
    sources = count - destinations
    source = tokens.args[0] if is_op(tokens, aten.layer_norm.default, aten.rms_norm.default) else tokens
    ordered = emit(aten.index_select.default, (source, 1, order))
    length = emit(aten.linalg_vector_norm.default, (ordered, 2, [-1], True))
    unit = emit(aten.div.Tensor, (ordered, emit(aten.clamp_min.default, (length, _SHORTEST))))
    likeness = emit(
        aten.matmul.default,
        (_part(emit, unit, 0, sources), emit(aten.transpose.int, (_part(emit, unit, sources, count), 1, 2))),
    )
    best = emit(aten.max.dim, (likeness, -1))
    best_likeness, best_destination = (emit(operator.getitem, (best, index)) for index in (0, 1))
    ranked = emit(aten.argsort.stable, (best_likeness,), {"stable": True, "dim": -1, "descending": True})
    gone = _part(emit, ranked, 0, merged)
    into = emit(aten.gather.default, (best_destination, 1, gone))

    numbers = emit(aten.arange.default, (count - merged,), {"device": value(tokens).device})
    numbers = emit(aten.expand.default, (numbers, [batch, -1]))
    kept_places = _part(emit, numbers, 0, sources - merged)
    destination_places = _part(emit, numbers, sources - merged, count - merged)
    ranked_places = emit(aten.cat.default, ([emit(aten.add.Tensor, (into, sources - merged)), kept_places], 1))
    source_places = emit(aten.scatter.src, (ranked, 1, ranked, ranked_places))
    all_places = emit(aten.cat.default, ([source_places, destination_places], 1))
    return _Matching(
        order=order,
        sources=sources,
        kept=_part(emit, ranked, merged, sources),
        merged=gone,
        into=into,
        places=emit(aten.index_select.default, (all_places, 1, places)),
    )


def _merge(emit: Emit, tokens: fx.Node, matching: _Matching) -> fx.Node:
    """The kept sources, and behind them the destinations, each the average with what is merged into it."""
    ordered = emit(aten.index_select.default, (tokens, 1, matching.order))
    sources = _part(emit, ordered, 0, matching.sources)
    destinations = _part(emit, ordered, matching.sources, value(tokens).shape[1])
    kept, gone = (
        emit(aten.gather.default, (sources, 1, _wide(emit, which, sources)))
        for which in (matching.kept, matching.merged)
    )
    into = _wide(emit, matching.into, sources)
    averages = emit(aten.scatter_reduce.two, (destinations, 1, into, gone, "mean"))
    return emit(aten.cat.default, ([kept, averages], 1))


def _part(emit: Emit, node: fx.Node, start: int, end: int) -> fx.Node:
    return emit(aten.slice.Tensor, (node, 1, start, end))


def _wide(emit: Emit, indices: fx.Node, like: fx.Node) -> fx.Node:
    """The same index for every channel."""
    return emit(aten.expand.default, (emit(aten.unsqueeze.default, (indices, 2)), [-1, -1, value(like).shape[2]]))
