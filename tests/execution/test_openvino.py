"""OpenVINO's programs: what goes in and comes out, in which precision, over which weights, and what is refused.

On whole pipelines, against the published implementation: tests/whole/test_oracle.py.
"""

from __future__ import annotations

import builtins
import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import deepcache_fx
from deepcache_fx.errors import CompileError, OptionError
from deepcache_fx.execution import openvino
from deepcache_fx.execution.compile import compile_variants, pick_backend
from deepcache_fx.options import Options
from passes import FuseGroupNorm
from tests import models, small
from tests.compvis import CompVisUNet, denoise
from tests.execution.test_compile import ThreeLayers
from tests.families import family, thorough

pytest.importorskip("openvino", reason="openvino is not installed")

aten = torch.ops.aten
CPU = torch.device("cpu")
TIMESTEPS = torch.arange(950, 700, -50)

Build = Callable[..., tuple[Any, ...]]


def graph_of(build: Build, inputs: tuple[torch.Tensor, ...], root: nn.Module | None = None) -> fx.GraphModule:
    """A graph built by hand: `build(call, *placeholders)` gives its outputs."""
    graph = fx.Graph()
    places = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output(build(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), *places))
    module = fx.GraphModule(root or nn.Module(), graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*map(mode.from_tensor, inputs))
    return module


def compiled(build: Build, *inputs: torch.Tensor, precision: str | None = None, **options: Any) -> Any:
    return openvino.compile_graph(graph_of(build, inputs), CPU, precision, options)


def agrees(build: Build, *inputs: torch.Tensor) -> list[Any]:
    """What the program gives, after it has been held against the graph, and its inputs against what they were."""
    before = [tensor.clone() for tensor in inputs]
    expected = graph_of(build, inputs)(*inputs)
    program = compiled(build, *inputs)
    for _ in range(2):
        outputs = program(*inputs)
        for output, right in zip(outputs, expected, strict=True):
            if isinstance(right, torch.Tensor):
                torch.testing.assert_close(output, right)
            else:
                assert output == right
    assert all(map(torch.equal, inputs, before))
    return outputs  # type: ignore[no-any-return]


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
CHANNELS_LAST = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
BORDERS: dict[str, tuple[Build, tuple[torch.Tensor, ...]]] = {
    "no axes": (lambda call, x, t: (call(aten.mul.Tensor, x, t), call(aten.add.Tensor, t, 1)), (X, torch.tensor(3))),
    "integers and truth values": (
        lambda call, i, b: (call(aten.add.Tensor, i, 1), call(aten.logical_not.default, b)),
        (torch.arange(6), torch.tensor([True, False])),
    ),
    "half precision": (
        lambda call, a, b: (call(aten.add.Tensor, a, 1), call(aten.mul.Tensor, b, 2)),
        (X.half(), X.bfloat16()),
    ),
    "transposed": (
        lambda call, x: (call(aten.add.Tensor, x, 1), call(aten.permute.default, x, [0, 2, 1])),
        (X.transpose(0, 2),),
    ),
    "channels-last": (
        lambda call, x: (call(aten.reshape.default, call(aten.permute.default, x, [0, 2, 3, 1]), [2, 20, 3]),),
        (CHANNELS_LAST,),
    ),
    "expanded": (lambda call, t: (call(aten.mul.Tensor, t, 2),), (torch.tensor([7]).expand(3),)),
    "nothing in it": (
        lambda call, x, y: (call(aten.cat.default, [x, y], 0), call(aten.add.Tensor, y, 1)),
        (X, torch.zeros(0, 3, 4)),
    ),
    "given twice": (lambda call, x, y: (call(aten.sub.Tensor, x, y),), (X, X)),
    "not read": (lambda call, x, y: (call(aten.add.Tensor, x, 1),), (X, X)),
    "no tensors out": (lambda call, x: (5, call(aten.add.Tensor, x, 1), None, 2.5), (X,)),
    "views of one another out": (
        lambda call, x: (
            added := call(aten.add.Tensor, x, 1),
            call(aten.view.default, added, [6, 4]),
            call(aten.slice.Tensor, added, 0, 0, 1),
            call(aten.view.default, x, [24]),
        ),
        (X,),
    ),
    "parts": (lambda call, x: (call(operator.getitem, call(aten.chunk.default, x, 2, 2), 1),), (X,)),
}


@pytest.mark.parametrize(("build", "inputs"), BORDERS.values(), ids=BORDERS)
def test_what_goes_in_and_comes_out_is_as_of_the_graph(build: Build, inputs: tuple[torch.Tensor, ...]) -> None:
    agrees(build, *inputs)


