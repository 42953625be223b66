"""Programs on disk: a second process captures nothing and gives the same bits; what does not fit is refused."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.artefacts.manifest import Program, add_program, described, read_manifest, sealed
from deepcache_fx.runtime.attach import runtime_of
from tests import models, small
from tests.families import examples, thorough

CALL: dict[str, Any] = dict(return_dict=False)


def _unet(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.sd_unet(**{**small.LEVELS, **changes}).eval()


def _steps(unet: torch.nn.Module, count: int = 4, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        for t in range(count, 0, -1):
            x = x - 0.1 * unet(x, torch.tensor(t * 100), text, **CALL)[0]
    return x


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A directory of programs, and what their process made with them."""
    unet = _unet()
    deepcache_fx.optimize(unet, interval=2)
    image = _steps(unet)
    directory = tmp_path_factory.mktemp("programs") / "p"
    deepcache_fx.save(unet, directory)
    return directory, image


def test_loaded_programs_capture_nothing_and_give_the_same_bits(saved: tuple[Path, torch.Tensor]) -> None:
    directory, image = saved
    unet = deepcache_fx.load(_unet(), directory)
    assert torch.equal(_steps(unet), image)
    report = deepcache_fx.report(unet)
    assert report.captures == 0
    assert [item.source for item in report.signatures] == [str(directory)]
    assert report.shallow_calls == 2


_PROCESS = """
import sys, torch; torch.set_num_threads(1)
from typing import Any
from diffusers import UNet2DConditionModel
from deepcache_fx.execution import openvino; openvino.is_available = lambda: False
import deepcache_fx
unet = UNet2DConditionModel.from_pretrained(sys.argv[2])
if "save" in sys.argv:
    built = UNet2DConditionModel.from_config(unet.config).eval()
    built.load_state_dict(unet.state_dict())
    image = _steps(deepcache_fx.optimize(built, interval=2))
    deepcache_fx.save(built, sys.argv[1])
else:
    image = _steps(deepcache_fx.load(unet, sys.argv[1]))
    assert deepcache_fx.report(unet).captures == 0, deepcache_fx.report(unet)
torch.save(image, sys.argv[3])
"""


@thorough
def test_another_process_gives_the_same_bits(tmp_path: Path) -> None:
    """It has other hashes and another working directory, and its model comes from a file, where the first is built."""
    directory, model, out = tmp_path / "programs", tmp_path / "unet", tmp_path / "image.pt"
    _unet().save_pretrained(model)
    code = _PROCESS.replace(
        "import deepcache_fx\n", f"import deepcache_fx\nCALL = {CALL}\n{inspect.getsource(_steps)}\n"
    )
    images = []
    for seed, what in (("1", "save"), ("12345", "load")):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(directory), str(model), str(out), what]
        place = tmp_path / what
        place.mkdir()
        subprocess.run(command, check=True, cwd=place, env=environment)
        images.append(torch.load(out, weights_only=True))
    assert torch.equal(*images)


def test_other_weights_are_those_of_the_loaded_model(saved: tuple[Path, torch.Tensor]) -> None:
    directory, _ = saved
    other, plain = _unet(), _unet()
    for unet in (other, plain):
        torch.manual_seed(7)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, 0, 0.05)
    deepcache_fx.load(other, directory)
    deepcache_fx.optimize(plain, interval=2)
    assert torch.equal(_steps(other), _steps(plain))


def test_programs_are_made_once_and_then_loaded(tmp_path: Path) -> None:
    first, second = _unet(), _unet()
    deepcache_fx.optimize(first, programs=tmp_path / "p")
    deepcache_fx.optimize(second, programs=tmp_path / "p")
    assert torch.equal(_steps(first), _steps(second))
    assert (deepcache_fx.report(first).captures, deepcache_fx.report(second).captures) == (1, 0)


@thorough
def test_a_changed_setting_is_captured_anew(saved: tuple[Path, torch.Tensor]) -> None:
    directory, _ = saved
    unet = _unet()
    deepcache_fx.load(unet, directory)
    unet.up_blocks[0].resnets[0].output_scale_factor = 2.0
    _steps(unet)
    assert deepcache_fx.report(unet).captures == 1


