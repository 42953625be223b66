"""Microbenchmark of the fused GroupNorm operators: time, bytes moved and share of what a copy reaches.

    python -m benchmarks.speed.kernels [--json OUT] [--device cuda]

Arms are eager PyTorch, Inductor, our operators, and a copy that moves as many bytes: no kernel that reads its input
once and writes its output once is faster. Each arm runs over as many sets of tensors as exceed the L2 cache, within one
CUDA graph: no launch overhead, no input left in the cache by the call before. The arms take turns, replay by replay.
GEGLU has no kernel of ours: its rows say what Inductor leaves to gain.

A kernel is worth its place where `ours` is faster than `inductor` beyond the spread. On a CPU the operators run in
plain PyTorch, at small shapes: that shows that the benchmark works, and decides nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import passes.kernels
from benchmarks.environment import environment
from benchmarks.speed.cases import Quantiles
from benchmarks.speed.measure import synchronize, timed

GROUPS = 32
ENOUGH = 2**28
"""Bytes that a round of calls goes through: several times the L2 cache of an H200."""

Function = Callable[..., object]


@dataclass(frozen=True)
class Experiment:
    """One operation at one shape."""

    operation: str
    shape: tuple[int, ...]
    """Of the output."""
    dtype: str
    layout: str


@dataclass(frozen=True)
class Row:
    """What one arm of an experiment took."""

    experiment: Experiment
    arm: str
    bytes: int
    """That a call must move: each input and the output, once."""
    seconds: Quantiles
    """Of one call."""
    bandwidth: float
    """Bytes that must move, per second of the median."""
    share: float
    """Of the bandwidth that the copy reaches at this size."""
    environment: dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """Functions of the same tensors, by arm, and how the tensors are made."""

    arms: dict[str, Function]
    inputs: tuple[tuple[int, ...], ...]
    """The shapes of the large inputs."""
    constants: tuple[torch.Tensor, ...]
    """Passed to every call after them; too small to count."""


def add_norm_silu(shape: tuple[int, ...], like: torch.Tensor) -> Operation:
    """A time embedding's addition, GroupNorm and SiLU."""
    weight, bias = like.new_ones(shape[1]), like.new_zeros(shape[1])
    addend = like.new_ones(*shape[:2], 1, 1)

    def separate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return F.silu(F.group_norm(x + addend, GROUPS, weight, bias))

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return passes.kernels.group_norm(x, weight, bias, GROUPS, 1e-5, True, addend)

    return Operation({"eager": separate, "ours": ours}, (shape,), (weight, bias, addend))