def test_inputs_and_weights_among_the_outputs_are_those_very_objects() -> None:
    root = nn.Module()
    root.weight = nn.Parameter(torch.randn(4))
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    product = graph.call_function(aten.mul.Tensor, (x, weight))
    graph.output((x, product, product, weight, graph.call_function(aten.to.dtype, (product, torch.float32))))
    module = fx.GraphModule(root, graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(mode.from_tensor(X))
    program = openvino.compile_graph(module, CPU, None, {})
    assert program is not None
    outputs = program(X)
    assert outputs[0] is X
    assert outputs[3] is root.weight
    assert outputs[1] is outputs[2]
    assert torch.equal(outputs[1], X * root.weight)


def test_a_graph_that_computes_nothing_runs_as_it_is() -> None:
    for build in (lambda call, x: (x,), lambda call, x: (call(aten.to.dtype, x, torch.float32), None)):
        assert compiled(build, X) is None
        module = graph_of(build, (X,))
        found = compile_variants({"full": module}, 1, Options.make(backend="openvino"), CPU)
        assert found.programs["full"](X)[0] is X


def test_what_a_call_returned_outlives_later_calls() -> None:
    program = compiled(lambda call, x: (call(aten.add.Tensor, x, 1),), X)
    first, second = program(X)[0], program(2 * X)[0]
    assert torch.equal(first, X + 1)
    assert torch.equal(second, 2 * X + 1)


def test_threads_may_share_a_program() -> None:
    program = compiled(lambda call, x: (call(aten.mul.Tensor, x, 3), call(aten.add.Tensor, x, 1)), X)
    wrong: list[float] = []

    def work(value: float) -> None:
        for _ in range(200):
            product, total = program(torch.full_like(X, value))
            if not (torch.all(product == 3 * value) and torch.all(total == value + 1)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# What is refused.


def test_what_it_would_compute_otherwise_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match=r"cannot compute in torch.float64, as to_dtype \(aten.to.dtype\) does"):
        compiled(lambda call, x: (call(aten.to.dtype, x, torch.float64),), X)
    with pytest.raises(CompileError, match=r"rand_like_default \(aten.rand_like.default\) draws random numbers"):
        compiled(lambda call, x: (call(aten.rand_like.default, x),), X)
    with pytest.raises(CompileError, match=r"it makes .*int32.* \(3,\) of torch.int64 \(3,\)"):
        compiled(lambda call, x: (call(aten.cumsum.default, x, 0),), torch.arange(3, dtype=torch.int32))


def test_an_operator_it_has_no_rule_for_is_named() -> None:
    unet = CompVisUNet()
    with pytest.raises(CompileError, match=r"no rule for .*deepcache_fx\.group_norm\.default"):
        deepcache_fx.optimize(unet, passes=[FuseGroupNorm()], backend="openvino", example_inputs=INPUTS)
    assert type(unet) is CompVisUNet


def test_a_program_that_gives_something_else_is_refused_at_its_first_call() -> None:
    """OpenVINO 2026.4 takes the variance with the wrong correction where that is left at its default."""
    build = lambda call, x: (call(aten.var.correction, x, [1]),)  # noqa: E731
    step = graph_of(build, (X,))
    program = compile_variants({"full": step}, 1, Options.make(backend="openvino"), CPU).programs["full"]
    for _ in range(2):
        with pytest.raises(CompileError, match=r"in fp32 is .* off what its graph gives: take another backend"):
            program(X)


def test_other_devices_and_a_missing_package_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    step = graph_of(lambda call, x: (call(aten.add.Tensor, x, 1),), (X,))
    with pytest.raises(CompileError, match="on the CPU alone, and this model is on cuda:0"):
        openvino.compile_graph(step, torch.device("cuda", 0), None, {})
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CompileError, match=r"No module named 'openvino'.*pip install 'deepcache-fx\[cpu\]'"):
        deepcache_fx.optimize(CompVisUNet(), backend="openvino", example_inputs=INPUTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, 'precision must be "fp32", "bf16" or None, got \'fp16\''),
        ({"precision": "bf16", "backend": "eager"}, "is for backend='openvino', not for 'eager'"),
        ({"precision": "bf16", "backend": "inductor"}, "is for backend='openvino', not for 'inductor'"),
        ({"mode": "max-autotune", "backend": "openvino"}, "leave 'max-autotune' out"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        deepcache_fx.optimize(CompVisUNet(), **options)


def test_properties_reach_openvino_and_the_precision_is_none_of_them() -> None:
    def build(call: Any, x: fx.Node) -> tuple[Any, ...]:
        return (call(aten.add.Tensor, x, 1),)

    assert compiled(build, X, NUM_STREAMS=1) is not None
    with pytest.raises(CompileError, match=r"OpenVINO cannot take this graph: .*SUCH_THING"):
        compiled(build, X, NO_SUCH_THING=1)
    with pytest.raises(CompileError, match="give precision='fp32' or 'bf16' instead"):
        compiled(build, X, INFERENCE_PRECISION_HINT="bf16")


# Precision.

INPUTS = {"x": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([900, 900]), "context": torch.randn(2, 3, 6)}
needs_bf16 = pytest.mark.skipif(not openvino.has_bf16(), reason="this processor has no bfloat16 arithmetic")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def ran(unet: nn.Module, **options: Any) -> torch.Tensor:
    return denoise(deepcache_fx.optimize(unet, forecast=0, **options), TIMESTEPS)


@needs_bf16
def test_float32_is_computed_in_float32_though_the_processor_has_bf16_and_bf16_is_told() -> None:
    expected = ran(CompVisUNet(), backend="eager")
    exact, rounded = CompVisUNet(), CompVisUNet()
    assert relative(ran(exact, backend="openvino"), expected) < 1e-5
    report = deepcache_fx.report(exact)
    assert (report.backend, report.precision) == ("openvino", "fp32")
    assert report.precision_error is not None
    assert report.precision_error < 1e-5
    assert 1e-4 < relative(ran(rounded, backend="openvino", precision="bf16"), expected) < 0.05
    report = deepcache_fx.report(rounded)
    assert (report.backend, report.precision) == ("openvino", "bf16")
    assert report.precision_error is not None
    assert 1e-4 < report.precision_error < 0.1
    assert f"openvino in bf16 (error of the first full step: {report.precision_error:.1e})" in str(report)
    assert report.to_dict()["precision_error"] == report.precision_error
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters())


