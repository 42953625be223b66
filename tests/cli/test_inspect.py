"""`deepcache-fx inspect`: what is in a directory of programs, and one line where it is not what its manifest says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deepcache_fx import DeepCacheError
from deepcache_fx.artefacts.manifest import Program, add_program, described
from deepcache_fx.cli.inspect import print_programs

CONTENT = b"{}" * 2**19


def _write(directory: Path, key: bytes | None = None) -> None:
    made_for = {"device": "cpu x86_64", "model settings": "0123456789abcdef" * 4, "package xformers": "none"}
    program = Program({"a.json": described(CONTENT)}, made_for, {"branch": 0}, "2x4x8x8, scalar")
    add_program(directory, {"a.json": CONTENT}, program, key)


def _printed(directory: Path, key: bytes | None = None) -> str:
    output = io.StringIO()
    print_programs(directory, key=key, console=Console(file=output, width=80))
    return output.getvalue()


def test_it_tells_inputs_sizes_and_what_programs_were_made_for(tmp_path: Path) -> None:
    _write(tmp_path)
    lines = _printed(tmp_path).splitlines()
    assert lines == [
        f"{tmp_path}: 1 program, every file as the manifest says",
        "",
        "2x4x8x8, scalar: 1 file, 1.00 MiB",
        "  device: cpu x86_64",
        "  model settings: 0123456789ab (digest)",
        "  optimize: branch=0",
    ]


def test_it_says_whether_a_signature_was_checked(tmp_path: Path) -> None:
    _write(tmp_path, b"secret")
    assert "signature checked" in _printed(tmp_path, b"secret")
    assert "signed, not checked: no key" in _printed(tmp_path)
    with pytest.raises(DeepCacheError, match="not signed with this key"):
        _printed(tmp_path, b"other")


def test_everything_is_written_as_json(tmp_path: Path) -> None:
    _write(tmp_path / "p")
    print_programs(tmp_path / "p", json=tmp_path / "out.json", console=Console(file=io.StringIO()))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["programs"][0]["files"]["a.json"] == described(CONTENT)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest"])
def test_damage_is_an_error(tmp_path: Path, damage: str) -> None:
    _write(tmp_path)
    if damage == "truncated":
        (tmp_path / "a.json").write_bytes(CONTENT[:-1])
    else:
        (tmp_path / ("a.json" if damage == "missing" else "manifest.json")).unlink()
    with pytest.raises(DeepCacheError, match=r"truncated or changed|cannot be read|holds no programs"):
        _printed(tmp_path)
