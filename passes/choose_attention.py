"""Call the attention kernel that is fastest on this device, by measurement, instead of the first that is able.

    x = scaled_dot_product_attention(q, k, v)    x, ... = _scaled_dot_product_<fastest>_attention(q, k, v)

PyTorch takes the first of a fixed list of kernels (cuDNN, Flash, memory-efficient) that supports the call. Which is
fastest depends on the device, the number of keys and the head dimension: attention to 77 text tokens and attention to
4096 pixels want different ones. Each distinct call is timed once, on random tensors of its shapes and strides, within a
recorded graph, for a launch takes longer than most of these kernels; a kernel that refuses them, or disagrees with
PyTorch's own choice on them, is left out. What is fastest by a hair differs from time to time, and so would the
rounding of images: the choice is remembered beside Inductor's cache, and stands for every process with the same device
and versions. Only kernels that are switched on (by `torch.nn.attention.sdpa_kernel`, or by
`torch.backends.cuda.enable_flash_sdp` and its like) are tried.

Applies on CUDA, to half precision and head dimensions that are multiples of 8 (others are padded by PyTorch), without
dropout and grouped heads. The kernels compute the same function, not the same rounding. Declined where a `view` reads
the result, for the kernels differ in the strides they return.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.shared.cuda_recording import new_pool, new_stream, record
from passes.shared.match import is_op, is_view, tensor
from passes.shared.remembered import beside_the_compile_cache, remembered
from passes.shared.sizes import symbols

aten = torch.ops.aten

Kernel = Callable[..., torch.Tensor]
Timer = Callable[[Callable[[], object], torch.device], float]


@dataclass(frozen=True)
class AttentionCall:
    """What the speed of an attention call depends on."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    mask: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None
    causal: bool
    scale: float | None