@thorough
@needs_bf16
def test_a_bfloat16_model_is_computed_in_bfloat16_about_as_exactly_as_by_pytorch() -> None:
    expected = models.generate(small.pipeline(), 4)
    latents = {}
    for backend in ("eager", "openvino"):
        pipe = deepcache_fx.optimize(small.pipeline().to(torch.bfloat16), interval=2, backend=backend)
        latents[backend] = models.generate(pipe, 4)
        assert latents[backend].dtype == torch.bfloat16
    assert deepcache_fx.report(pipe).precision == "bf16"
    assert relative(latents["openvino"], expected) < 1.5 * relative(latents["eager"], expected)
    with pytest.raises(CompileError, match="with bfloat16 weights in bfloat16 alone, and these are bfloat16"):
        models.generate(deepcache_fx.optimize(pipe, backend="openvino", precision="fp32"), 1)


def test_a_float16_model_is_computed_in_float32() -> None:
    unet = ThreeLayers().half()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6)
    arguments = {"x": x.half(), "timesteps": torch.tensor([0.5, 0.5]).half(), "context": context.half()}
    eager = unet(**arguments)
    exact = copy.deepcopy(unet).float()(**{name: tensor.float() for name, tensor in arguments.items()})
    result = deepcache_fx.optimize(unet, backend="openvino")(**arguments)
    assert deepcache_fx.report(unet).precision == "fp32"
    assert result.dtype == torch.float16
    assert relative(result, exact) < relative(eager, exact)


@thorough
@needs_bf16
def test_in_bf16_neighbouring_timesteps_stay_apart() -> None:
    """902 and 903 are one number in bfloat16."""
    unet = deepcache_fx.optimize(CompVisUNet(), interval=1, backend="openvino", precision="bf16")
    torch.manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6)
    with torch.no_grad():
        at = {t: unet(x, torch.tensor([t, t]), context) for t in (903, 902)}
        right = {t: CompVisUNet()(x, torch.tensor([t, t]), context) for t in (903, 902)}
    assert relative(at[902] - at[903], right[902] - right[903]) < 0.5


def test_bf16_where_the_processor_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> Any:
            return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else "some processor"

    monkeypatch.setattr(openvino, "_core", Core)
    with pytest.raises(CompileError, match=r"this processor \(some processor\) has no bfloat16 arithmetic"):
        deepcache_fx.optimize(CompVisUNet(), precision="bf16", example_inputs=INPUTS)


# Weights: programs hold copies.


def other(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.detach() * 1.3 + 0.05).contiguous()


@torch.no_grad()
def in_place(unet: nn.Module) -> None:
    """As a LoRA that is fused."""
    for parameter in unet.parameters():
        parameter.mul_(1.3)


def loaded(unet: nn.Module) -> None:
    unet.load_state_dict({name: other(value) for name, value in unet.state_dict().items()})


def assigned(unet: nn.Module) -> None:
    unet.load_state_dict({name: other(value) for name, value in unet.state_dict().items()}, assign=True)


