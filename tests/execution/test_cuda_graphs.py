"""The recorder for CUDA, upon a fake of what it uses of `torch.cuda` that is left behind by a failure as CUDA is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepcache_fx.execution import cuda_graphs
from deepcache_fx.execution.cuda_graphs import CudaRecorder, RecordingError
from tests.fake_cuda import FakeCuda, Stream, fake_cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(cuda_graphs, "_STREAMS", {})
    return fake_cuda(monkeypatch)


def program(cuda: FakeCuda, *steps: Callable[[], object]) -> Callable[[], list[Any]]:
    def run() -> list[Any]:
        for step in steps:
            cuda.launch()
            step()
        return [len(steps)]

    return run


def raising_when_recorded(cuda: FakeCuda, error: BaseException) -> Callable[[], object]:
    def step() -> None:
        if cuda.recorded:
            raise error

    return step


def recorder(index: int = 0) -> CudaRecorder:
    return CudaRecorder(torch.device("cuda", index))


def test_a_program_runs_once_to_warm_up_and_once_to_be_recorded(cuda: FakeCuda) -> None:
    made = recorder()
    calls = []
    with made.lock:
        recording = made.record(program(cuda, lambda: calls.append(cuda.stream.cuda_stream), cuda.draw))
        recording.replay()
    assert calls == [1, 1]
    assert (recording.outputs, cuda.replays, cuda.stream.cuda_stream) == ([2], 1, 0)
    assert 1 in cuda.stream.waited_for
    assert cuda.is_as_before
    recording.reset()
    assert set(cuda.uses.values()) == {0}


@pytest.mark.parametrize(
    "fault",
    [
        lambda cuda: cuda.wait,
        lambda cuda: raising_when_recorded(cuda, RuntimeError("no luck")),
        lambda cuda: raising_when_recorded(cuda, ValueError("no luck")),
        lambda cuda: lambda: setattr(cuda, "fails_to_instantiate", bool(cuda.recorded)),
    ],
    ids=["waits", "raises", "raises another error", "cannot be instantiated"],
)
def test_a_recording_that_fails_leaves_the_process_as_it_was(cuda: FakeCuda, fault: Callable[..., Any]) -> None:
    made = recorder()
    good = program(cuda, cuda.draw)
    with made.lock:
        before = made.record(good)
        with pytest.raises(RecordingError) as caught:
            made.record(program(cuda, fault(cuda)))
        assert "\n" not in str(caught.value)
        assert cuda.stream is cuda.default
        assert cuda.is_as_before
        cuda.draw()
        before.replay()
        after = made.record(good)
        after.replay()
        for recording in (before, after):
            recording.reset()
    assert cuda.is_as_before
    assert set(cuda.uses.values()) == {0}, "all pools are given back"


def test_the_first_error_is_told_not_what_follows_from_it(cuda: FakeCuda) -> None:
    made = recorder()
    with (
        made.lock,
        pytest.raises(RecordingError, match="RuntimeError: CUDA error: operation not permitted when stream"),
    ):
        made.record(program(cuda, cuda.wait))


def test_an_interrupted_recording_cleans_up_too(cuda: FakeCuda) -> None:
    made = recorder()
    with made.lock:
        with pytest.raises(KeyboardInterrupt):
            made.record(program(cuda, raising_when_recorded(cuda, KeyboardInterrupt())))
        assert cuda.is_as_before
        made.record(program(cuda))


def test_a_fresh_stream_and_pool_are_taken_after_a_failure_alone(cuda: FakeCuda) -> None:
    made = recorder()
    used = []
    note = program(cuda, lambda: used.append((cuda.stream.cuda_stream, *cuda.recorded_to)))
    with made.lock:
        for _ in range(2):
            made.record(note)
        with pytest.raises(RecordingError):
            made.record(program(cuda, cuda.wait))
        made.record(note)
    (first, second, third) = used[1::2]
    assert first == second
    assert first[0] != third[0]
    assert first[1] != third[1]


@pytest.mark.parametrize(
    ("error", "seen"), [(torch.OutOfMemoryError("full"), RecordingError), (ValueError("no luck"), ValueError)]
)
def test_a_failing_warm_up_leaves_the_stream_and_a_lack_of_memory_is_no_error(
    cuda: FakeCuda, error: Exception, seen: type[Exception]
) -> None:
    def fail() -> None:
        raise error

    made = recorder()
    with made.lock, pytest.raises(seen):
        made.record(program(cuda, fail))
    assert cuda.stream is cuda.default
    assert cuda.stream.waited_for == [1]
    assert cuda.is_as_before


def test_recorders_of_a_device_share_one_stream(cuda: FakeCuda) -> None:
    for _ in range(3):
        made = recorder()
        with made.lock:
            made.record(program(cuda)).reset()
    assert cuda.streams == 1


def test_a_recorder_asks_its_own_device_whether_it_is_being_recorded(cuda: FakeCuda) -> None:
    here, there = recorder(0), recorder(1)
    cuda.recorded[0] = None  # type: ignore[assignment]
    assert not here.begin()
    assert there.begin()
    cuda.device = 1
    assert not here.begin()
    assert cuda.device == 1
    assert cuda.asked == [0, 1, 0]


def test_the_fake_is_left_behind_by_torchs_own_recording(cuda: FakeCuda) -> None:
    """What is mended: as `torch.cuda.graph` does it."""
    pool, stream, graph = cuda.new_pool(), cuda.new_stream(), torch.cuda.CUDAGraph()
    manager = torch.cuda.stream(stream)  # type: ignore[arg-type]
    manager.__enter__()
    graph.capture_begin(pool=pool)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda.wait()
    with pytest.raises(RuntimeError, match="previous error"):
        graph.capture_end()
    assert isinstance(cuda.stream, Stream)
    assert cuda.stream is stream
    with pytest.raises(RuntimeError, match="Offset increment"):
        cuda.draw()
    with pytest.raises(RuntimeError, match="already recording"):
        torch.cuda.CUDAGraph().capture_begin(pool=pool)  # type: ignore[arg-type]
