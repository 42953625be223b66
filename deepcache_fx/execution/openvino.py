"""Variants as OpenVINO programs, on a CPU: converted directly, without Dynamo.

    program(x, t, ...) -> outputs            tensors in and out are PyTorch's memory, which OpenVINO reads and writes

OpenVINO packs weights, and folds what follows from them, when it compiles; others it reads where they lie. A change of
a weight needs another program: the runtime looks for changes at the start of every run. Those in place through
`parameter.data` nobody counts; they are seen by some of the values of each weight (see `graph.weights.stamps`).

OpenVINO computes int64 in int32. float64 and random operators, which it would compute in float32 and draw from a
generator of its own, are refused.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from deepcache_fx.errors import CompileError
from deepcache_fx.execution.core_operators import Decompositions, decompositions, in_core_operators
from deepcache_fx.graph.macs import total_macs
from passes.rates import extract
from passes.shared.match import ancestors, is_op
from passes.shared.operators import is_random

aten = torch.ops.aten

HINT = "INFERENCE_PRECISION_HINT"
_HINTS = {"fp32": "f32", "bf16": "bf16"}


def is_available() -> bool:
    """True where OpenVINO is installed, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def has_bf16() -> bool:
    """True where the processor computes in bfloat16."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def own_types(step: fx.GraphModule) -> set[torch.dtype]:
    """The floating types of the parameters that a graph holds."""
    return {tensor.dtype for tensor in step.parameters() if tensor.is_floating_point()}


def compile_graph(
    step: fx.GraphModule, device: torch.device, precision: str | None, properties: Mapping[str, Any]
) -> OpenVINOProgram | None:
    """The program of a graph of flat tensors in and a flat tuple out; None where it computes nothing.

    Args:
        step: The graph. Its weights are copied, once: packed for the processor.
        precision: "fp32", "bf16", or None: bf16 for a graph whose weights are all bfloat16, else fp32, also where they
            are float16.
        properties: OpenVINO's, for `compile_model`, in the place of those chosen here.

    Raises:
        CompileError: OpenVINO is not installed, is not for this device, cannot compute in this precision, or cannot
            convert the graph (names the operators).
    """
    if device.type != "cpu":
        raise CompileError(f"OpenVINO is used on the CPU alone, and this model is on {device}: take another backend")
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise CompileError(f"OpenVINO cannot be imported ({error}): pip install 'deepcache-fx[cpu]'") from error
    if HINT in properties:
        raise CompileError(f"options set {HINT}: give precision='fp32' or 'bf16' instead")
    kind = _pick_precision(precision, own_types(step))
    _refuse_what_it_changes(step.graph)
    head = _Head.of(step) if kind == "bf16" else None
    try:
        step = step if head is None else head.rest
        border = _Border(in_core_operators(step, *_operators()))
        if not border.results:
            return None
        chosen = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else activations are quantised where weights are
        }
        compiled = _core().compile_model(border.model(), "CPU", {**chosen, **properties, HINT: _HINTS[kind]})
        return OpenVINOProgram(compiled, border, kind, head)
    except Exception as error:
        raise CompileError(f"OpenVINO cannot take this graph: {_reason(error)}") from error


def _pick_precision(wanted: str | None, types: set[torch.dtype]) -> str:
    """What to compute in; float16, which few processors compute in, counts as float32."""
    is_half = torch.bfloat16 in types
    if is_half and (wanted == "fp32" or (wanted is None and len(types) > 1)):
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise CompileError(
            f"OpenVINO computes with bfloat16 weights in bfloat16 alone, and these are {names}: cast the model to "
            "float32, or give precision='bf16'"
        )
    if not is_half and wanted != "bf16":
        return "fp32"
    if not has_bf16():
        name = _core().get_property("CPU", "FULL_DEVICE_NAME")
        raise CompileError(
            f"this processor ({name}) has no bfloat16 arithmetic: take a float32 model, without precision='bf16'"
        )
    return "bf16"


class NodeTime(NamedTuple):
    """How long one node of a program took in the last call."""

    kind: str
    """OpenVINO's names of the node and of what runs it: "Convolution brgconv_avx2_f32"."""
    of: str
    """The operators it was made of, as far as OpenVINO tells."""
    seconds: float


