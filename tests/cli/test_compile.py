"""`deepcache-fx compile`: programs ahead of time, for several sizes and batches; a later process captures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepcache_fx
from deepcache_fx.cli.compile import Shape, compile_programs, read_size
from deepcache_fx.comparing import loading
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.runtime.attach import runtime_of
from tests import small
from tests.command import refused, run
from tests.families import thorough

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "fashion-t2i"
ARGUMENTS = ("--backend", "eager", "--guidance-scale", "4")

_PROCESS = """
import json, sys, torch; torch.set_num_threads(1)
import deepcache_fx
from deepcache_fx.comparing.loading import load_pipeline
pipe = load_pipeline(sys.argv[1], dtype=torch.float32, device=torch.device("cpu"))
deepcache_fx.optimize(pipe, interval=2, backend="eager", programs=sys.argv[2])
for width, height, batch in ((32, 32, 2), (40, 32, 2), (32, 32, 1)):
    size = {"width": width, "height": height}
    pipe(["a boot"] * batch, **size, num_inference_steps=4, guidance_scale=3.0, output_type="latent")
report = deepcache_fx.report(pipe)
print(json.dumps([report.captures, report.last_run, sorted(str(item.source) for item in report.signatures)]))
"""


@thorough
def test_another_process_captures_only_what_was_not_compiled(tmp_path: Path) -> None:
    out = tmp_path / "programs"
    shapes = ("--size", "32x32", "--size", "40x32", "--batch", "2")
    code, output, error = run("compile", "--model", str(MODEL), "--out", str(out), *shapes, *ARGUMENTS)
    assert (code, error) == (0, "")
    assert output.startswith(f"{out}: 2 programs, every file as the manifest says")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _PROCESS, str(MODEL), str(out)]
    found = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    captures, last_run, sources = json.loads(found.stdout.splitlines()[-1])
    assert (captures, last_run) == (1, "FsFs")  # a batch of one was not asked for
    assert sources.count(str(out)) == 2


@thorough
def test_a_second_time_adds_what_is_new_and_a_pipeline_is_plain_afterwards(tmp_path: Path) -> None:
    pipe = loading.load_pipeline(str(MODEL), dtype=torch.float32, device=torch.device("cpu"))
    options = {"interval": 3, "backend": "eager"}
    for shapes in ([Shape(None, 1)], [Shape(None, 1), Shape((40, 32), 1)]):
        assert compile_programs(pipe, shapes, tmp_path, optimize_arguments=options) == []
        assert runtime_of(pipe.unet) is None
    assert len(deepcache_fx.ProgramDirectory(tmp_path).check().programs) == 2


@thorough
def test_a_key_in_the_environment_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCACHE_FX_KEY", "secret")
    code, output, _ = run("compile", "--model", str(MODEL), "--out", str(tmp_path), *ARGUMENTS)
    assert code == 0
    assert "signature checked" in output
    assert deepcache_fx.ProgramDirectory(tmp_path).check().is_signed


@thorough
def test_a_pipeline_that_cannot_be_captured_is_an_error_with_the_reason(tmp_path: Path) -> None:
    pipe = loading.load_pipeline(str(MODEL), dtype=torch.float32, device=torch.device("cpu"))
    pipe.unet.register_forward_hook(lambda module, args, output: None)
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(DeepCacheError, match=r"no programs were made: .*hook"):
        compile_programs(
            pipe,
            [Shape(None, 1)],
            tmp_path,
            optimize_arguments={"interval": 3, "backend": "eager", "on_failure": "uncached"},
        )
    assert runtime_of(pipe.unet) is None


@pytest.mark.parametrize("text", ["512", "512x", "0x512", "-8x8", "512*512", ""])
def test_what_is_no_size_is_refused(text: str, tmp_path: Path) -> None:
    refused(["compile", "--model", str(MODEL), "--out", str(tmp_path), "--size", text], "no width and height in pixels")


def test_sizes_are_width_times_height() -> None:
    assert read_size("768x512") == (768, 512)
    assert str(Shape((768, 512), 2)) == "768x512, batch 2"


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(["compile", "--model", str(MODEL), "--out", str(tmp_path / "file")], "is a file")
    refused(["compile", "--model", str(tmp_path), "--out", str(tmp_path / "p")], "holds no pipeline")
    refused(["compile", "--model", str(MODEL), "--out", str(tmp_path / "p"), "--batch", "0"], "--batch")
    refused(["compile", "--model", str(MODEL), "--out", str(tmp_path / "p"), "--on", "abacus"], "abacus")
    assert not (tmp_path / "p").exists()


def test_a_pipeline_that_takes_no_size_says_so(tmp_path: Path) -> None:
    pipe = small.pipeline()
    pipe.__class__ = type("Sizeless", (type(pipe),), {"__call__": lambda self, prompt, num_inference_steps=1: None})
    with pytest.raises(DeepCacheError, match="Sizeless does not take generator, height, width"):
        compile_programs(pipe, [Shape((64, 64), 1)], tmp_path, optimize_arguments={})
