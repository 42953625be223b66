"""Where the time of one step goes: `python -m benchmarks.speed.profile --model sd15 --arm ours-compile`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.speed.__main__ import latent_size, quiet, sensible
from benchmarks.speed.arms import Arm, all_arms, prepare_ours
from benchmarks.speed.call_profile import CallProfile, CallProfiler, node_profile
from benchmarks.speed.cases import Case
from benchmarks.speed.measure import StepTimer
from benchmarks.speed.pipelines import Stage
from benchmarks.speed.setup import Settings, set_up
from benchmarks.speed.subjects import KINDS, Subject
from deepcache_fx.execution.checked import Checked
from deepcache_fx.execution.openvino import OpenVINOProgram
from deepcache_fx.runtime.attach import runtime_of

COUNTED: dict[str, dict[str, Any]] = {
    "openvino": {},
    "ours-openvino": {},
    "ours-openvino-bf16": {"precision": "bf16"},
}
"""Arms of OpenVINO, which counts for itself if asked to, and the options that they are made with."""

CATEGORIES = (
    ("attention", r"attention|flash|fmha|sdpa|softmax"),
    ("convolution", r"conv|winograd|implicit_gemm|cudnn.*(fprop|xmma)|nhwc|nchw"),
    ("matrix product", r"gemm|matmul|fullyconnected|addmm|::mm|::bmm|linear|cutlass|cublas|nvjet|xmma|wgmma"),
    ("copy and fill", r"memcpy|memset|copy|fill|clone|contiguous|::to\b|cat|reorder"),
    ("normalisation", r"norm|welford|var_mean|moments|^mvn"),
    ("fused by Inductor", r"^triton_|cpp_fused|torch-compiled"),
    ("elementwise", r"^subgraph|elementwise|vectorized|silu|gelu|add|mul|div|sigmoid|exp|pow|sub\b"),
    (
        "views and allocation",
        r"view|reshape|empty|as_strided|expand|transpose|permute|slice|split|select|unsqueeze|::t\b",
    ),
)
"""By kernel or operator name; the first that matches."""


@dataclass(frozen=True)
class Profile:
    """One step of one arm."""

    case: Case
    step: str
    unprofiled_ms: float
    """The same call without the profiler: the median of five runs."""
    calls: CallProfile
    environment: dict[str, Any]

    def categories(self) -> dict[str, tuple[int, float]]:
        """(kernels, seconds) by category, longest first."""
        counts: defaultdict[str, int] = defaultdict(int)
        seconds: defaultdict[str, float] = defaultdict(float)
        for kernel in self.calls.kernels:
            counts[category(kernel.name)] += kernel.count
            seconds[category(kernel.name)] += kernel.seconds
        return {name: (counts[name], seconds[name]) for name in sorted(seconds, key=lambda name: -seconds[name])}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "gaps": self.calls.gaps,
            "categories": {name: dict(count=c, seconds=s) for name, (c, s) in self.categories().items()},
        }


def category(name: str) -> str:
    """What kind of work a kernel or operator does, as far as its name tells."""
    lowered = name.lower()
    return next((label for label, pattern in CATEGORIES if re.search(pattern, lowered)), "other")


def profile_step(case: Case, arm: Arm, step: str) -> Profile:
    """Profile the second full or the first shallow step after it, in a run that has warmed up.

    Raises:
        ValueError: the arm does not apply to the case, or has no such step.
    """
    refusal = arm.refuse(case)
    if refusal is not None:
        raise ValueError(f"{arm.name} does not apply to {case.model}: {refusal}")
    if step == "shallow" and (not arm.caches or case.interval == 1):
        raise ValueError(f"{arm.name} at interval {case.interval} has no shallow step")
    if arm.name in COUNTED:
        arm = replace(
            arm, prepare=partial(prepare_ours, backend="openvino", options={"PERF_COUNT": True}, **COUNTED[arm.name])
        )
    subject = Subject(case)
    stage = Stage(subject, decode=False)
    with tempfile.TemporaryDirectory() as caches:
        prepared, _ = set_up(arm, stage, case.interval, Path(caches, arm.name), Settings(details=False))
        prepared.set_interval(case.interval)
        steps = case.interval + 2
        index = case.interval + (step == "shallow")
        times = []
        for _ in range(5):
            timer = StepTimer(subject.device)
            subject.denoise(prepared.unet, prepared.scheduler, steps, timer)
            times.append(timer.seconds()[index])
        middle = sorted(times)[len(times) // 2]
        program = openvino_program(prepared.unet, step)
        if program is not None:  # it has made a run: its counters are of the last such step
            calls = node_profile(program.node_times(), times[-1])
        else:
            profiler = CallProfiler(subject.device, (index,))
            subject.denoise(prepared.unet, prepared.scheduler, steps, profiler)
            calls = profiler.profiles[index]
        prepared.close()
    return Profile(case, step, middle * 1e3, calls, environment(case.device))


def openvino_program(unet: torch.nn.Module, step: str) -> OpenVINOProgram | None:
    """What a kind of step is run by, where that is OpenVINO."""
    runtime = runtime_of(unet)
    for entry in runtime._entries.values() if runtime is not None else ():
        program = entry.compiled.called.compilation.programs[step]
        program = program.program if isinstance(program, Checked) else program
        if isinstance(program, OpenVINOProgram):
            return program
    return None


def tables(profile: Profile, top: int) -> list[Table]:
    """Time by category, and the kernels that take longest."""
    calls = profile.calls
    total = sum(kernel.seconds for kernel in calls.kernels) or 1.0
    case = profile.case
    summary = Table(
        title=f"{case.arm}, {profile.step} step of {case.model} {case.height}x{case.width}: "
        f"{profile.unprofiled_ms:.3f} ms; under the profiler {calls.span * 1e3:.3f} ms, of which busy "
        f"{calls.busy * 1e3:.3f} ms, gaps {calls.gaps * 1e3:.3f} ms; {calls.count} kernels, {calls.launches} launches"
    )
    details = Table(title=f"the {top} longest")
    for grid, first in ((summary, "category"), (details, "kernel or operator")):
        for heading in (first, "count", "ms", "%"):
            grid.add_column(heading, justify="left" if heading == first else "right", overflow="fold")
    for name, (count, seconds) in profile.categories().items():
        summary.add_row(name, str(count), f"{seconds * 1e3:.3f}", f"{seconds / total:.1%}")
    for kernel in calls.kernels[:top]:
        details.add_row(
            kernel.name[:90], str(kernel.count), f"{kernel.seconds * 1e3:.3f}", f"{kernel.seconds / total:.1%}"
        )
    return [summary, details]


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "sd15",
    arm: Annotated[str, typer.Option(help="As in benchmarks.speed; the fastest of ours where left out.")] = "",
    step: Annotated[str, typer.Option(help="full or shallow.")] = "shallow",
    interval: Annotated[int, typer.Option(min=1)] = 3,
    branch: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    latent: Annotated[str, typer.Option(help="Latent size: 64, 72x128 or published.")] = "",
    dtype: Annotated[str, typer.Option()] = "",
    device: Annotated[str, typer.Option()] = "",
    backend: Annotated[str, typer.Option()] = "inductor",
    top: Annotated[int, typer.Option(help="How many kernels to list.")] = 25,
    json: Annotated[Path | None, typer.Option(help="Keep every kernel in this file.")] = None,
) -> None:
    """Print a table of where one step's time goes: kernels, launches, gaps."""
    quiet()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = sensible(where)
    arms = all_arms(backend)
    name = arm or ("ours-eager" if where.type == "cpu" else "ours-cuda-graphs")
    if name not in arms:
        raise typer.BadParameter(f"no such arm: {name}; there are: {', '.join(arms)}")
    if step not in ("full", "shallow"):
        raise typer.BadParameter(f"--step takes full or shallow, got {step!r}")
    if model not in KINDS:
        raise typer.BadParameter(f"no such model: {model}; there are: {', '.join(KINDS)}")
    height, width = latent_size(latent or default.latent, model)
    case = Case(model, height, width, batch, dtype or default.dtype, str(where), interval + 2, interval, branch, name)
    try:
        profile = profile_step(case, arms[name], step)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for grid in tables(profile, top):
        Console(width=120).print(grid)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(jsonlib.dumps(profile.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
