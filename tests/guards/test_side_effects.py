"""Models that do more than return a result run themselves: a graph would do it once, when it is captured."""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import deepcache_fx
from deepcache_fx.errors import Uncapturable
from deepcache_fx.guards.fingerprint import Fingerprint
from deepcache_fx.guards.side_effects import SideEffects
from deepcache_fx.guards.stray_tensors import remove_strays
from tests.compvis import CompVisUNet, denoise
from tests.families import family, thorough
from tests.keeping import PLACES
from tests.oracles import TO_THE_BIT

TIMESTEPS = torch.arange(950, -1, -50)[:4]


class Recorder:
    """As an attention processor that keeps its map for the pipeline."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.all: dict[str, list[Any]] = {"seen": []}
        self.calls = 0


class Recording(CompVisUNet):
    def __init__(self, record: Callable[[Recorder, torch.Tensor], object]) -> None:
        super().__init__()
        self.recorder, self.record = Recorder(), record

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.record(self.recorder, x)
        return super().forward(x, timesteps, context)


KEEPING: dict[str, Callable[[Recorder, torch.Tensor], object]] = {
    "a tensor": lambda recorder, x: setattr(recorder, "kept", x + 1),
    "a list of tensors": lambda recorder, x: recorder.all["seen"].append(x + 1),
    "a number": lambda recorder, x: setattr(recorder, "calls", recorder.calls + 1),
}


@pytest.mark.parametrize("what", family(KEEPING, "a number"))
def test_a_model_that_keeps_something_of_each_call_runs_uncached_and_says_why(what: str) -> None:
    model, plain = (Recording(KEEPING[what]) for _ in range(2))
    expected = denoise(plain, TIMESTEPS), denoise(plain, TIMESTEPS)
    deepcache_fx.optimize(model, **TO_THE_BIT)
    name = {"a tensor": "kept", "a list of tensors": "all", "a number": "calls"}[what]
    with pytest.warns(UserWarning, match=rf"runs uncached: Recorder keeps something of each call \({name}\)"):
        actual = [denoise(model, TIMESTEPS) for _ in range(2)]
    assert all(map(torch.equal, actual, expected))
    ours, theirs = model.recorder, plain.recorder
    assert ours.calls == theirs.calls
    assert all(map(torch.equal, [ours.kept, *ours.all["seen"]][1:], [theirs.kept, *theirs.all["seen"]][1:]))
    assert ours.kept is None or torch.equal(ours.kept, theirs.kept)
    assert len(ours.all["seen"]) == len(theirs.all["seen"])
    assert deepcache_fx.report(model).shallow_calls == 0


@thorough
def test_once_the_recorder_is_gone_steps_are_cached() -> None:
    model = deepcache_fx.optimize(Recording(KEEPING["a tensor"]), **TO_THE_BIT)
    with pytest.warns(UserWarning, match="runs uncached"):
        denoise(model, TIMESTEPS)
    model.record, model.recorder = (lambda *_: None), None
    assert torch.equal(
        denoise(model, TIMESTEPS), denoise(deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT), TIMESTEPS)
    )
    assert deepcache_fx.report(model).last_run == "FssF"


@thorough
def test_what_is_prepared_at_the_first_call_alone_is_no_side_effect() -> None:
    model = deepcache_fx.optimize(Recording(lambda recorder, x: setattr(recorder, "calls", 1)), **TO_THE_BIT)
    for _ in range(3):
        denoise(model, TIMESTEPS)
    report = deepcache_fx.report(model)
    assert (report.last_run, report.original_calls) == ("FssF", 0)


def test_a_hook_inside_of_the_model_is_called_at_every_step() -> None:
    model, seen = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT), []
    expected = denoise(model, TIMESTEPS)
    handle = model.out[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.warns(UserWarning, match=r"runs uncached: layer out\.2 has a forward hook"):
        denoise(model, TIMESTEPS)
    assert len(seen) == len(TIMESTEPS)
    handle.remove()
    assert torch.equal(denoise(model, TIMESTEPS), expected)


def test_hooks_of_pytorch_itself_are_captured() -> None:
    def normalised() -> CompVisUNet:
        model = CompVisUNet()
        torch.nn.utils.weight_norm(model.out[2])
        return model.requires_grad_(False)

    with pytest.warns(FutureWarning, match="weight_norm"):
        model, plain = normalised(), normalised()
    deepcache_fx.optimize(model, **TO_THE_BIT)
    assert torch.equal(denoise(model, TIMESTEPS[:1]), denoise(plain, TIMESTEPS[:1]))
    assert deepcache_fx.report(model).full_calls == 1


def test_asked_to_capture_ahead_it_is_an_error() -> None:
    model = Recording(KEEPING["a tensor"])
    inputs = {"x": torch.ones(2, 4, 8, 8), "timesteps": torch.tensor([1, 1]), "context": torch.ones(2, 3, 6)}
    with pytest.raises(deepcache_fx.DeepCacheError, match="Recorder keeps something of each call"):
        deepcache_fx.optimize(model, **TO_THE_BIT, example_inputs=inputs)
    assert type(model) is Recording
    assert model.recorder.kept is None


class Calling(CompVisUNet):
    """Its forward calls a function of the user's: how that came to be there differs."""

    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.function(x)
        return super().forward(x, timesteps, context)


