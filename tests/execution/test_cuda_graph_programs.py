"""Recorded graphs, upon a recorder for the CPU that refuses what a device would silently get wrong."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.errors import CaptureError
from deepcache_fx.execution import assemble, cuda_graph_programs, cuda_graphs, memory_format
from deepcache_fx.graph.capture import CAPTURE_LOCK
from deepcache_fx.graph.weights import held
from deepcache_fx.runtime import runtime as runtime_module
from deepcache_fx.runtime.attach import bring_back, pause, runtime_of
from deepcache_fx.runtime.runtime import Runtime
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough

TIMESTEPS = torch.arange(950, -1, -50)


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    made: list[FakeRecorder] = []

    def make(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", make)
    return made


def called(**options: Any) -> CompVisUNet:
    return deepcache_fx.optimize(CompVisUNet(), backend="eager", cuda_graphs=False, **options)


def recorded(**options: Any) -> CompVisUNet:
    return deepcache_fx.optimize(CompVisUNet(), backend="eager", cuda_graphs=True, **options)


def says(unet: torch.nn.Module) -> list[str]:
    return [item.cuda_graphs for item in deepcache_fx.report(unet).signatures]


def one_call_a_step(unet: torch.nn.Module) -> torch.Tensor:
    return denoise(unet, TIMESTEPS)


@torch.no_grad()
def two_calls_a_step(unet: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    x, contexts = torch.randn(1, 4, 8, 8), [torch.randn(1, 3, 6) for _ in range(2)]  # alignment changes the rounding
    for t in TIMESTEPS:
        first, second = (unet(x, t.expand(1), context) for context in contexts)
        x = x - 0.1 * (2 * second - first)
    return x


# What must hold.


def test_recorded_steps_give_what_called_ones_give_to_the_bit(recorders: list[FakeRecorder]) -> None:
    unet, plain = recorded(), called()
    for seed in (0, 1, 0):
        assert torch.equal(denoise(unet, TIMESTEPS, seed), denoise(plain, TIMESTEPS, seed))
    (recorder,) = recorders
    assert [graph.replays for graph in recorder.graphs] == [3 * 7, 3 * 13]
    assert says(unet) == ["recorded"]
    assert set(deepcache_fx.report(unet).signatures[0].first_call_seconds) == {"full", "shallow"}


@thorough
def test_compiled_programs_are_recorded_too(recorders: list[FakeRecorder]) -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), backend="aot_eager")  # "auto": recorded, for it is compiled
    torch.testing.assert_close(denoise(unet, TIMESTEPS[:7]), denoise(called(), TIMESTEPS[:7]))
    assert [graph.replays for graph in recorders[0].graphs] == [3, 4]


def test_what_a_step_returned_survives_the_next_steps() -> None:
    unet = recorded()
    results, copies = [], []
    with torch.no_grad():
        for index, t in enumerate(TIMESTEPS[:7]):
            x = torch.full((2, 4, 8, 8), float(index))
            results.append(unet(x, t.expand(2), torch.ones(2, 3, 6)))
            copies.append(results[-1].clone())
    assert all(torch.equal(result, copy) for result, copy in zip(results, copies, strict=True))
    assert len({float(copy.sum()) for copy in copies}) == 7


def test_two_calls_a_step_share_the_buffers_without_mixing_their_features(recorders: list[FakeRecorder]) -> None:
    unet = recorded()
    assert torch.equal(two_calls_a_step(unet), two_calls_a_step(called()))
    assert deepcache_fx.report(unet).captures == 1
    assert recorders[0].kept > 0  # moved in from memory of their own


@thorough
def test_sizes_share_one_recorder_and_keep_their_own_graphs(recorders: list[FakeRecorder]) -> None:
    unet, plain = recorded(), called()
    for size in (8, 16, 8, 16):
        assert torch.equal(denoise(unet, TIMESTEPS[:5], size=size), denoise(plain, TIMESTEPS[:5], size=size))
    assert len(recorders) == 1
    assert len(recorders[0].graphs) == 4


def test_threads_take_turns_in_the_buffers() -> None:
    """Two threads, stepping in turn by force, each get what they get alone."""
    unet, plain = recorded(), called()
    expected = [denoise(plain, TIMESTEPS, seed) for seed in (0, 1)]
    turn = threading.Barrier(2)
    results: dict[int, torch.Tensor] = {}

    def in_step(module: torch.nn.Module) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            turn.wait(60)
            with torch.no_grad():
                return module(*args)

        return call

    num_threads = torch.get_num_threads()

    def run(seed: int) -> None:
        torch.set_num_threads(num_threads)  # of this thread alone: the order of sums depends on it
        results[seed] = denoise(in_step(unet), TIMESTEPS, seed)  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_an_unchanged_prompt_is_not_copied_again_and_a_changed_one_is() -> None:
    unet, plain = recorded(), called()
    context = torch.randn(2, 3, 6)
    copies: list[torch.Size] = []

    class Follower(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                copies.append(args[1].shape)
            return func(*args, **(kwargs or {}))

    def step(index: int, prompt: torch.Tensor, watched: bool = False) -> None:
        arguments = (torch.full((2, 4, 8, 8), float(index)), TIMESTEPS[index].expand(2), prompt)
        with torch.no_grad():
            expected = plain(*arguments)
            if not watched:
                assert torch.equal(unet(*arguments), expected)
                return
            copies.clear()
            with Follower():
                actual = unet(*arguments)
            assert torch.equal(actual, expected)

    step(0, context)
    step(1, context)
    step(2, context, watched=True)
    assert context.shape not in copies
    context.mul_(2)
    step(3, context, watched=True)
    assert context.shape in copies
    step(4, context.clone(), watched=True)
    assert context.shape in copies
    with torch.no_grad():
        context.data = context.data + 1  # the same object and version, other memory
    step(5, context)


# Weights.


@thorough
def test_weights_that_moved_are_recorded_anew(recorders: list[FakeRecorder]) -> None:
    unet, plain = recorded(), called()
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(plain, TIMESTEPS))
    for parameter in unet.parameters():  # as offloading does, there and back
        parameter.data = parameter.data.clone()
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(plain, TIMESTEPS))
    assert len(recorders[0].graphs) == 4
    assert [graph.alive for graph in recorders[0].graphs] == [False, False, True, True]
    assert deepcache_fx.report(unet).captures == 1
    assert says(unet) == ["recorded, 2 times anew because weights had moved"]


@pytest.mark.parametrize("step", family(range(1, 6), 2))
def test_weights_that_move_within_a_run_are_followed(step: int) -> None:
    unet, plain = recorded(interval=3), called(interval=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for index, t in enumerate(TIMESTEPS[:8]):
            if index == step:
                unet.load_state_dict({k: v * 1.5 for k, v in unet.state_dict().items()}, assign=False)
                plain.load_state_dict({k: v * 1.5 for k, v in plain.state_dict().items()}, assign=False)
                for parameter in unet.parameters():
                    parameter.data = parameter.data.clone()
            arguments = torch.randn(2, 4, 8, 8), t.expand(2), torch.ones(2, 3, 6)
            assert torch.equal(unet(*arguments), plain(*arguments))


def test_weights_changed_in_place_need_no_new_recording(recorders: list[FakeRecorder]) -> None:
    unet, plain = recorded(), called()
    denoise(unet, TIMESTEPS[:4])
    with torch.no_grad():
        for model in (unet, plain):
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(plain, TIMESTEPS))
    assert len(recorders[0].graphs) == 2


@thorough
def test_new_parameters_drop_the_old_graphs(recorders: list[FakeRecorder]) -> None:
    unet = recorded()
    denoise(unet, TIMESTEPS[:4])
    old = weakref.ref(unet.out[2].weight)
    unet.out[2] = torch.nn.Conv2d(8, 4, 3, padding=1)
    denoise(unet, TIMESTEPS[:4])
    assert [graph.alive for graph in recorders[0].graphs] == [False, False, True, True]
    gc.collect()
    assert old() is None


# What cannot be recorded.


@pytest.mark.parametrize("run", family([one_call_a_step, two_calls_a_step], two_calls_a_step))
@pytest.mark.parametrize(("fail", "name"), [(["no luck"], "full"), (["", "out of memory"], "shallow")])
def test_a_variant_that_cannot_be_recorded_is_called_and_the_report_says_why(
    recorders: list[FakeRecorder],
    fail: list[str],
    name: str,
    run: Callable[[torch.nn.Module], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FakeRecorder.__init__

    def failing(self: FakeRecorder, device: torch.device) -> None:
        original(self, device)
        self.fail = list(fail)

    monkeypatch.setattr(FakeRecorder, "__init__", failing)
    unet = recorded()
    assert torch.equal(run(unet), run(called()))
    assert says(unet)[0] == f"not recorded: {name} step: {fail[-1]}"
    assert not any(graph.alive for graph in recorders[0].graphs)
    assert "not recorded" in str(deepcache_fx.report(unet))


@thorough
def test_out_of_memory_for_the_buffers_leaves_called_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, expected = recorded(), denoise(called(), TIMESTEPS)

    def no_memory(like: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph_programs, "_Input", no_memory)
        denoise(unet, TIMESTEPS[:2])
    assert torch.equal(denoise(unet, TIMESTEPS), expected)
    assert says(unet) == ["not recorded: buffers: OutOfMemoryError: tried to allocate"]


@thorough
def test_while_somebody_else_records_programs_are_called(recorders: list[FakeRecorder]) -> None:
    unet, plain = recorded(interval=4), called(interval=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for index, t in enumerate(TIMESTEPS[:12]):
            if recorders:
                recorders[0].is_usable = index % 5 != 3
            arguments = torch.randn(2, 4, 8, 8), t.expand(2), torch.ones(2, 3, 6)
            assert torch.equal(unet(*arguments), plain(*arguments))
    assert sum(graph.replays for graph in recorders[0].graphs) == 10


@thorough
def test_a_program_that_fails_is_an_error_and_no_reason_to_stop_recording(recorders: list[FakeRecorder]) -> None:
    calls = 0

    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise ValueError("no luck")
            return graph.forward(*args)

        return run

    unet = deepcache_fx.optimize(CompVisUNet(), backend=broken)
    with pytest.raises(ValueError, match="no luck"):
        denoise(unet, TIMESTEPS)
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(called(), TIMESTEPS))
    assert says(unet) == ["recorded"]


# Options, modes and lifetimes.


def test_the_report_says_why_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, reason in (
        ({"cuda_graphs": False}, "off: cuda_graphs=False"),
        ({}, "off: the backend is eager (cuda_graphs=True records it all the same)"),
    ):
        unet = deepcache_fx.optimize(CompVisUNet(), backend="eager", **options)
        denoise(unet, TIMESTEPS[:2])
        assert says(unet) == [reason]
    monkeypatch.delitem(cuda_graphs.RECORDERS, "cpu")
    unet = recorded()
    denoise(unet, TIMESTEPS[:2])
    assert says(unet) == ["off: the model runs on cpu"]


def test_cuda_graphs_takes_three_values() -> None:
    with pytest.raises(DeepCacheError, match=r'cuda_graphs must be "auto", True or False, got \'yes\''):
        deepcache_fx.optimize(CompVisUNet(), cuda_graphs="yes")  # type: ignore[arg-type]


@thorough
def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    unet, plain = recorded(), called()
    with torch.inference_mode():
        denoise(unet, TIMESTEPS[:4])
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(plain, TIMESTEPS))
    with torch.inference_mode():
        assert torch.equal(denoise(unet, TIMESTEPS, seed=3), denoise(plain, TIMESTEPS, seed=3))


@thorough
def test_evicted_signatures_give_their_graphs_back(recorders: list[FakeRecorder]) -> None:
    unet = recorded(max_captures=2)
    for size in (8, 12, 16):
        denoise(unet, TIMESTEPS[:4], size=size)
    assert [graph.alive for graph in recorders[0].graphs] == [False, False, True, True, True, True]


@thorough
def test_another_schedule_keeps_what_is_recorded(recorders: list[FakeRecorder]) -> None:
    unet = recorded()
    denoise(unet, TIMESTEPS)
    deepcache_fx.optimize(unet, interval=5, backend="eager", cuda_graphs=True)
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(called(interval=5), TIMESTEPS))
    assert len(recorders[0].graphs) == 2


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("let_go", [deepcache_fx.restore, lambda unet: deepcache_fx.optimize(unet, backend="eager")])
def test_memory_is_free_when_the_programs_are_let_go_of(
    recorders: list[FakeRecorder], let_go: Callable[[torch.nn.Module], object]
) -> None:
    """Graphs, buffers and cached features of every thread; without waiting for garbage to be collected."""
    unet = recorded()
    thread = threading.Thread(target=denoise, args=(unet, TIMESTEPS[:5]))
    thread.start()
    thread.join()
    two_calls_a_step(unet)
    runtime = runtime_of(unet)
    assert runtime is not None
    held_by_graphs = [held(graph) for entry in runtime._entries.values() for graph in entry.graphs()]
    weights = {id(tensor) for tensors in held_by_graphs for tensor in tensors}  # with small constants
    graphs = recorders[0].graphs
    buffers = [item.owner for graph in graphs for item in graph.outside.values() if id(item.owner()) not in weights]
    alive = [reference for reference in buffers if reference() is not None]
    features = [weakref.ref(slot.feature) for slot in runtime._state.slots._slots if slot.feature is not None]
    owners = [weakref.ref(item) for item in (runtime, *runtime._entries.values())]
    del runtime, weights, buffers, held_by_graphs
    assert len(alive) > 4
    assert features
    let_go(unet)
    assert not any(graph.alive for graph in graphs)
    assert [reference() for reference in (*alive, *features)] == [None] * (len(alive) + len(features))
    assert [type(reference()).__name__ for reference in owners] == ["NoneType"] * len(owners)
    assert recorders[0].freed == 1


@thorough
def test_what_was_released_and_is_called_once_more_is_called_not_recorded(recorders: list[FakeRecorder]) -> None:
    """As by another thread, in the midst of a step."""
    unet, plain = recorded(), called()
    denoise(unet, TIMESTEPS[:4])
    runtime = runtime_of(unet)
    assert runtime is not None
    (entry,) = runtime._entries.values()
    recorders[0].between = lambda: None
    original, calls = entry.programs.shallow, []

    def released_meanwhile(*args: Any, **kwargs: Any) -> Any:
        if not calls:
            thread = threading.Thread(target=entry.release)
            thread.start()
            thread.join(60)
        calls.append(1)
        return original(*args, **kwargs)

    entry.programs.shallow = released_meanwhile  # type: ignore[method-assign]
    assert torch.equal(denoise(unet, TIMESTEPS), denoise(plain, TIMESTEPS))
    assert len(recorders[0].graphs) == 2
    assert not any(graph.alive for graph in recorders[0].graphs)


# Alternating with other schedules, and with the model as it is.


class Events:
    """What has been made so far: captures, compilations, weights laid out, recordings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recorders: list[FakeRecorder]) -> None:
        self.captures = self.compilations = self.moves = 0
        self._recorders = recorders
        self._count(monkeypatch, runtime_module, "capture", "captures")
        self._count(monkeypatch, assemble, "compile_variants", "compilations")
        self._count(monkeypatch, memory_format, "_move", "moves")
        monkeypatch.setattr(memory_format, "DEVICE_TYPES", ("cpu",))

    def _count(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, counter: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            setattr(self, counter, getattr(self, counter) + 1)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    def so_far(self) -> tuple[int, ...]:
        recordings = sum(len(recorder.graphs) for recorder in self._recorders)
        traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return self.captures, self.compilations, self.moves, recordings, traced


def other_schedule(unet: torch.nn.Module, number: int) -> None:
    deepcache_fx.optimize(unet, interval=2 + number % 2, backend="aot_eager")
    denoise(unet, TIMESTEPS[:2])


def in_a_block(unet: torch.nn.Module, number: int) -> None:
    with deepcache_fx.optimized(unet, interval=4, backend="aot_eager"):
        denoise(unet, TIMESTEPS[:2])
    denoise(unet, TIMESTEPS[:2])


def paused(unet: torch.nn.Module, number: int) -> None:
    runtime = pause(unet)
    assert runtime is not None
    denoise(unet, TIMESTEPS[:1])
    bring_back(unet, runtime)
    denoise(unet, TIMESTEPS[:2])


_OTHERS: list[Runtime] = []


def another_order(unet: torch.nn.Module, number: int) -> None:
    """As `calibrate` goes back and forth between orders of the forecast."""
    runtime = pause(unet)
    assert runtime is not None
    if _OTHERS:
        bring_back(unet, _OTHERS.pop())
    else:
        deepcache_fx.optimize(unet, forecast=0, backend="aot_eager")
    denoise(unet, TIMESTEPS[:2])
    other = pause(unet)
    assert other is not None
    _OTHERS.append(other)
    bring_back(unet, runtime)
    denoise(unet, TIMESTEPS[:2])


@pytest.mark.parametrize("alternate", family([other_schedule, in_a_block, paused, another_order], paused))
def test_ten_alternations_make_nothing_again(
    alternate: Callable[[torch.nn.Module, int], None], monkeypatch: pytest.MonkeyPatch, recorders: list[FakeRecorder]
) -> None:
    events = Events(monkeypatch, recorders)
    unet = deepcache_fx.optimize(CompVisUNet(), backend="aot_eager")
    _OTHERS.clear()
    denoise(unet, TIMESTEPS[:2])
    alternate(unet, 0)
    before = events.so_far()
    assert all(before)
    for number in range(10):
        alternate(unet, number + 1)
    assert events.so_far() == before
    for runtime in _OTHERS:
        runtime.release()
    deepcache_fx.restore(unet)
    assert all(weight.is_contiguous() for weight in unet.parameters())


# Other threads.


@thorough
def test_no_weight_moves_between_the_look_at_its_address_and_the_replay(
    recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the recorder another thread converts the weights, or undoes it; one lock after the other."""
    unet, plain = recorded(), called()
    expected = denoise(plain, TIMESTEPS[:4])
    denoise(unet, TIMESTEPS[:4])
    weights, moved, threads = memory_format.ChannelsLastWeights(), [0], []

    def move() -> None:
        with CAPTURE_LOCK:  # as `ModelState` does
            moved[0] += weights.convert(unet) or len(weights._used)
            weights.undo()

    def between() -> None:
        thread = threading.Thread(target=move)
        thread.start()
        thread.join(0.02)  # it may have to wait for a lock that this thread holds
        threads.append(thread)

    recorders[0].between = between
    deepcache_fx.reset(unet)
    torch.testing.assert_close(denoise(unet, TIMESTEPS[:4]), expected)
    recorders[0].between = lambda: None
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert moved[0] > len(threads)


@thorough
def test_threads_that_run_restore_and_optimize_at_once_end() -> None:
    """Every step is full, so that a run is the same with and without programs.

    Between `restore` and `optimize` a thread may run the plain model. A capture that begins then fails, or hands that
    run the stand-ins that it puts in the place of the weights: an error in either thread, never a result.
    """
    unet, expected = recorded(interval=1), denoise(CompVisUNet(), TIMESTEPS[:3])
    results: list[torch.Tensor] = []
    errors: list[BaseException] = []
    plain = 0  # grows where the model becomes plain, and where it is optimised again
    num_threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(num_threads)
        for _ in range(4):
            before = plain
            try:
                found = denoise(unet, TIMESTEPS[:3])
                if type(found) is not torch.Tensor:
                    raise TypeError(f"a {type(found).__name__}")
                results.append(found)
            except CaptureError:
                pass
            except BaseException as error:
                if plain == before and before % 2 == 0:  # no part of it ran the plain model
                    errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        plain += 1
        deepcache_fx.restore(unet)
        deepcache_fx.optimize(unet, interval=1, backend="eager", cuda_graphs=True)
        plain += 1
        time.sleep(0.05)
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    for found in results:
        torch.testing.assert_close(found, expected)


@thorough
def test_nothing_holds_a_model_that_is_dropped() -> None:
    unet = recorded()
    denoise(unet, TIMESTEPS[:4])
    reference = weakref.ref(unet)
    del unet
    gc.collect()
    assert reference() is None


# The recorder for the CPU can fail.


@pytest.fixture
def graph(recorders: list[FakeRecorder]) -> Iterator[tuple[Any, FakeRecorder, torch.Tensor]]:
    recorder = FakeRecorder(torch.device("cpu"))
    memory = torch.ones(3)
    with recorder.lock:
        recording = recorder.record(lambda: (memory * 2,))
        yield recording, recorder, memory


def test_the_fake_replays_operators_on_the_memory_of_then(graph: Any) -> None:
    recording, _, memory = graph
    memory.fill_(5)
    recording.replay()
    assert recording.outputs[0].tolist() == [10.0] * 3


def test_the_fake_refuses_memory_that_moved(graph: Any) -> None:
    recording, _, memory = graph
    memory.data = torch.ones(3)
    with pytest.raises(AssertionError, match="an address that its owner has left"):
        recording.replay()


def test_the_fake_refuses_freed_memory() -> None:
    recorder = FakeRecorder(torch.device("cpu"))
    memory = [torch.ones(3)]
    with recorder.lock:
        recording = recorder.record(lambda: (memory[0] * 2,))
        memory.clear()
        with pytest.raises(AssertionError, match="memory that was freed"):
            recording.replay()


def test_the_fake_refuses_a_replay_without_the_lock_or_after_reset() -> None:
    recorder = FakeRecorder(torch.device("cpu"))
    with recorder.lock:
        recording = recorder.record(lambda: (torch.ones(3),))
    with pytest.raises(AssertionError, match="without its lock"):
        recording.replay()
    with recorder.lock:
        recording.reset()
        with pytest.raises(AssertionError, match="given back"):
            recording.replay()


def test_the_fake_overwrites_the_outputs_of_other_graphs() -> None:
    recorder = FakeRecorder(torch.device("cpu"))
    with recorder.lock:
        first, second = (recorder.record(lambda: (torch.ones(3),)) for _ in range(2))
        first.replay()
        second.replay()
    assert first.outputs[0].isnan().all()
