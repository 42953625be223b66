"""benchmarks/gpu.sh, as far as it can be tried where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.codegen.launches import Launch
from benchmarks.codegen.results import Step, write
from tests.families import thorough

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "DRY": "1", "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", str(SCRIPT), str(out)], capture_output=True, text=True, env=variables)


@thorough
def test_a_dry_run_leaves_every_kind_of_result_and_the_table_of_targets(tmp_path: Path) -> None:
    launch = Launch("conv", "convolution", "convolution", 1_000_000, 1_000_000)
    step = Step("tiny", "shallow", "sm_90", (), "2x4x8x8", "fp16", (launch,), 500_000)
    write([step], {}, tmp_path / "codegen.json")
    out = tmp_path / "out"
    done = run(out, CODEGEN=str(tmp_path / "codegen.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((out / "speed.json").read_text())
    arms = {(row["case"]["arm"], row["case"]["interval"]): row["status"] for row in rows}
    assert arms["ours-eager", 2] == arms["ours-eager", 3] == arms["eager", 1] == "measured"
    assert (out / "kernels.json").exists()
    assert "SKIPPED" in (out / "logs" / "gpu-tests.log").read_text()
    assert "conv" in (out / "logs" / "beside-tiny.log").read_text()
    assert "| cuda | sd15 |" in (out / "targets.md").read_text()


def test_parts_that_fail_are_named_and_the_table_of_targets_comes_all_the_same(tmp_path: Path) -> None:
    done = run(tmp_path, PYTHON="false")
    assert done.returncode == 1
    assert "not done: speed-tiny (exit 1)" in done.stdout
    assert "-- targets" in done.stdout


def test_nothing_is_begun_when_no_time_is_left(tmp_path: Path) -> None:
    done = run(tmp_path, PYTHON="false", MINUTES="0")
    assert "-- speed-tiny: no time left" in done.stdout
    assert "-- targets (at most" in done.stdout
