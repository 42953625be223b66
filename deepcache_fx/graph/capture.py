"""Capture a model as one flat, functional `torch.fx` graph that holds the model's own parameters."""

from __future__ import annotations

import functools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from deepcache_fx.errors import CaptureError, DeepCacheError, Uncapturable
from deepcache_fx.graph.containers import tensors_left
from deepcache_fx.graph.lazy import computed
from deepcache_fx.graph.signature import Call, CallReader
from deepcache_fx.graph.sizes import Sizes, depends_on_values, free_axes
from deepcache_fx.graph.weights import as_parameters, hold_own_weights, let_go_of_weights
from passes.shared.match import eliminate_dead_code
from passes.shared.sizes import is_size, read_from_inputs

CAPTURE_LOCK = threading.RLock()
"""`torch.export` is not thread-safe: captures and compilations happen under this lock."""


@dataclass(frozen=True)
class Captured:
    """A captured call.

    `graph` maps the call's tensors, in the order of `Call.tensors`, to a flat tuple of output leaves. Its parameters
    are the model's own objects.
    """

    graph: fx.GraphModule
    out_spec: pytree.TreeSpec
    sizes: Sizes | None = None
    """Which sizes of inputs the graph serves; None: those of the call that was captured."""
    is_tuple: bool = field(init=False)
    """True where the model returns a plain tuple of leaves."""
    is_leaf: bool = field(init=False)
    """True where it returns a tensor."""

    def __post_init__(self) -> None:
        spec = self.out_spec
        object.__setattr__(self, "is_tuple", spec.type is tuple and spec.num_nodes == spec.num_leaves + 1)
        object.__setattr__(self, "is_leaf", spec.is_leaf())

    def outputs(self, leaves: Sequence[Any]) -> Any:
        """What the model would have returned: a tuple, or its output class."""
        if self.is_tuple:
            return tuple(leaves)
        if self.is_leaf:
            return leaves[0]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def with_graph(self, graph: fx.GraphModule) -> Captured:
        return replace(self, graph=graph)


class _Original(torch.nn.Module):
    """The class's own forward, past whatever has been attached to the instance, as a function of tensors alone.

    Everything else of the call is bound: in copies, which forward may write into.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model = module  # before whose name those of its parameters stand in the graph
        self.of_tensors = forward
        self.training = module.training

    def forward(self, /, **tensors: torch.Tensor) -> Any:
        return self.of_tensors(self.model, list(tensors.values()))


class _ByPosition(_Original):
    """The same, as torch.export wants it where sizes are symbols."""

    def forward(self, *tensors: torch.Tensor) -> Any:  # type: ignore[override]
        return self.of_tensors(self.model, list(tensors))


def capture(
    module: torch.nn.Module,
    call: Call,
    reader: CallReader,
    model_class: type[torch.nn.Module] | None = None,
    *,
    dynamic: bool = False,
    traced: Callable[[], object] = lambda: None,
) -> Captured:
    """Capture `module` for calls like this one (see `Captured`). `model_class` is the class whose forward is meant.
    `traced` is called whenever the model's forward has returned, before `torch.export` gives attributes back the values
    that they had. With `dynamic` the batch and the sizes of feature maps are symbols (see `sizes`).

    `torch.export` in its non-strict form. Where the model writes in place, an empty decomposition table makes the graph
    functional and keeps linear, conv, norms and attention whole; where it does not, the graph is functional as it is,
    and the second trace, which is the longer one, is saved.

    Raises:
        CaptureError: the model changes its own buffers or inputs, or `torch.export` cannot follow it.
        Uncapturable: it leaves tensors in its arguments; calls like this one are refused by `reader` from now on.
    """
    model_class = model_class or type(module)
    # A tensor passed twice is one graph input to export: give every leaf an object of its own.
    tensors = [tensor.detach() for tensor in computed(call.tensors)]
    named = dict(zip(call.tensor_names(), tensors, strict=True))
    left: list[str] = []

    def forward(model: torch.nn.Module, given: list[torch.Tensor]) -> Any:
        args, kwargs = reader.rebuild(call, given)
        with _others_untraced():
            result = model_class.forward(model, *args, **kwargs)
        left.extend(tensors_left(args, kwargs, given))
        traced()
        return result

    with CAPTURE_LOCK, as_parameters(module), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            if dynamic:
                program = _export_for_sizes(_ByPosition(module, forward), named)
            else:
                program = torch.export.export(_Original(module, forward), (), named, strict=False)
            if left:
                place = ".".join(part for part in left[0].split(".") if not part.isdigit())  # a list may grow
                reason = f"{model_class.__name__} leaves a tensor in its argument ({place}), which a graph would not"
                reader.refuse(call, reason)
                raise Uncapturable(reason)
            if not _is_functional(program.graph):
                program = program.run_decompositions({})
            signature = program.graph_signature
            changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
            if changed:
                raise CaptureError(
                    f"{model_class.__name__} changes its own state in forward ({', '.join(changed)}): a cached step "
                    "would skip that change. Put the model into eval mode, or restore() it."
                )
            graph_module = program.module(check_guards=False)
        except CaptureError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            raise CaptureError(
                f"{model_class.__name__} could not be captured for inputs {_shapes(call)}: "
                f"{type(error).__name__}: {first[0]}"
            ) from error
    assert isinstance(graph_module, fx.GraphModule)
    out_spec = graph_module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    flat = _flatten_border(graph_module, list(named))
    hold_own_weights(flat, module)
    let_go_of_weights(flat)
    _refuse_sizes_by_value(flat.graph, model_class.__name__)
    return Captured(flat, out_spec, Sizes.of(flat.graph) if dynamic else None)


@contextmanager
def _others_untraced() -> Iterator[None]:
    """Keep what other threads do out of the trace under way in this one.

    `torch.fx` traces by replacing `torch.nn.Module.__call__` and `__getattr__`, for every module and every thread: a
    model of another thread would be traced as if it were called here.
    """
    traced, thread = {name: getattr(torch.nn.Module, name) for name in _UNTRACED}, threading.get_ident()

    def by_thread(name: str) -> Callable[..., Any]:
        within, outside = traced[name], _UNTRACED[name]
        return functools.wraps(within)(
            lambda *args, **kwargs: (within if threading.get_ident() == thread else outside)(*args, **kwargs)
        )

    for name in traced:
        setattr(torch.nn.Module, name, by_thread(name))
    try:
        yield
    finally:
        for name, method in traced.items():
            setattr(torch.nn.Module, name, method)


_UNTRACED: dict[str, Callable[..., Any]] = {
    "__call__": torch.nn.Module.__call__,
    "__getattr__": torch.nn.Module.__getattr__,
}


def _export_for_sizes(module: _ByPosition, named: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """Export with symbols for sizes; inputs have the names that they have elsewhere."""
    free = [dict.fromkeys(free_axes(tensor), torch.export.Dim.AUTO) or None for tensor in named.values()]
    return torch.export.export(module, tuple(named.values()), strict=False, dynamic_shapes={"tensors": tuple(free)})


def is_compiling_here() -> bool:
    """True within a compilation. `torch.compiler` tells of the whole process; what others capture is waited for:
    until then the model holds stand-ins of its weights.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return torch.compiler.is_compiling()
    with CAPTURE_LOCK:  # this thread goes on at once where the capture is its own
        return torch.compiler.is_compiling()