def other_data(unet: nn.Module) -> None:
    for parameter in unet.parameters():
        parameter.data = other(parameter)


def data_in_place(unet: nn.Module) -> None:
    """What PyTorch does not count."""
    for parameter in unet.parameters():
        parameter.data.copy_(other(parameter))


def new_parameters(unet: nn.Module) -> None:
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(other(parameter), requires_grad=False))


def optimizer_step(unet: nn.Module) -> None:
    parameters = [parameter.requires_grad_() for parameter in unet.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)


def moved(unet: nn.Module) -> None:
    """There and back, which rounds them."""
    unet.to(torch.bfloat16).to(torch.float32)


CHANGES = [in_place, loaded, assigned, other_data, data_in_place, new_parameters, optimizer_step, moved]


@pytest.mark.parametrize("change", family(CHANGES, data_in_place), ids=lambda change: change.__name__)
def test_other_weights_are_noticed_by_the_next_run(change: Callable[[nn.Module], None]) -> None:
    unet = ThreeLayers()
    before = ran(unet, backend="openvino")
    change(unet)
    expected = ran(copy.deepcopy(deepcache_fx.restore(copy.deepcopy(unet))), backend="eager")
    assert relative(before, expected) > 1e-4
    assert relative(denoise(unet, TIMESTEPS), expected) < 1e-5
    assert deepcache_fx.report(unet).captures == 1
    assert relative(denoise(unet, TIMESTEPS), expected) < 1e-5


# What "auto" does.


def test_auto_is_openvino_on_a_cpu_where_it_is_installed(auto_finds_openvino: None) -> None:
    assert pick_backend(Options.make(), CPU) == "openvino"
    assert pick_backend(Options.make(), torch.device("cuda")) == "inductor"
    assert pick_backend(Options.make(), torch.device("meta")) == "eager"
    unet = ThreeLayers()
    expected = ran(ThreeLayers(), backend="eager")
    assert relative(ran(unet), expected) < 1e-5
    assert (deepcache_fx.report(unet).backend, deepcache_fx.report(unet).precision) == ("openvino", "fp32")
    assert deepcache_fx.report(unet).last_run == "FssFs"


@thorough
def test_auto_runs_eagerly_with_one_warning_what_openvino_cannot_take(auto_finds_openvino: None) -> None:
    unet = CompVisUNet()
    with pytest.warns(UserWarning, match=r"backend='auto' leaves OpenVINO out, .*no rule for deepcache_fx") as caught:
        result = ran(unet, passes=[FuseGroupNorm()])
    assert len(caught) == 1
    assert (deepcache_fx.report(unet).backend, deepcache_fx.report(unet).precision) == ("eager", None)
    assert relative(result, ran(CompVisUNet(), backend="eager")) < 1e-5


def test_auto_runs_eagerly_with_a_warning_what_openvino_gets_wrong(auto_finds_openvino: None) -> None:
    step = graph_of(lambda call, x: (call(aten.var.correction, x, [1]),), (X,))
    right = graph_of(lambda call, x: (call(aten.add.Tensor, x, 1),), (X,))
    found = compile_variants({"full": step, "shallow": right}, 1, Options.make(), CPU)
    with pytest.warns(UserWarning, match="off what its graph gives, so the graph runs as it is"):
        assert torch.equal(found.programs["full"](X)[0], X.var(1))
    assert torch.equal(found.programs["shallow"](X)[0], X + 1)
    assert (found.backend, found.precision, found.error) == ("openvino (full: eager)", "fp32", None)


def weighted(dtype: torch.dtype) -> fx.GraphModule:
    graph = fx.Graph()
    x, root = graph.placeholder("x"), nn.Linear(3, 3, dtype=dtype)
    graph.output((graph.call_function(aten.mul.Tensor, (x, graph.get_attr("bias"))),))
    step = fx.GraphModule(root, graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(step, mode).propagate_dont_convert_inputs(mode.from_tensor(torch.zeros(3, dtype=dtype)))
    return step


@needs_bf16
def test_auto_keeps_bfloat16_and_leaves_float16_to_pytorch(auto_finds_openvino: None) -> None:
    for dtype, backend in ((torch.float32, "openvino"), (torch.bfloat16, "openvino"), (torch.float16, "eager")):
        found = compile_variants({"full": weighted(dtype)}, 1, Options.make(), CPU)
        assert (found.backend, found.precision == "bf16") == (backend, dtype == torch.bfloat16)
    mixed = {"full": weighted(torch.float32), "shallow": weighted(torch.bfloat16)}
    assert compile_variants(mixed, 1, Options.make(), CPU).backend == "eager"
