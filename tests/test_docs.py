"""README and docs/ say what is there: links, files, tests, arguments, numbers, and code that runs."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import deepcache_fx
from benchmarks.fidelity.report import write_report
from benchmarks.speed.profiles import read_profiles
from benchmarks.speed.report import BEGIN, END, is_results, load, tables
from deepcache_fx.options import Options
from tests import small
from tests.compvis import CompVisUNet

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; "" is none."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def section(page: Path, heading: str) -> str:
    return page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


# README.


def test_the_readme_is_short_and_its_first_screen_names_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 120
    first = text.split("\n## ")[0]
    assert set(re.findall(r"^make [\w-]+|`make [\w-]+`", first, re.MULTILINE)) == {"make demo", "make test"}
    assert "pip install deepcache-fx" in first
    assert re.findall(r"!\[[^\]]*\]\((.*?)\)", text) == ["docs/demo.png"]


def test_the_readmes_five_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) == 5
    assert code in (ROOT / "docs" / "index.md").read_text()
    pipe = small.pipeline()
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda name: pipe)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["image"].size[0] > 0
    assert deepcache_fx.report(pipe).engaged


def test_the_readmes_times_are_those_of_the_results() -> None:
    saved = section(README, "What it saves")
    demo = json.loads((RESULTS / "demo-cpu.json").read_text())
    low, high = demo["speedup_range"]
    seconds = [f"{median(demo[name]):.2f} s" for name in ("baseline_seconds", "optimized_seconds")]
    spread = f"({low:.2f} to {high:.2f}; by MACs {demo['bound']:.2f})"
    assert f"| {' | '.join(seconds)} | {demo['speedup']:.2f} {spread}, PSNR {demo['psnr']:.1f} dB |" in saved
    rows = {
        (row.case.arm, row.case.interval): row for row in load([RESULTS / "speed-cpu.json"]) if row.case.height == 32
    }
    loops = {key: row.measured.loop.median for key, row in rows.items() if row.measured.loop is not None}
    for arm, error in (("ours-eager", 7e-7), ("ours-openvino", 7e-6), ("ours-openvino-bf16", 3e-2)):
        for n in (2, 3, 6):
            faster = f"{rows[arm, n].derived.over_eager:.2f}"
            assert f"1:{n} | {loops['eager', 1]:.3g} s | {loops[arm, n]:.3g} s | {faster} |" in saved
            assert (rows[arm, n].measured.error_helper or 0) < error
        over = [f"{loops['helper', n] / loops[arm, n]:.2f}" for n in (2, 3, 6)]
        assert arm.endswith("bf16") or f"{over[0]}, {over[1]} and {over[2]} times" in re.sub(r"\s+", " ", saved)
    assert f"{loops['eager-bf16', 1]:.3g} s uncached" in re.sub(r"\s+", " ", saved)
    assert "not yet measured" in saved


# All pages.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_refers_to_is_there(page: Path) -> None:
    for target in links(page):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target
    text = page.read_text()
    for path in re.findall(r"`((?:deepcache_fx|passes|tests|benchmarks|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", text):
        assert re.search(rf"def {name}", TESTS), name
    for name in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), name


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    named = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_a_page_calls_what_there_is(page: Path) -> None:
    for code in blocks(page, "python"):
        for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if not name.startswith("deepcache_fx."):
                continue
            function: Any = deepcache_fx
            for part in name.split(".")[1:]:
                function = getattr(function, part)
            given = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
            inspect.signature(function).bind(*call.args, **given)


# What pages say of the code.


def test_the_table_of_arguments_names_every_argument_with_its_default() -> None:
    table = section(ROOT / "docs" / "usage.md", "Arguments")
    told = dict(re.findall(r"`(\w+)=([^`]+)`", "\n".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE))))
    arguments = dict(inspect.signature(deepcache_fx.optimize).parameters)
    del arguments["target"]
    assert {name: ast.literal_eval(value) for name, value in told.items()} == {
        name: argument.default for name, argument in arguments.items()
    }
    assert {field.name for field in fields(Options)} <= set(told)


def test_announced_steps_run_as_the_page_writes_them() -> None:
    code = next(block for block in blocks(ROOT / "docs" / "usage.md", "python") if "deepcache_fx.begin(" in block)
    context = torch.randn(1, 3, 6)

    def sampler_step(unet: Any, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x - 0.1 * unet(x, sigma.expand(1), context)
        return x

    unet = CompVisUNet()
    names = {"deepcache_fx": deepcache_fx, "unet": unet, "sigmas": torch.linspace(9, 0, 7), "x": torch.ones(1, 4, 8, 8)}
    with torch.no_grad():
        exec(code, {**names, "sampler_step": sampler_step})
    assert deepcache_fx.report(unet).last_run == "FFssssFFssss"


# What the benchmarks write.


def test_the_page_on_fidelity_is_what_the_rows_make(tmp_path: Path) -> None:
    write_report(RESULTS, tmp_path)
    assert (tmp_path / "fidelity.md").read_text() == (ROOT / "docs" / "fidelity.md").read_text()


def test_the_tables_on_speed_are_what_the_rows_make() -> None:
    written = (ROOT / "docs" / "speed.md").read_text().split(BEGIN)[1].split(END)[0]
    written = re.sub(r"^!\[.*\n\n", "", written, flags=re.MULTILINE)
    rows = load(path for path in sorted(RESULTS.glob("*.json")) if is_results(path))
    assert written.strip() == tables(rows, {}, read_profiles(RESULTS)).strip()