def is_fake(value: Any) -> bool:
    return isinstance(value, (FakeTensor, torch.SymFloat, torch.SymInt))


TENSOR: Callable[[torch.Tensor, Any], Any] = lambda x, last: x + 1 if last is None else x + last  # noqa: E731
NUMBER: Callable[[torch.Tensor, Any], Any] = lambda x, last: (last or 0) + 1  # noqa: E731


def watched(model: torch.nn.Module, also: tuple[object, ...] = ()) -> Callable[[], Any]:
    """What watches a capture of a model, ready to be entered."""
    kept, effects = Fingerprint(), SideEffects()
    kept.read(model)
    return lambda: effects.watching(model, kept.objects(), also)


@pytest.fixture(scope="module")
def graph() -> torch.fx.GraphModule:
    """A graph that notes FakeTensors of its capture."""
    return torch.export.export(torch.nn.Linear(4, 4), (torch.ones(4),), strict=False).module(check_guards=False)


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_kept_anywhere_is_refused_and_what_was_there_is_put_back(place: str) -> None:
    kept = PLACES[place](TENSOR)
    watching = watched(Calling(kept.function))
    kept.function(torch.ones(1))
    before = kept.kept()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(1))
        with pytest.raises(Uncapturable, match=rf"keeps something of each call \({kept.name}\)"), watching():
            kept.function(fake)
    assert kept.kept() is before
    with pytest.raises(Uncapturable, match=rf"\({kept.name}\)"), watching():
        pytest.fail("known to write: captured in vain")


@pytest.mark.parametrize("place", PLACES)
def test_a_number_kept_anywhere_may_be_written_once(place: str) -> None:
    kept = PLACES[place](NUMBER)
    watching = watched(Calling(kept.function))
    with watching():
        kept.function(torch.ones(1))
    assert kept.kept() == 1
    with pytest.raises(Uncapturable, match=rf"\({kept.name}\)"), watching():
        kept.function(torch.ones(1))
    assert kept.kept() == 1