class OpenVINOProgram:
    """One compiled graph, called by one thread at a time: each call has all the threads that there are.

    Outputs are new tensors, contiguous; what the last call read and wrote is not kept.
    """

    def __init__(self, compiled: Any, border: _Border, precision: str, head: _Head | None) -> None:
        self.precision = precision
        self._head = head
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        self._inputs = border.inputs
        self._results = [(tuple(val.shape), val.dtype) for val in (node.meta["val"] for node in border.results)]
        self._leaves = border.leaves
        for port, (shape, dtype) in zip(compiled.outputs, self._results, strict=True):
            if port.element_type != shared(torch.empty(0, dtype=dtype)).element_type or tuple(port.shape) != shape:
                raise ValueError(f"it makes {port.element_type} {tuple(port.shape)} of {dtype} {shape}")

    def __call__(self, *tensors: torch.Tensor) -> Sequence[Any]:
        if self._head is not None:
            tensors = (*tensors, *self._head(tensors))
        results = [torch.empty(shape, dtype=dtype) for shape, dtype in self._results]
        read = [shared(tensors[place]) for place in self._inputs]  # these names keep the memory: a request does not
        written = [shared(result) for result in results]
        request = self._request
        with self._lock:
            for index, memory in enumerate(read):
                request.set_input_tensor(index, memory)
            for index, memory in enumerate(written):
                request.set_output_tensor(index, memory)
            request.infer({}, share_outputs=True)
        found = {"input": tensors, "result": results}
        return [found[kind][value] if kind in found else value for kind, value in self._leaves]

    def node_times(self) -> list[NodeTime]:
        """Of the last call, for a program that was compiled with the property {"PERF_COUNT": True}."""
        operators = {
            node.get_friendly_name(): node.get_rt_info()["originalLayersNames"].astype(str)
            for node in self._compiled.get_runtime_model().get_ops()
        }
        return [
            NodeTime(
                f"{node.node_type} {node.exec_type}", operators.get(node.node_name, ""), node.real_time.total_seconds()
            )
            for node in self._request.get_profiling_info()
            if node.real_time
        ]


def shared(tensor: torch.Tensor) -> Any:
    """A tensor's memory as OpenVINO takes it; of a tensor that is not contiguous, that of a copy."""
    import openvino

    tensor = tensor.detach().contiguous()
    if tensor.dtype != torch.bfloat16:
        return openvino.Tensor(tensor.numpy(force=True), shared_memory=True)
    bits = tensor.view(torch.float16).numpy(force=True)  # NumPy has no bfloat16
    return openvino.Tensor(bits, openvino.Shape(tensor.shape), openvino.Type.bf16)


class _Head:
    """The sinusoidal embeddings of a graph, computed by PyTorch in their own types: `rest` takes them as inputs.

    In bfloat16, as OpenVINO would compute them, timestep 902 is 904, and so is 903.
    """

    def __init__(self, step: fx.GraphModule, sines: Sequence[fx.Node]) -> None:
        two = extract(step, sines)
        names = [node.target for node in step.graph.find_nodes(op="placeholder")]
        self._inputs = [names.index(node.target) for node in two.first.graph.find_nodes(op="placeholder")]
        self._program = two.first.forward
        self.rest = two.second

    @staticmethod
    def of(step: fx.GraphModule) -> _Head | None:
        """None where there are none that can be had before the layers."""
        sines = [node for node in step.graph.nodes if is_op(node, aten.sin.default, aten.cos.default)]
        sines = [node for node in sines if not total_macs(ancestors([node])).total]
        return _Head(step, sines) if sines else None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        values: Sequence[torch.Tensor] = self._program(*[tensors[place] for place in self._inputs])
        return values


class _Border:
    """What a graph takes and returns, and what of that OpenVINO has to know.

    `leaves` are its outputs: ("input", which), ("result", which), or a constant. The graph keeps the inputs that are
    read and the results that are computed, each once.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        graph = module.graph
        placeholders = graph.find_nodes(op="placeholder")
        results: dict[fx.Node, int] = {}
        self.leaves: list[tuple[str, Any]] = []
        output = graph.output_node()
        for leaf in output.args[0]:  # type: ignore[union-attr]
            if not isinstance(leaf, fx.Node):
                self.leaves.append(("constant", leaf))
            elif leaf.op == "placeholder":
                self.leaves.append(("input", placeholders.index(leaf)))
            elif leaf.op == "get_attr":
                self.leaves.append(("constant", operator.attrgetter(str(leaf.target))(module)))
            else:
                self.leaves.append(("result", results.setdefault(leaf, len(results))))
        self.results = list(results)
        output.args = (tuple(self.results),)
        self.inputs = [place for place, node in enumerate(placeholders) if node.users]
        for node in placeholders:
            if not node.users:
                graph.erase_node(node)
        module.recompile()

    def model(self) -> Any:
        """OpenVINO's."""
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        read = [node.meta["val"] for node in self._module.graph.find_nodes(op="placeholder")]
        decoder = TorchFXPythonDecoder(
            self._module, input_shapes=[val.shape for val in read], input_types=[val.dtype for val in read]
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


def _refuse_what_it_changes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "call_function" else None
        if isinstance(value, torch.Tensor) and (value.dtype == torch.float64 or value.is_complex()):
            raise CompileError(f"OpenVINO cannot compute in {value.dtype}, as {node.name} ({node.target}) does")
        if is_random(node):
            raise CompileError(f"{node.name} ({node.target}) draws random numbers, and OpenVINO would draw others")


def _reason(error: Exception) -> str:
    """Which operators there is no rule for, or else the message in one line."""
    text = str(error)
    unknown = re.search(r"No conversion rule found for operations: (.*)", text) or re.search(
        r"Conversion is failed for: (.*)", text
    )
    return f"it has no rule for {unknown[1]}" if unknown else f"{type(error).__name__}: {' '.join(text.split())[:300]}"


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


@functools.cache
def _operators() -> tuple[Decompositions, frozenset[Any]]:
    """How composite operators are taken apart, and those that OpenVINO takes whole."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    whole = frozenset(ops_to_not_decompose())
    return decompositions(whole), whole
