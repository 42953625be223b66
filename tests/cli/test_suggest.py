"""`deepcache-fx suggest`: values with sources and bounds, or that a cache is not for the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepcache_fx.cards.table import CARDS
from deepcache_fx.cli.suggest import suggest_command
from tests import small


def test_it_tells_values_sources_and_bounds_of_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.pipeline().save_pretrained(tmp_path / "model")
    suggest_command(str(tmp_path / "model"), tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["family"], found["few_steps"]) == ("other", None)
    assert list(found["presets"]) == ["fast", "balanced", "close"]
    for name, row in found["presets"].items():
        assert row["source"] == CARDS["other"].choices[name].source
        assert 1 < row["speedup_bound"] < row["interval"]
    text = capsys.readouterr().out
    assert "balanced" in text
    assert "docs/fidelity.md" in text


def test_a_model_for_few_steps_should_not_be_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.pipeline().save_pretrained(tmp_path / "tiny-turbo")
    suggest_command(str(tmp_path / "tiny-turbo"))
    assert "do not use it" in capsys.readouterr().out
