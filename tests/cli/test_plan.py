"""The `plan` command: what is printed, what is written, and errors of one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepcache_fx import DeepCacheError
from deepcache_fx.cli.plan import print_plan
from deepcache_fx.planning.plan import Plan, giga
from tests.models import sd_pipeline, sd_unet

SMALL = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pipeline"
    sd_pipeline(sd_unet(**SMALL)).save_pretrained(path)
    return path


def run(model: str | Path, **options: Any) -> tuple[Plan, str]:
    output = io.StringIO()
    return print_plan(str(model), console=Console(file=output, width=80), **options), output.getvalue()


def test_a_preset_is_printed_as_a_table_that_fits_a_terminal() -> None:
    found, text = run("ddpm-cifar10", intervals=(3, 7))
    assert found.inputs == "sample 1x3x32x32, timestep scalar"
    assert found.dtype == "float16"
    assert "google/ddpm-cifar10-32" in text
    words = [line.split() for line in text.splitlines()]
    branch = found.branches[2]
    assert branch.hoisted.total < branch.shallow.total
    hoisted = [giga(branch.hoisted.total), f"{branch.hoisted_cache_bytes / 2**20:.2f}"]
    bounds = [f"{branch.speedup(3):.2f}", f"{branch.speedup(7):.2f}"]
    row = ["2", "0/2", "6.222", "2.239", "36.0%", "0.50", *hoisted, *bounds]
    assert row in words
    assert [line[0] for line in words if len(line) == len(row) and "/" in line[1]] == [str(n) for n in range(12)]
    assert "without attention products: full 6.054 GMAC; shallow, by branch: 0.4940, 1.283," in text


def test_a_pipelines_directory_is_planned_without_reading_weights(pipeline: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for name in ("model_index.json", "unet/config.json", "vae/config.json"):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_text((pipeline / name).read_text())
    report = tmp_path / "plan.json"
    found, text = run(bare, dtype="float32", json=report)
    assert found.model == "UNet2DConditionModel"
    assert found.inputs.startswith("sample 2x4x8x8, timestep scalar, encoder_hidden_states 2x77x16")
    assert [branch.cache_bytes for branch in found.branches] == [
        4 * 2 * n for n in (16 * 64, 32 * 64, 32 * 16, 32 * 16)
    ]
    assert "N=10" in text
    assert json.loads(report.read_text()) == {"name": str(bare), **found.to_dict()}


def test_a_unets_directory_takes_sizes_of_its_input(tmp_path: Path) -> None:
    sd_unet(**SMALL).save_config(tmp_path)
    found, _ = run(tmp_path, height=16, width=8, batch=1)
    assert found.inputs.startswith("sample 1x4x16x8,")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_captured(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "plan.json"):
        with pytest.raises(DeepCacheError, match="cannot be written"):
            print_plan("sd15", json=path)
