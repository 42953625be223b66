"""Other weights of the same kinds: what was captured goes on with them, and never with the ones before."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx, nn

import deepcache_fx
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.execution.assemble import Entry
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.oracles import REPEATING, TO_THE_BIT, CatOracle, agree
from tests.pipelines import one_controlnet
from tests.whole.test_pipelines import expected as wanted

TIMESTEPS = torch.arange(950, 700, -50)
FULL = {0, 3}


class Scaled(CompVisUNet):
    """With buffers, of which a state dict holds one, and layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.full((1, 4, 1, 1), 1.5))
        self.register_buffer("shift", torch.full((1, 4, 1, 1), 0.5), persistent=False)
        self.first, self.second = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.second.weight = self.first.weight
        self.eval()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(super().forward(x, timesteps, context) * self.gain.to(x.dtype) + self.shift))


def oracle(unet: nn.Module, timesteps: torch.Tensor = TIMESTEPS, size: int = 8) -> torch.Tensor:
    """What the model gives that runs eagerly, with the deep operand of the last full step."""
    plain = CatOracle(copy.deepcopy(unet), 1)  # a copy is plain
    calls = iter(range(len(timesteps)))

    def step(*args: Any) -> torch.Tensor:
        found: torch.Tensor = plain(next(calls) in FULL, *args)
        return found

    return denoise(step, timesteps, size=size)  # type: ignore[arg-type]


def optimized(unet: nn.Module | None = None, **options: Any) -> Any:
    return deepcache_fx.optimize(unet or Scaled(), interval=3, branch=1, **{**TO_THE_BIT, **options})


def counts(unet: Any) -> tuple[int, int]:
    report = deepcache_fx.report(unet)
    return report.captures, report.rebound


def patch(unet: nn.Module, name: str, value: torch.Tensor) -> None:
    """As ComfyUI patches a weight (`comfy.utils.set_attr_param`)."""
    owner = unet.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))


def other(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.detach() * 1.3 + 0.05).contiguous()


def one_layer(unet: nn.Module) -> None:
    patch(unet, "out.2.weight", other(unet.get_parameter("out.2.weight")))


def all_layers(unet: nn.Module) -> None:
    tied = unet.get_parameter("first.weight")
    for name, parameter in list(unet.named_parameters()):
        if parameter is not tied:
            patch(unet, name, other(parameter))


def assigned(unet: nn.Module) -> None:
    """Of what shares a tensor in the state dict it makes two parameters: they are tied again, as loaders do."""
    unet.load_state_dict({name: other(value) for name, value in unet.state_dict().items()}, assign=True)
    unet.second.weight = unet.first.weight  # type: ignore[union-attr]


def in_inference_mode(unet: nn.Module) -> None:
    with torch.inference_mode():
        all_layers(unet)


def buffers(unet: nn.Module) -> None:
    for name, buffer in list(unet.named_buffers()):
        setattr(unet, name, other(buffer))


def shared(unet: nn.Module) -> None:
    unet.first.weight = unet.second.weight = nn.Parameter(other(unet.first.weight))  # type: ignore[union-attr,arg-type]


def trainable(unet: nn.Module) -> None:
    for module in unet.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and module not in (unet.first, unet.second):
                module._parameters[name] = nn.Parameter(other(parameter), requires_grad=True)


def exchanged(unet: nn.Module) -> None:
    """The same objects, in one another's places."""
    convs = [m for m in unet.modules() if isinstance(m, nn.Conv2d) and m.weight.shape == (8, 8, 3, 3)]
    first, second = convs[0], convs[-1]
    first.weight, second.weight = second.weight, first.weight


OTHERS = [one_layer, all_layers, assigned, in_inference_mode, buffers, shared, trainable, exchanged]


