"""The house: rooms import one way, and each says what it is. `make check` holds the contracts; these can fail."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deepcache_fx"
ROOMS = sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))


def lint(where: Path) -> str:
    """What import-linter says of the packages in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=where, capture_output=True, text=True, timeout=300, check=False
    )
    return re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of both packages and of their contracts."""
    for name in ("deepcache_fx", "passes", "comfyui"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_one_way(house: Path) -> None:
    assert " 0 broken." in lint(house)


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("deepcache_fx/graph/macs.py", "from deepcache_fx.runtime import steps", "graph is not allowed to import"),
        ("deepcache_fx/graph/macs.py", "def f():\n    import deepcache_fx.controlnet.ControlNet", "graph.macs ->"),
        (
            "deepcache_fx/runtime/steps.py",
            "import deepcache_fx.controlnet.deferred",
            "runtime is not allowed to import",
        ),
        ("deepcache_fx/calibration/search.py", "import deepcache_fx.planning.plan", "calibration.search ->"),
        (
            "deepcache_fx/calibration/search.py",
            "from deepcache_fx import optimize",
            "calibration.search -> deepcache_fx",
        ),
        ("deepcache_fx/schedules/branch.py", "def f():\n    import torch", "schedules.branch -> torch"),
        ("deepcache_fx/planning/plan.py", "import rich", "planning.plan -> rich"),
        ("deepcache_fx/extra.py", "", "deepcache_fx.extra"),
        ("passes/shared/match.py", "import deepcache_fx.errors", "passes.shared.match -> deepcache_fx.errors"),
        ("passes/merge_equal.py", "import passes.canonicalize", "passes.merge_equal -> passes.canonicalize"),
        ("passes/shared/match.py", "import passes.runner", "passes.shared is not allowed to import"),
        (
            "comfyui/run.py",
            "def f():\n    from deepcache_fx.runtime import steps",
            "comfyui.run -> deepcache_fx.runtime",
        ),
        ("comfyui/run.py", "import passes", "comfyui.run -> passes"),
        ("deepcache_fx/api.py", "import comfyui.run", "deepcache_fx.api -> comfyui.run"),
    ],
)
def test_an_import_the_other_way_breaks_a_contract(house: Path, file: str, line: str, complaint: str) -> None:
    with (house / file).open("a") as out:
        out.write(f"\n{line}\n")
    said = lint(house)
    assert complaint in said, said
    assert " 0 broken." not in said


def test_the_top_of_the_package_is_its_front_door() -> None:
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "api.py", "errors.py", "options.py"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_says_what_it_does_what_it_may_import_and_where_to_start(room: Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert text is not None
    _, may, start = [line for line in text.splitlines() if line]
    assert may.startswith("May import: ")
    names = re.findall(r"`(\w+)\.(\w+)", start.removeprefix("Start reading at "))
    assert names
    for module, name in names:
        assert re.search(rf"^((class|def) )?{name}\b", (room / f"{module}.py").read_text(), re.MULTILINE), (
            module,
            name,
        )


def test_tests_mirror_the_rooms() -> None:
    tested = {file.parent.name for file in (ROOT / "tests").glob("*/__init__.py")}
    assert tested <= {room.name for room in ROOMS} | {"passes", "benchmarks", "comfyui", "whole"}
