"""Run what `make demo` runs and keep it: the README's picture, and its figures with device, versions and commit.

python -m benchmarks.demo
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT, environment
from deepcache_fx.files.writing import write_json

MODEL = "benchmarks/models/fashion-t2i"
PICTURE = ROOT / "docs" / "demo.png"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        arguments = ["compare", "--model", MODEL, "--guidance-scale", "4", "--device", "cpu"]
        program = [sys.executable, "-c", "from deepcache_fx.cli.app import main; main()"]
        subprocess.run([*program, *arguments, "--out", PICTURE, "--json", figures], cwd=ROOT, check=True)
        found = json.loads(figures.read_text())
    compared = " ".join(["deepcache-fx", *arguments])
    write_json(RESULTS / "demo-cpu.json", {"environment": environment("cpu"), "compared": compared, **found})


if __name__ == "__main__":
    main()