def refuse_layerwise_offload(module: torch.nn.Module, device: torch.device | None = None) -> None:
    """Raise a DeepCacheError where something brings weights in and out, or casts them, within a call.

    That is accelerate, diffusers, ComfyUI or Forge. `device` is the call's: weights that are cast where they are can be
    followed, and weights that lie elsewhere than the input cannot.
    """
    for name, sub in module.named_modules():
        label = name or "the model itself"
        for hook in getattr(sub.__dict__.get("_diffusers_hook"), "hooks", ()):
            raise DeepCacheError(
                f"{label} of this {type(module).__name__} has diffusers' hook {hook!r}, which "
                "acts within a call, where a graph of the whole cannot follow. Use enable_model_cpu_offload instead of "
                "group offloading, and a model without layerwise casting and without diffusers' own caches"
            )
        hook = sub.__dict__.get("_hf_hook")
        if any(getattr(single, "offload", False) is True for single in getattr(hook, "hooks", (hook,))):
            raise DeepCacheError(
                f"the weights of {type(module).__name__} are offloaded layer by layer ({label}): "
                "sequential offload brings them in and out within a call, which no graph of the whole can follow. Use "
                "enable_model_cpu_offload instead of enable_sequential_cpu_offload"
            )
        if any(hasattr(sub, mark) for mark in _CASTS_PER_CALL):
            _refuse_weights_elsewhere(f"{label} of this {type(module).__name__}", sub, device)


_CASTS_PER_CALL = ("comfy_cast_weights", "parameters_manual_cast")
"""Attributes of layers that can cast their weights in every call: ComfyUI's and Forge's. Where they do, or have weight
functions, they fetch them from wherever they are, too."""


def _refuse_weights_elsewhere(label: str, layer: torch.nn.Module, device: torch.device | None) -> None:
    if getattr(layer, "_v", None) is not None:
        raise DeepCacheError(
            f"{label} has its weights in ComfyUI's dynamic VRAM, which brings them in within a call, where a graph of "
            "the whole cannot follow. Clone the model without it, clone(disable_dynamic=True), or start ComfyUI with "
            "--disable-dynamic-vram"
        )
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):
        if tensor is not None and device is not None and tensor.device != device:
            raise DeepCacheError(
                f"{label} has its weights on {tensor.device} and its input on {device}: the model is loaded in part, "
                "and its layers bring weights in within a call, where a graph of the whole cannot follow. Load it as a "
                "whole: with more free memory, a smaller model or batch, or --highvram"
            )


def _is_functional(graph: fx.Graph) -> bool:
    """True where every call is of an operator that writes into none of its arguments."""
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(getattr(graph.owning_module, str(node.target), None), fx.GraphModule):
            return False  # a region of its own, as for autocast: decomposing inlines it
    return all(
        node.target is operator.getitem
        or is_size(node)
        or (isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable)
        for node in graph.nodes
        if node.op == "call_function"
    )


def _refuse_sizes_by_value(graph: fx.Graph, model: str) -> None:
    """Raise a CaptureError where a tensor is as long as values say: nothing of it could be planned, kept or counted."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if depends_on_values(value):
            raise CaptureError(
                f"{model} computes with tensors whose sizes depend on the values of its inputs ({node.name}, of shape "
                f"{tuple(map(str, value.shape))}): one graph cannot stand for its calls"
            )


def _shapes(call: Call) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}".replace("torch.", "") for t in call.tensors)


def _flatten_border(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Plain positional placeholders for the tensors alone, a flat tuple as output, short parameter names."""
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            assert not node.users, f"non-tensor input {node.name} is used"
            graph.erase_node(node)
    placeholders = graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(names), f"{len(names)} tensors went in, {len(placeholders)} placeholders came out"
    for node, name in zip(placeholders, names, strict=True):
        node.target = name
    if any(map(is_size, graph.nodes)):
        read_from_inputs(graph)
        eliminate_dead_code(graph)  # and with it what asserts sizes, which the caller guards
    flat = fx.GraphModule(module, graph)  # shares every parameter
    flat.eval()
    return flat