def _flash(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> tuple[Any, tuple[Any, ...]] | None:
    if mask is not None:
        return None
    return aten._scaled_dot_product_flash_attention.default, (q, k, v, 0.0, causal)


def _efficient(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> tuple[Any, tuple[Any, ...]]:
    return aten._scaled_dot_product_efficient_attention.default, (q, k, v, mask, False, 0.0, causal)


def _cudnn(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> tuple[Any, tuple[Any, ...]]:
    return aten._scaled_dot_product_cudnn_attention.default, (q, k, v, mask, False, 0.0, causal)


KERNELS: Mapping[str, Callable[..., tuple[Any, tuple[Any, ...]] | None]] = {
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
}
"""Name -> (query, key, value, mask, causal) -> the operator and its arguments, None where it cannot take them."""

SWITCHES: Mapping[str, Callable[[], bool]] = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
}
"""Name -> whether PyTorch may take the kernel; one that has no switch is on."""

_TOLERANCE = 2e-2
"""Relative; half precision keeps 8 to 11 bits."""

_chosen: dict[tuple[AttentionCall, tuple[str, ...]], str | None] = {}

_REPEATS = 20
"""Launches in one recorded graph."""


def time_on_cuda(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one launch among many in a recorded graph, the median of 10 replays after 3 to warm up."""

    def several() -> list[object]:
        for _ in range(_REPEATS):
            run()
        return []

    times: list[float] = []
    with torch.cuda.device(device):
        stream, current = new_stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph, _ = record(several, device=torch.cuda.current_device(), pool=new_pool(), stream=stream)
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / _REPEATS)
        graph.reset()
    return statistics.median(times[3:])


def enabled() -> tuple[str, ...]:
    """The kernels that may be tried now."""
    return tuple(name for name in KERNELS if name not in SWITCHES or SWITCHES[name]())


def question(call: AttentionCall, kernels: tuple[str, ...]) -> dict[str, object]:
    """What the choice for a call depends on, as JSON has it."""
    device: dict[str, object] = {"type": call.device.type}
    if call.device.type == "cuda":
        properties = torch.cuda.get_device_properties(call.device)
        device |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    return {
        "device": device,
        "versions": [torch.__version__, torch.version.cuda, torch.backends.cudnn.version()],  # type: ignore[no-untyped-call]
        "kernels": list(kernels),
        "dtype": str(call.dtype),
        "shapes": [list(shape) for shape in call.shapes],
        "strides": [list(stride) for stride in call.strides],
        "mask": None if call.mask is None else [list(call.mask[0]), list(call.mask[1]), str(call.mask[2])],
        "causal": call.causal,
        "scale": call.scale,
    }


def fastest(call: AttentionCall, timer: Timer = time_on_cuda, kernels: tuple[str, ...] | None = None) -> str | None:
    """The name of the fastest of these kernels, or all, for a call; None where none beats PyTorch's own choice."""
    with torch.no_grad():
        generator = torch.Generator(call.device).manual_seed(0)  # the global one belongs to the user
        q, k, v = (
            torch.empty_strided(shape, stride, dtype=call.dtype, device=call.device).normal_(generator=generator)
            for shape, stride in zip(call.shapes, call.strides, strict=True)
        )
        mask = None
        if call.mask is not None:
            mask = torch.empty_strided(call.mask[0], call.mask[1], dtype=call.mask[2], device=call.device).zero_()

        def default() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=call.causal, scale=call.scale
            )

        expected = default().float()
        best, least = None, timer(default, call.device)
        for name in KERNELS if kernels is None else kernels:
            built = KERNELS[name](q, k, v, mask, call.causal)
            if built is None:
                continue
            kernel, arguments = built

            def run(kernel: Any = kernel, arguments: tuple[Any, ...] = arguments) -> Any:
                return kernel(*arguments, scale=call.scale)[0]

            try:
                error = (run().float() - expected).norm() / expected.norm()
                if not error <= _TOLERANCE:
                    continue
                seconds = timer(run, call.device)
            except RuntimeError:  # it does not support this call, or cannot be recorded
                continue
            if seconds < least:
                best, least = name, seconds
    return best


class ChooseAttention(PassBase):
    """See the module's first lines.

    Args:
        timer: Times a function on a device; replaced in tests.
        device_types: Where to look for a choice at all.
        directory: Where choices are remembered. None: beside Inductor's cache; nowhere with a timer of one's own.
    """

    def __init__(
        self,
        timer: Timer = time_on_cuda,
        device_types: tuple[str, ...] = ("cuda",),
        directory: Path | None = None,
    ) -> None:
        super().__init__()
        self._timer = timer
        self._device_types = device_types
        self._directory = directory

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            call = self._read(node)
            if call is None or _read_by_view(node):
                continue
            name = self._choose(call)
            if name is not None:
                _replace(graph, node, name, call)
                modified = True
        return PassResult(graph_module, modified)

    def _choose(self, call: AttentionCall) -> str | None:
        kernels = enabled()
        key = call, kernels
        if key not in _chosen:

            def measure() -> str | None:
                return fastest(call, self._timer, kernels)

            directory = self._directory
            if directory is None and self._timer is time_on_cuda:
                directory = beside_the_compile_cache("attention_kernels")
            if directory is None or not kernels:
                _chosen[key] = measure() if kernels else None
            else:
                _chosen[key] = remembered(directory, question(call, kernels), (*kernels, None), measure)
        return _chosen[key]

    def _read(self, node: fx.Node) -> AttentionCall | None:
        """The call a node makes; None where this pass leaves it alone."""
        arguments = _arguments(node)
        operands = [tensor(arguments[name]) for name in ("query", "key", "value")]
        q, k, v = operands
        if q is None or k is None or v is None or q.device.type not in self._device_types:
            return None
        heads_agree = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
        if not heads_agree or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or v.shape[-1] % 8:
            return None
        if arguments["dropout_p"] or arguments["enable_gqa"]:
            return None
        if any(map(symbols, (q, k, v))):
            return None  # which kernel is fastest depends on sizes that are not known
        mask = tensor(arguments["attn_mask"])
        if mask is not None and mask.dtype != q.dtype:
            return None  # a boolean mask: PyTorch converts it first
        return AttentionCall(
            device=q.device,
            dtype=q.dtype,
            shapes=tuple(tuple(t.shape) for t in (q, k, v)),
            strides=tuple(tuple(t.stride()) for t in (q, k, v)),
            mask=None if mask is None else (tuple(mask.shape), tuple(mask.stride()), mask.dtype),
            causal=bool(arguments["is_causal"]),
            scale=arguments["scale"],
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults filled in."""
    schema = aten.scaled_dot_product_attention.default._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def _read_by_view(node: fx.Node) -> bool:
    """True where a `view`, which fits one set of strides alone, reads the node, also through other views."""
    return any(is_op(user, aten.view.default) or (is_view(user) and _read_by_view(user)) for user in node.users)


def _replace(graph: fx.Graph, node: fx.Node, name: str, call: AttentionCall) -> None:
    arguments = _arguments(node)
    built = KERNELS[name](*(arguments[key] for key in ("query", "key", "value", "attn_mask")), call.causal)
    assert built is not None
    kernel, args = built
    with graph.inserting_before(node):
        several = graph.call_function(kernel, args, {"scale": call.scale})
        result = graph.call_function(operator.getitem, (several, 0))
    for new in (several, result):
        new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