@pytest.fixture(params=family([False, True], True), ids=["called", "recorded"])
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options with which steps are called, or recorded."""
    if request.param:
        monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    return {"cuda_graphs": bool(request.param)}


@pytest.mark.parametrize("options", family([TO_THE_BIT, REPEATING], REPEATING), ids=["bit", "default"])
def test_other_weights_of_the_same_kinds_are_bound_and_not_captured_anew(
    recording: dict[str, Any], options: dict[str, Any]
) -> None:
    unet = optimized(**options, **recording)
    last = denoise(unet, TIMESTEPS)
    for number, change in enumerate(OTHERS, 1):
        change(unet)
        expected = oracle(unet)
        assert not torch.allclose(expected, last, rtol=1e-3), change.__name__
        for _ in range(2):
            assert agree(last := denoise(unet, TIMESTEPS), expected, options), change.__name__
            assert deepcache_fx.report(unet).last_run == "FssFs"
        assert counts(unet) == (1, number), change.__name__
    assert f"other weights {len(OTHERS)} times, without a capture" in str(deepcache_fx.report(unet))


def _untied(unet: Any) -> None:
    unet.second.weight = nn.Parameter(other(unet.first.weight))


def _tied(unet: Any) -> None:
    unet.input_blocks[1][0].in_layers[2].bias = unet.input_blocks[1][0].out_layers[2].bias


def _other_strides(unet: Any) -> None:
    weight = unet.out[2].weight
    unet.out[2].weight = nn.Parameter(other(weight).contiguous(memory_format=torch.channels_last))


def _other_type(unet: Any) -> None:
    class Own(nn.Parameter):
        pass

    unet.out[2].weight = Own(other(unet.out[2].weight))


def _other_dtype(unet: Any) -> None:
    unet.gain = unet.gain.double()


@pytest.mark.parametrize("change", family([_untied, _tied, _other_strides, _other_type, _other_dtype], _tied))
def test_weights_of_another_kind_are_captured_anew(change: Callable[[Any], None]) -> None:
    unet = optimized()
    denoise(unet, TIMESTEPS)
    change(unet)
    assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))
    assert counts(unet) == (2, 0)


@thorough
def test_tied_weights_that_come_apart_and_together_again_are_right_every_time() -> None:
    unet = optimized()
    tied, own = unet.first.weight, nn.Parameter(other(unet.first.weight))
    for weight in (tied, own, tied, own, tied):
        unet.second.weight = weight
        assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))
    assert deepcache_fx.report(unet).captures == 2 + 1  # `own` was gone: its graphs were let go


@thorough
def test_back_to_a_known_state_costs_nothing(recording: dict[str, Any]) -> None:
    unet = optimized(**REPEATING, **recording)
    states = [dict(unet.named_parameters())]
    all_layers(unet)
    states.append(dict(unet.named_parameters()))
    expected = [None, oracle(unet)]
    for number in range(6):
        for name, parameter in states[number % 2].items():
            owner = unet.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], parameter)
        unet.second.weight = unet.first.weight
        if expected[number % 2] is None:
            expected[number % 2] = oracle(unet)
        assert agree(denoise(unet, TIMESTEPS), expected[number % 2], REPEATING)
    assert counts(unet) == (1, 5)


def test_in_place_changes_are_seen_before_and_after(recording: dict[str, Any]) -> None:
    unet = optimized(**REPEATING, **recording)
    for change in (None, all_layers, None, assigned, None):
        if change is not None:
            change(unet)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(0.9) if not parameter.is_inference() else None
                parameter.data = parameter.data * 1.05
            unet.gain.add_(0.1)
        assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
    assert counts(unet) == (1, 2)


def test_all_signatures_follow_and_nothing_of_the_weights_before_is_held(recording: dict[str, Any]) -> None:
    unet = optimized(**REPEATING, **recording)
    for size in (8, 12):
        denoise(unet, TIMESTEPS, size=size)
    old = [weakref.ref(p) for p in unet.parameters()]
    assigned(unet)
    expected = {size: oracle(unet, size=size) for size in (8, 12)}
    assert agree(denoise(unet, TIMESTEPS), expected[8], REPEATING)
    gc.collect()
    assert [reference for reference in old if reference() is not None] == []
    for size in (12, 8, 12):
        assert agree(denoise(unet, TIMESTEPS, size=size), expected[size], REPEATING)
    assert counts(unet) == (2, 1)


@thorough
def test_structure_and_weights_that_change_together_are_right() -> None:
    unet = optimized()
    denoise(unet, TIMESTEPS)
    all_layers(unet)
    unet.extra = 1.0
    assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))
    del unet.extra
    assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))  # over weights that were gone: captured
    assert deepcache_fx.report(unet).captures == 3


@thorough
@torch.no_grad()
def test_within_a_run_weights_are_looked_at_after_reset_alone() -> None:
    unet = optimized()
    outputs = []
    for index, t in enumerate(TIMESTEPS):
        if index == 1:
            all_layers(unet)
        if index == 2:
            deepcache_fx.reset(unet)
        outputs.append(unet(torch.ones(2, 4, 8, 8), t.expand(2), torch.ones(2, 3, 6)))
        if index == 1:
            assert counts(unet) == (1, 0)
    assert counts(unet) == (1, 1)
    assert deepcache_fx.report(unet).last_run == "Fss"
    plain = copy.deepcopy(unet)
    assert torch.equal(outputs[2], plain(torch.ones(2, 4, 8, 8), TIMESTEPS[2].expand(2), torch.ones(2, 3, 6)))


@torch.no_grad()
def test_a_deep_feature_of_the_weights_before_is_not_read() -> None:
    """A setting that changes within a run, and back, has the weights looked at, too."""
    unet = optimized()
    arguments = torch.ones(2, 4, 8, 8), torch.ones(2, 3, 6)
    unet(arguments[0], TIMESTEPS[0].expand(2), arguments[1])
    all_layers(unet)
    unet.mode = object()  # looked at once the step is at work
    unet.mode = None
    result = unet(arguments[0], TIMESTEPS[1].expand(2), arguments[1])
    assert deepcache_fx.report(unet).last_run == "FF"
    assert torch.equal(result, copy.deepcopy(unet)(arguments[0], TIMESTEPS[1].expand(2), arguments[1]))


# What is compiled.


@contextmanager
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Counting:
    """A backend that counts its compilations; one that `copies` holds on to the values of the weights it sees."""

    def __init__(self, copies: bool) -> None:
        self.copies, self.count = copies, 0

    def __call__(self, graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.count += 1
        values = {i: t.detach().clone() for i, t in enumerate(inputs) if self.copies and isinstance(t, nn.Parameter)}
        return lambda *args: graph.forward(*(values.get(i, arg) for i, arg in enumerate(args)))


@pytest.mark.parametrize("change", family([all_layers, in_inference_mode, assigned], assigned))
def test_aot_eager_reads_other_weights_without_a_compilation(
    change: Callable[[nn.Module], None], recording: dict[str, Any]
) -> None:
    with cold():
        unet = optimized(backend="aot_eager", disable=(), **recording)
        denoise(unet, TIMESTEPS)
        compiled = compilations()
        assert compiled > 0
        change(unet)
        assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
        assert compilations() == compiled
    assert counts(unet) == (1, 1)


@thorough
@pytest.mark.parametrize("copies", [True, False])
def test_a_backend_that_nobody_knows_compiles_anew_and_nothing_is_captured(
    copies: bool, recording: dict[str, Any]
) -> None:
    with cold():
        backend = Counting(copies)
        unet = optimized(backend=backend, disable=(), **recording)
        denoise(unet, TIMESTEPS)
        denoise(unet, TIMESTEPS)
        compiled = backend.count
        for number, change in enumerate([one_layer, assigned], 1):
            change(unet)
            for _ in range(2):
                assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
            assert backend.count == (number + 1) * compiled
    assert counts(unet) == (1, 2)


@thorough
def test_a_backend_that_nobody_knows_compiles_anew_where_weights_have_been_written_into() -> None:
    with cold():
        backend = Counting(copies=True)
        unet = optimized(backend=backend, disable=())
        denoise(unet, TIMESTEPS)
        with torch.no_grad():
            unet.out[2].weight.mul_(1.5)
        assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
        count = backend.count
        for parameter in unet.parameters():  # offloading, there and back
            parameter.data = parameter.data.clone()
        assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
        assert backend.count == count
    assert counts(unet) == (1, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("frozen", [False, True])
def test_inductor_compiles_anew_where_it_freezes_alone(frozen: bool) -> None:
    import torch._inductor.config as inductor

    with cold(), inductor.patch(freezing=frozen):
        unet = optimized(backend="inductor", disable=())
        denoise(unet, TIMESTEPS)
        compiled = compilations()
        assert compiled > 0
        all_layers(unet)
        for _ in range(2):
            assert (denoise(unet, TIMESTEPS) - oracle(unet)).norm() < 1e-4 * oracle(unet).norm()
        assert compilations() == (2 if frozen else 1) * compiled
        unet.out[2].weight.data = unet.out[2].weight.data * 1.5
        assert (denoise(unet, TIMESTEPS) - oracle(unet)).norm() < 1e-4 * oracle(unet).norm()
        assert compilations() == (3 if frozen else 1) * compiled
    assert counts(unet) == (1, 1)


# Passes of the user's.


def fold_the_last_bias(graph: fx.GraphModule) -> fx.GraphModule:
    """Takes a value from a weight: the bias of the last convolution becomes a constant of the graph."""
    node = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)[-1]
    bias = next(item for item in graph.graph.find_nodes(op="get_attr") if str(item.target).endswith("out.2.bias"))
    values = graph.get_parameter(str(bias.target)).tolist()
    user = next(iter(bias.users))
    assert user.graph is node.graph
    with graph.graph.inserting_before(user):
        constant = graph.graph.call_function(torch.ops.aten.full.default, ([4], values[0]))
    constant.meta = dict(bias.meta)
    user.replace_input_with(bias, constant)
    return graph


@thorough
def test_what_a_pass_of_the_users_took_from_weights_is_taken_anew(recording: dict[str, Any]) -> None:
    unet = optimized(Scaled(), passes=[fold_the_last_bias], **recording)
    with torch.no_grad():
        unet.out[2].bias.fill_(0.3)
    assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
    for value in (0.7, -0.2, 0.3):
        all_layers(unet)
        patch(unet, "out.2.bias", torch.full((4,), value))
        for _ in range(2):
            assert agree(denoise(unet, TIMESTEPS), oracle(unet), REPEATING)
    assert counts(unet) == (1, 3)


# A ControlNet.


def put(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    for name, parameter in weights.items():
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)


@pytest.mark.parametrize("options", family([TO_THE_BIT, REPEATING], REPEATING), ids=["bit", "default"])
def test_a_controlnet_goes_on_with_other_weights(recording: dict[str, Any], options: dict[str, Any]) -> None:
    case = one_controlnet()
    run, network = case.runs[0], case.pipe.controlnet
    states = [dict(network.named_parameters())]
    states.append({name: nn.Parameter(other(value)) for name, value in states[0].items()})
    expected = []
    for state in states:
        put(network, state)
        expected.append(wanted(case, run))
    deepcache_fx.optimize(case.pipe, 3, **options, **recording)
    for number in (0, 1, 0, 0, 1):
        put(network, states[number])
        assert agree(case(run), expected[number], options)
    [controlnet_runtime] = deepcache_fx.report(case.pipe).companions
    assert (controlnet_runtime.captures, controlnet_runtime.rebound, controlnet_runtime.original_calls) == (1, 3, 0)
    assert controlnet_runtime.shallow_calls > 0
    assert counts(case.pipe) == (1, 0)


# Failures and threads.


@thorough
def test_where_binding_fails_the_model_is_captured_anew_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = optimized()
    denoise(unet, TIMESTEPS)

    def fails(*args: Any) -> Entry:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Entry, "renewed", fails)
    all_layers(unet)
    with pytest.warns(UserWarning, match="Scaled is captured anew for other weights: RuntimeError: out of memory"):
        result = denoise(unet, TIMESTEPS)
    assert torch.equal(result, oracle(unet))
    assert counts(unet) == (2, 0)


@thorough
def test_an_interrupt_while_binding_leaves_nothing_half_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = optimized()
    denoise(unet, TIMESTEPS)
    all_layers(unet)

    def interrupted(*args: Any) -> Entry:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Entry, "renewed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            denoise(unet, TIMESTEPS)
    assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))


@thorough
def test_threads_that_begin_at_once_with_other_weights_get_what_they_get_alone(recording: dict[str, Any]) -> None:
    unet, num_threads = optimized(**REPEATING, **recording), torch.get_num_threads()
    for size in (8, 12):
        denoise(unet, TIMESTEPS, size=size)
    states = [{name: value.clone() for name, value in unet.state_dict().items()} for _ in range(2)]
    states[1] = {name: other(value) for name, value in states[1].items()}
    expected: list[dict[int, torch.Tensor]] = []
    for state in states:
        unet.load_state_dict(state)
        expected.append({size: oracle(unet, size=size) for size in (8, 12)})
    rounds = iter(range(100))
    current = 0

    def switch() -> None:
        nonlocal current
        current = next(rounds) % 2
        unet.load_state_dict({name: value.clone() for name, value in states[current].items()}, assign=True)
        unet.second.weight = unet.first.weight

    start, end = threading.Barrier(4, action=switch), threading.Barrier(4)
    wrong: list[float] = []
    finished: list[int] = []

    def work(size: int) -> None:
        torch.set_num_threads(num_threads)
        for _ in range(4):
            start.wait()
            result = denoise(unet, TIMESTEPS, size=size)
            if not agree(result, expected[current][size], REPEATING):
                wrong.append(float((result - expected[current][size]).norm()))
            end.wait()
        finished.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (8, 12, 8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, len(finished)) == ([], 4)
    assert deepcache_fx.report(unet).captures == 2


def test_a_plain_tensor_in_the_place_of_a_parameter_is_captured_and_stays_what_it_is() -> None:
    """`swap_tensors` leaves one, as when peft grows the rank of an adapter that is swapped while hot."""
    unet = Scaled()
    weight = unet.out[2].weight
    torch.utils.swap_tensors(weight, other(weight).clone())
    assert type(weight) is torch.Tensor
    optimized(unet)
    assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))
    assert unet.out[2].weight is weight
    weight.mul_(1.5)
    assert torch.equal(denoise(unet, TIMESTEPS), oracle(unet))
    assert counts(unet) == (1, 0)


@thorough
def test_a_model_whose_weights_are_bound_again_is_let_go() -> None:
    unet = optimized(passes=[fold_the_last_bias])
    for _ in range(2):
        denoise(unet, TIMESTEPS[:2])
        all_layers(unet)
    reference = weakref.ref(unet)
    del unet
    gc.collect()
    assert reference() is None
