"""CUDA programs compiled without a device. What pretends that there is one stays in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.codegen.cases import own_cases
from benchmarks.codegen.devices import DEVICES, LAUNCH_SECONDS
from benchmarks.codegen.launches import Launch
from benchmarks.codegen.machine import AMD, Compiled, NormCase, compile_own
from benchmarks.codegen.pretend import why_not
from benchmarks.codegen.results import HEADING, Step, draw, markdown, read, write
from tests.families import thorough

reason = why_not()
needs_compilers = pytest.mark.skipif(reason is not None, reason=str(reason))

SHALLOW = (
    Launch("triton", "triton_poi_0", "add+mul", 48_000_000, 0),
    Launch("conv", "convolution", "convolution", 4_800, 98_900_000_000, hidden_bytes=9_600),
    Launch("mm", "mm.out", "mm.out", 48, 0),
)
STEP = Step("tiny", "shallow", "sm_90", (), "2x4x8x8", "fp16", SHALLOW, 1, (Compiled("k", "sm_90", "", 40, 8, 0),))


def generated(*arguments: str, folder: Path) -> Any:
    """What `python -m benchmarks.codegen` writes."""
    path = folder / "codegen.json"
    command = [sys.executable, "-m", "benchmarks.codegen", *arguments, "--json", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_the_floor_of_a_launch_is_its_roof_or_the_time_of_a_launch() -> None:
    h200 = DEVICES["sm_90"]
    pointwise, conv, small = SHALLOW
    assert pointwise.floor(h200) == pointwise.roof(h200) == pytest.approx(10e-6)
    assert conv.roof(h200) == pytest.approx(100e-6)
    assert conv.floor(h200) == pytest.approx(100e-6 + LAUNCH_SECONDS), "the copy of a weight is a launch, too"
    assert small.floor(h200) == LAUNCH_SECONDS
    assert STEP.floor() == pytest.approx(114e-6)


def test_a_file_and_its_picture_say_that_nothing_ran(tmp_path: Path) -> None:
    write([STEP], {"environment": {}}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["heading"] == HEADING
    assert read(tmp_path / "a.json") == [STEP]
    draw([STEP], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert "| 3 | 1 | 0 | 1 | 1 | 0 | 0 | 1 | 48 |" in markdown([STEP])


@needs_compilers
def test_a_kernel_of_ours_compiles_for_a_gpu() -> None:
    [only] = compile_own([NormCase(320, 8, addend=True)], ["sm_90"])
    assert (only.kernel, only.arch, only.spilled_bytes) == ("whole_groups", "sm_90", 0)
    assert 16 <= only.registers <= 255


@needs_compilers
@thorough
def test_every_kernel_of_ours_compiles_for_every_architecture_without_spills() -> None:
    found = list(compile_own(own_cases(), [*DEVICES, AMD]))
    assert {one.arch for one in found} == {*DEVICES, AMD}
    assert {one.kernel for one in found} == {"statistics", "normalize", "whole_groups"}
    assert [one for one in found if one.spilled_bytes] == []


@needs_compilers
@thorough
@pytest.mark.parametrize("step", ["shallow", "full"])
def test_every_kernel_of_the_tiny_unet_has_a_configuration_that_does_not_spill(step: str, tmp_path: Path) -> None:
    """Inductor leaves out those that do, of the configurations that it times."""
    archs = ",".join(("sm_90", "sm_80", "sm_100"))
    [found] = generated("--model", "tiny", "--step", step, "--arch", archs, folder=tmp_path)["steps"]
    spilled = defaultdict(list)
    for one in found["compiled"]:
        spilled[one["kernel"], one["arch"]].append(one["spilled_bytes"])
    kernels = {launch["name"] for launch in found["launches"] if launch["kind"] == "triton"}
    assert set(spilled) == {(kernel, arch) for kernel in kernels for arch in DEVICES}
    assert [kernel for kernel, spills in spilled.items() if min(spills)] == []


@needs_compilers
@thorough
@pytest.mark.parametrize(("passes", "launches", "megabytes"), [("", 50, 535), ("fuse-group-norm", 43, 522)])
def test_the_shallow_step_of_sd15_fuses_no_less_than_it_did(
    passes: str, launches: int, megabytes: int, tmp_path: Path
) -> None:
    arguments = ("--model", "sd15", "--step", "shallow", "--no-compile", "--passes", passes)
    [found] = generated(*arguments, folder=tmp_path)["steps"]
    summary = found["summary"]
    assert summary["launches"] <= launches
    assert summary["megabytes"] <= megabytes
    assert summary["gflop"] == pytest.approx(2 * found["macs"] / 1e9, rel=0.01), "every layer is counted, once"