@pytest.mark.parametrize("place", PLACES)
def test_what_was_kept_is_put_back_when_a_capture_fails(place: str) -> None:
    kept = PLACES[place](TENSOR)
    watching = watched(Calling(kept.function))
    kept.function(torch.ones(1))
    before = kept.kept()

    def fail() -> None:
        with watching():
            kept.function(torch.zeros(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert kept.kept() is before


def test_functions_that_are_arguments_of_the_call_are_watched() -> None:
    kept = PLACES["a nonlocal variable"](TENSOR)
    patches = {"patches": {"attn1": [kept.function]}, "seen": []}
    watching = watched(CompVisUNet(), also=(patches,))
    with pytest.raises(Uncapturable, match=r"the closure of .*keep keeps something of each call \(last\)"), watching():
        kept.function(torch.ones(1))
    assert kept.kept() is None
    patches["patches"].clear()
    with pytest.raises(Uncapturable, match=r"the call keeps something"), watching():
        patches["seen"].append(torch.ones(1))
    assert patches["seen"] == []
    assert kept.kept() is None


def test_several_objects_of_a_class_may_each_prepare_something() -> None:
    model = CompVisUNet()
    model.one, model.two = Recorder(), Recorder()
    watching = watched(model)
    with watching():
        model.one.calls = model.two.calls = 1


def test_a_memoized_function_forgets_what_it_computed_in_a_capture() -> None:
    table = functools.lru_cache(lambda count: torch.arange(count))
    watching = watched(Calling(lambda x: table(3)))
    with watching(), FakeTensorMode():
        assert is_fake(table(3))
    assert not is_fake(table(3))


def test_a_function_that_replaces_one_of_a_library_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = PLACES["a nonlocal variable"](TENSOR)
    monkeypatch.setattr(torch.nn.functional, "silu", kept.function)
    watching = watched(CompVisUNet())
    with pytest.raises(Uncapturable), watching():
        torch.nn.functional.silu(torch.ones(1))
    assert kept.kept() is None


def test_a_hook_of_every_layer_is_refused() -> None:
    watching = watched(CompVisUNet())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(Uncapturable, match="every layer has a forward hook"), watching():
            pass
    finally:
        handle.remove()


class Hidden:
    """Where following code does not lead: a library's object, held by none of the model's."""

    def __init__(self) -> None:
        self.store: dict[str, Any] = {"list": [], "dict": {}, "set": set(), "deque": deque()}


STORING: dict[str, Callable[[Hidden, Any], object]] = {
    "a list": lambda hidden, x: hidden.store["list"].append(x),
    "a dictionary": lambda hidden, x: hidden.store["dict"].update(last=x),
    "a set": lambda hidden, x: hidden.store["set"].add(x),
    "a queue": lambda hidden, x: hidden.store["deque"].append(x),
    "an attribute": lambda hidden, x: setattr(hidden, "last", x),
}


def fake_of(graph: torch.fx.GraphModule) -> torch.Tensor:
    return next(node.meta["val"].detach() for node in graph.graph.nodes if is_fake(node.meta.get("val")))


@pytest.mark.parametrize("place", STORING)
def test_a_fake_tensor_is_found_wherever_it_stays(place: str, graph: torch.fx.GraphModule) -> None:
    """Taken away, and refused: at once the next time."""
    hidden = Hidden()
    watching = watched(CompVisUNet())

    def capture() -> None:
        with watching() as watch:
            STORING[place](hidden, fake_of(graph))
            watch.captured(graph)

    with pytest.raises(Uncapturable, match="a Hidden keeps something of each call, which"):
        capture()
    assert not any(hidden.store.values())
    assert getattr(hidden, "last", None) is None
    with pytest.raises(Uncapturable, match="a Hidden keeps"), watching():
        pytest.fail("known to write: captured in vain")


def test_a_fake_tensor_is_found_in_an_object_that_the_collector_was_told_to_forget(
    graph: torch.fx.GraphModule,
) -> None:
    hidden = Hidden()
    gc.freeze()
    hidden.store["dict"]["last"] = fake_of(graph)
    assert remove_strays(graph) == ["a Hidden"]
    assert not hidden.store["dict"]
    assert gc.get_freeze_count()


def test_what_the_graph_itself_notes_is_no_side_effect(graph: torch.fx.GraphModule) -> None:
    assert remove_strays(graph) == []


END_TO_END = ["a nonlocal variable", "a class attribute", "a global list", "a decorated function's variable"]


@pytest.mark.parametrize("value", family([TENSOR, NUMBER], TENSOR), ids=["tensors", "numbers"])
@pytest.mark.parametrize("place", END_TO_END)
def test_a_model_that_keeps_what_it_saw_gives_what_the_plain_one_gives(
    place: str, value: Callable[[torch.Tensor, Any], Any]
) -> None:
    kept = PLACES[place](value)
    expected = denoise(Calling(kept.function), TIMESTEPS)
    left = kept.kept()
    kept = PLACES[place](value)
    model = deepcache_fx.optimize(Calling(kept.function), **TO_THE_BIT)
    with pytest.warns(UserWarning, match=rf"runs uncached: .* keeps something of each call \({kept.name}\)"):
        actual = denoise(model, TIMESTEPS)
    assert torch.equal(actual, expected)
    assert type(actual) is torch.Tensor
    assert torch.equal(torch.as_tensor(kept.kept()), torch.as_tensor(left))
    assert deepcache_fx.report(model).shallow_calls == 0


def test_guidance_by_what_forward_left_gives_what_the_plain_model_gives() -> None:
    """As self-attention guidance: the map that a processor has kept in its closure becomes part of the sample."""

    def guided(optimized: bool) -> tuple[torch.Tensor, torch.nn.Module]:
        kept = PLACES["a nonlocal variable"](lambda x, last: x * 0.5)
        model: Any = Calling(kept.function)
        if optimized:
            deepcache_fx.optimize(model, **TO_THE_BIT)
        x = torch.ones(2, 4, 8, 8)
        with torch.no_grad():
            for t in TIMESTEPS:
                x = x - 0.1 * model(x, t.expand(2), torch.ones(2, 3, 6)) + 0.01 * kept.kept()
        return x, model

    with pytest.warns(UserWarning, match="runs uncached"):
        actual, _ = guided(optimized=True)
    assert not is_fake(actual)
    assert torch.equal(actual, guided(optimized=False)[0])


@thorough
def test_once_the_global_is_prepared_steps_are_cached() -> None:
    kept = PLACES["a global"](lambda x, last: 1)
    model = deepcache_fx.optimize(Calling(kept.function), **TO_THE_BIT)
    for _ in range(2):
        denoise(model, TIMESTEPS)
    report = deepcache_fx.report(model)
    assert (report.last_run, report.original_calls) == ("FssF", 0)


def test_a_fake_tensor_that_comes_in_is_refused() -> None:
    model = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    mode = FakeTensorMode()
    inputs = torch.ones(2, 4, 8, 8), torch.tensor([1, 1]), torch.ones(2, 3, 6)
    for number in range(3):
        mixed = [mode.from_tensor(x) if i == number else x for i, x in enumerate(inputs)]
        with torch.no_grad(), pytest.raises(deepcache_fx.FakeTensorError, match="a FakeTensor came in, of shape"):
            model(*mixed)
    assert issubclass(deepcache_fx.FakeTensorError, deepcache_fx.DeepCacheError)


def test_a_model_that_somebody_traces_runs_its_own_forward() -> None:
    model = deepcache_fx.optimize(CompVisUNet(), **TO_THE_BIT)
    inputs = torch.ones(2, 4, 8, 8), torch.tensor([1, 1]), torch.ones(2, 3, 6)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="inside another compilation"):
            program = torch.export.export(model, inputs, strict=False)
        assert torch.allclose(program.module()(*inputs), CompVisUNet()(*inputs), atol=1e-6)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.warns(UserWarning, match="under a FakeTensorMode"):
            assert is_fake(model(*map(mode.from_tensor, inputs)))


class Prepares(CompVisUNet):
    """Writes, in its first forward, what later ones read, into an attribute that is there from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.offset: float | None = None

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        result = super().forward(x, timesteps, context)
        if self.offset is None:
            self.offset = 1.0
            return result
        return result + self.offset


class Counts(CompVisUNet):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x, timesteps, context) * self.calls


class KeepsItsOutput(CompVisUNet):
    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(x, timesteps, context)
        return self.last


@pytest.mark.filterwarnings("ignore:.*runs uncached.*", "ignore:The tensor attribute")
@pytest.mark.parametrize("model", [Prepares, Counts, KeepsItsOutput])
def test_what_forward_writes_into_an_attribute_that_was_there_is_as_after_a_call(model: type[CompVisUNet]) -> None:
    """`torch.export` gives such attributes back what they were before it."""
    unet, plain = model(), model()
    plain.load_state_dict(unet.state_dict())
    deepcache_fx.optimize(unet, interval=1, **TO_THE_BIT)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 6)
    with torch.no_grad():
        for timestep in (9, 8, 7, 6):
            given = x, torch.full((2,), timestep), context
            assert torch.equal(unet(*given), plain(*given))
    for name in ("offset", "calls"):
        assert getattr(unet, name, None) == getattr(plain, name, None)
    if isinstance(unet, KeepsItsOutput) and isinstance(plain, KeepsItsOutput):
        assert torch.equal(unet.last, plain.last)