def cat_norm_silu(shape: tuple[int, ...], like: torch.Tensor) -> Operation:
    """GroupNorm and SiLU of a concatenation."""
    samples, channels, *positions = shape
    weight, bias = like.new_ones(channels), like.new_zeros(channels)

    def separate(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.silu(F.group_norm(torch.cat([a, b], 1), GROUPS, weight, bias))

    def ours(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return passes.kernels.cat_group_norm(a, b, weight, bias, GROUPS, 1e-5, True)

    half = (samples, channels // 2, *positions)
    return Operation({"eager": separate, "ours": ours}, (half, half), (weight, bias))


def geglu(shape: tuple[int, ...], like: torch.Tensor) -> Operation:
    """The gate of a feed-forward layer."""

    def gate(x: torch.Tensor) -> torch.Tensor:
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)

    return Operation({"eager": gate}, ((*shape[:-1], 2 * shape[-1]),), ())


OPERATIONS: dict[str, Callable[[tuple[int, ...], torch.Tensor], Operation]] = {
    "add+norm+silu": add_norm_silu,
    "cat+norm+silu": cat_norm_silu,
    "geglu": geglu,
}
SD15 = ((2, 320, 64, 64), (2, 640, 64, 64), (2, 1280, 32, 32))
SDXL = ((2, 320, 128, 128), (2, 640, 64, 64))
GATES = ((2, 4096, 1280), (2, 1024, 2560), (2, 4096, 2560), (2, 1024, 5120))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def experiments(on_gpu: bool) -> list[Experiment]:
    """The shapes of SD1.5 and SDXL in bf16; small ones in fp32 on a CPU."""
    dtype = "bf16" if on_gpu else "fp32"
    maps = tuple(dict.fromkeys(SD15 + SDXL)) if on_gpu else ((2, 64, 16, 16),)
    gates = GATES if on_gpu else ((2, 64, 64),)
    norms = [
        Experiment(operation, shape, dtype, layout)
        for operation in ("add+norm+silu", "cat+norm+silu")
        for shape in maps
        for layout in ("channels-last", "contiguous")
    ]
    return norms + [Experiment("geglu", shape, dtype, "contiguous") for shape in gates]


def measure(experiment: Experiment, device: torch.device, rounds: int) -> list[Row]:
    """All arms of one experiment, in turn."""
    like = torch.empty(0, device=device, dtype=DTYPES[experiment.dtype])
    operation = OPERATIONS[experiment.operation](experiment.shape, like)
    output = torch.Size(experiment.shape).numel()
    moved = like.element_size() * (output + sum(torch.Size(shape).numel() for shape in operation.inputs))
    sets = -(-ENOUGH // moved) if device.type == "cuda" else 1
    inputs = [[_random(shape, like, experiment.layout) for shape in operation.inputs] for _ in range(sets)]
    halves = [[torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(sets)]

    arms: dict[str, Callable[[], object]] = {"copy": lambda: [target.copy_(source) for target, source in halves]}
    functions = dict(operation.arms)
    if device.type == "cuda":
        functions["inductor"] = torch.compile(functions["eager"], fullgraph=True, dynamic=False)
    for name, function in functions.items():
        arms[name] = _calls(function, inputs, operation.constants)
    samples = time_in_turn(arms, device, rounds)
    seconds = {name: Quantiles.of([value / sets for value in samples[name]]) for name in arms}
    facts = environment(str(device))
    copied = seconds["copy"]
    assert copied is not None
    return [
        Row(experiment, name, moved, time, moved / time.median, copied.median / time.median, facts)
        for name, time in seconds.items()
        if time is not None
    ]


def _random(shape: Sequence[int], like: torch.Tensor, layout: str) -> torch.Tensor:
    x = torch.randn(*shape, device=like.device, dtype=like.dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels-last" else x


def _calls(
    function: Function, inputs: Sequence[Sequence[torch.Tensor]], constants: Sequence[torch.Tensor]
) -> Callable[[], object]:
    def run() -> None:
        for tensors in inputs:
            function(*tensors, *constants)

    return run


@torch.no_grad()
def time_in_turn(arms: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every arm; on CUDA the arms are recorded as graphs first."""
    if device.type == "cuda":
        arms = {name: _record(run) for name, run in arms.items()}
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 3):
        for name, run in arms.items():
            seconds = _device_seconds(run) if device.type == "cuda" else timed(run, device)[0]
            if turn >= 3:  # those before warm up
                samples[name].append(seconds)
    return samples


def _record(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _device_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    synchronize(torch.device("cuda"))
    return start.elapsed_time(end) / 1e3


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table of the rows."""
    table = Table("operation", "output", "layout", "arm", "us, median", "20-80 %", "GB/s", "of a copy")
    for row in rows:
        time = row.seconds
        table.add_row(
            row.experiment.operation,
            "x".join(map(str, row.experiment.shape)) + " " + row.experiment.dtype,
            row.experiment.layout,
            row.arm,
            f"{time.median * 1e6:.1f}",
            f"{time.low * 1e6:.1f}-{time.high * 1e6:.1f}",
            f"{row.bandwidth / 1e9:.0f}",
            f"{row.share:.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Microbenchmark of the fused GroupNorm operators.")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    device = torch.device(options.device)
    console = Console()
    rows = []
    for experiment in experiments(device.type == "cuda"):
        rows += measure(experiment, device, options.rounds)
    show(rows, console)
    if device.type != "cuda":
        console.print(
            "Measured on a CPU, where the operators run in plain PyTorch: this decides nothing about the kernels."
        )
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