def test_another_model_is_refused_with_what_differs(saved: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(DeepCacheError, match=r"model configuration is another.*programs= to optimize"):
        deepcache_fx.load(_unet(block_out_channels=(8, 24)), saved[0])
    with pytest.raises(DeepCacheError, match="dtypes is another"):
        deepcache_fx.load(_unet().to(torch.bfloat16), saved[0])


@pytest.mark.parametrize("name", ["package torch", "package deepcache-fx", "device", "model class"])
def test_other_versions_and_devices_are_refused_by_name(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, name: str
) -> None:
    text = json.loads((saved[0] / "manifest.json").read_text())
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text["programs"][0]["made_for"][name] = "another"
    (tmp_path / "manifest.json").write_bytes(sealed(text))
    with pytest.raises(DeepCacheError, match=f"{name}: made for another, here"):
        deepcache_fx.load(_unet(), tmp_path)


@thorough
def test_a_pass_of_the_users_is_not_written(tmp_path: Path) -> None:
    unet = _unet()
    deepcache_fx.optimize(unet, passes=[lambda graph: None])
    _steps(unet)
    with pytest.raises(DeepCacheError, match="pass"):
        deepcache_fx.save(unet, tmp_path)


def test_a_key_makes_changes_evident(tmp_path: Path) -> None:
    unet = _unet()
    deepcache_fx.optimize(unet)
    _steps(unet)
    deepcache_fx.save(unet, tmp_path, key=b"secret")
    deepcache_fx.load(_unet(), tmp_path, key=b"secret")
    with pytest.raises(DeepCacheError, match="not signed with this key"):
        deepcache_fx.load(_unet(), tmp_path, key=b"other")


@examples(25)
@given(which=st.integers(0, 10), place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_files_are_never_run(
    saved: tuple[Path, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
    which: int,
    place: float,
    byte: int,
    cut: bool,
) -> None:
    directory, image = saved
    copy = tmp_path_factory.mktemp("copy")
    files = sorted(file for file in directory.iterdir() if not file.name.startswith("."))
    for number, file in enumerate(files):
        content = bytearray(file.read_bytes())
        if number == which % len(files):
            at = int(place * (len(content) - 1))
            content = content[:at] if cut else content[:at] + bytes([byte]) + content[at + 1 :]
        (copy / file.name).write_bytes(content)
    unet = _unet()
    try:
        deepcache_fx.load(unet, copy)
    except DeepCacheError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _steps(unet)
    assert deepcache_fx.report(unet).captures == 0
    assert torch.equal(found, image)


@thorough
def test_an_optimised_model_adds_what_it_has_and_later_keeps_no_directory(tmp_path: Path) -> None:
    unet = _unet()
    deepcache_fx.optimize(unet)
    _steps(unet)
    deepcache_fx.optimize(unet, programs=tmp_path / "p")
    assert len(read_manifest(tmp_path / "p").programs) == 1
    deepcache_fx.optimize(unet)
    _steps(unet, size=16)
    assert deepcache_fx.report(unet).captures == 2
    assert len(read_manifest(tmp_path / "p").programs) == 1
    deepcache_fx.optimize(unet, interval=5, programs=tmp_path / "p")  # the same programs under another schedule
    assert len(read_manifest(tmp_path / "p").programs) == 2


class _Noting(UNet2DConditionModel):
    """Writes down at its first call what the second one reads."""

    offset: float | None = None

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = UNet2DConditionModel.forward(self, sample, *args, **kwargs)  # super() is a closure: never written
        found = result[0] + (self.offset or 0.0)
        self.offset = 1.0
        return (found,)


def test_what_a_first_forward_changes_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = _Noting(**dict(_unet().config)).eval()
    deepcache_fx.optimize(unet, programs=tmp_path)
    with pytest.warns(UserWarning, match="its first forward changed the model's settings"):
        _steps(unet, count=1)
    assert not (tmp_path / "manifest.json").exists()


@thorough
def test_graphs_for_many_sizes_are_refused_and_sizes_are_written_each(tmp_path: Path) -> None:
    unet = _unet()
    deepcache_fx.optimize(unet, dynamic="auto")
    _steps(unet)
    deepcache_fx.save(unet, tmp_path)
    _steps(unet, size=16)
    with pytest.raises(DeepCacheError, match=r"many sizes.*dynamic=False"):
        deepcache_fx.save(unet, tmp_path)
    other = deepcache_fx.load(_unet(), tmp_path)
    _steps(other)
    assert deepcache_fx.report(other).captures == 0
    with pytest.warns(UserWarning, match="captured anew"):
        _steps(other, size=16)
    assert any("many sizes" in line for line in deepcache_fx.report(other).sizes)


def test_a_signed_directory_takes_no_programs_without_its_key(tmp_path: Path) -> None:
    for name in "ab":
        add_program(tmp_path, {f"{name}.json": b"{}"}, _program(name), b"secret")
    with pytest.raises(DeepCacheError, match="is signed: pass its key"):
        add_program(tmp_path, {"c.json": b"{}"}, _program("c"))
    manifest = read_manifest(tmp_path, b"secret")
    assert (manifest.is_signed, [item.inputs for item in manifest.programs]) == (True, ["a", "b"])


def test_a_directory_of_another_format_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(sealed({"format": "deepcache_fx programs 9", "programs": []}))
    with pytest.raises(DeepCacheError, match="of the format 'deepcache_fx programs 9'"):
        add_program(tmp_path, {"c.json": b"{}"}, _program("c"))


def test_a_damaged_manifest_is_replaced(tmp_path: Path) -> None:
    add_program(tmp_path, {"a.json": b"{}"}, _program("a"))
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    add_program(tmp_path, {"b.json": b"{}"}, _program("b"))
    assert [item.inputs for item in read_manifest(tmp_path).programs] == ["b"]


def _program(name: str) -> Program:
    return Program({f"{name}.json": described(b"{}")}, {"call": name}, {}, name)


def test_every_node_of_a_loaded_graph_has_a_value_of_its_own(saved: tuple[Path, torch.Tensor]) -> None:
    """OpenVINO's way traces the graph again, and would take inputs that share one for the same."""
    unet = deepcache_fx.load(_unet(), saved[0])
    _steps(unet, count=1)
    runtime = runtime_of(unet)
    assert runtime is not None
    [(_, entry)] = runtime.made(unet)
    found = [node.meta["val"] for node in entry.variants.full.step.graph.find_nodes(op="placeholder")]
    found += [node.meta["val"] for node in entry.variants.full.step.graph.find_nodes(op="get_attr")]
    assert len(set(map(id, found))) == len(found) > 3
