"""`optimize(dynamic=...)`: how many captures there are, and that what they give is what static ones give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.errors import CaptureError
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.runtime import runtime
from tests import models, small
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import examples, thorough
from tests.oracles import TO_THE_BIT

TIMESTEPS = torch.arange(950, 0, -190)
SIZES = [(2, 8), (2, 12), (3, 6), (2, 8)]


def optimized(**options: Any) -> CompVisUNet:
    return deepcache_fx.optimize(CompVisUNet(), **{"interval": 2, "backend": "eager", **options})


def results(unet: torch.nn.Module, sizes: list[tuple[int, int]] = SIZES) -> list[torch.Tensor]:
    return [denoise(unet, TIMESTEPS, batch=batch, size=size) for batch, size in sizes]


@pytest.fixture(scope="module")
def static() -> list[torch.Tensor]:
    return results(optimized(forecast=1))


def test_auto_captures_once_more_at_the_second_size_and_never_again(static: list[torch.Tensor]) -> None:
    unet = optimized(dynamic="auto", forecast=1)
    counts = []
    for (batch, size), expected in zip(SIZES, static, strict=True):
        found = denoise(unet, TIMESTEPS, batch=batch, size=size)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        counts.append(deepcache_fx.report(unet).captures)
    assert counts == [1, 2, 2, 2]
    report = deepcache_fx.report(unet)
    assert report.sizes == ("one capture for many sizes (at the second size): batchx4xheightxwidth, batch, batchx3x6",)
    assert report.sizes[0] in str(report)
    assert report.last_run == "FsFsF"
    plain = deepcache_fx.report(optimized_at(3, 6)).signatures[0]
    same = next(item for item in report.signatures if item.inputs == plain.inputs)
    for name in ("full_macs", "shallow_macs", "prompt_macs", "cache_bytes"):
        assert getattr(same, name) == getattr(plain, name)


def optimized_at(batch: int, size: int) -> CompVisUNet:
    unet = optimized(forecast=1)
    denoise(unet, TIMESTEPS[:1], batch=batch, size=size)
    return unet


@thorough
def test_a_change_of_size_within_a_run_is_a_full_step() -> None:
    unet = optimized(dynamic=True, interval=4, forecast=0)
    with torch.no_grad():
        for step, size in enumerate((8, 8, 12, 12, 8)):
            unet(torch.randn(2, 4, size, size), TIMESTEPS[step].expand(2), torch.ones(2, 3, 6))
    report = deepcache_fx.report(unet)
    assert report.captures == 1
    assert report.last_run[:4] == "FsFs"
    assert report.forced_full["inputs or settings changed within a run"] >= 1


@thorough
def test_each_size_has_recorded_graphs_of_its_own(static: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    unet = optimized(dynamic=True, forecast=1, cuda_graphs=True)
    for found, expected in zip(results(unet), static, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    report = deepcache_fx.report(unet)
    assert report.captures == 1
    assert [item.cuda_graphs for item in report.signatures] == ["recorded"] * 3


@thorough
def test_other_weights_are_those_of_every_size() -> None:
    unet, plain = optimized(dynamic=True, **TO_THE_BIT), CompVisUNet()
    results(unet)
    for parameter, other in zip(unet.parameters(), plain.parameters(), strict=True):
        other.data.mul_(1.5)
        parameter.data = other.data.clone()
    unet.out[2].weight = torch.nn.Parameter(plain.out[2].weight.data.clone())
    deepcache_fx.optimize(plain, interval=2, **TO_THE_BIT)
    for found, expected in zip(results(unet), results(plain), strict=True):
        assert torch.equal(found, expected)
    assert deepcache_fx.report(unet).captures == 1


@thorough
def test_a_model_that_takes_no_symbols_is_captured_for_each_size(
    static: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = runtime.capture

    def refusing(*args: Any, dynamic: bool = False, **kwargs: Any) -> Any:
        if dynamic:
            raise CaptureError("it counts its pixels")
        return capture(*args, **kwargs)

    monkeypatch.setattr(runtime, "capture", refusing)
    unet = optimized(dynamic="auto", forecast=1)
    for found, expected in zip(results(unet), static, strict=True):
        assert torch.equal(found, expected)
    report = deepcache_fx.report(unet)
    assert report.captures == 3
    assert report.sizes == ("a capture for each size: CaptureError: it counts its pixels",)


@thorough
def test_with_passes_of_ones_own_each_size_is_captured() -> None:
    unet = optimized(dynamic="auto", passes=[lambda graph: None])
    results(unet, SIZES[:2])
    report = deepcache_fx.report(unet)
    assert report.captures == 2
    assert "passes of one's own" in report.sizes[0]


def test_dynamic_takes_three_values() -> None:
    with pytest.raises(DeepCacheError, match="got '1'"):
        optimized(dynamic="1")


@thorough
@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"backend": "openvino"}])
def test_compilers_are_given_the_numbers_of_each_size(static: list[torch.Tensor], options: dict[str, Any]) -> None:
    unet = optimized(dynamic=True, forecast=1, **options)
    for found, expected in zip(results(unet), static, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert deepcache_fx.report(unet).captures == 1


class TestSequences:
    """Sizes and batches in any order, against the model itself."""

    def setup_class(self) -> None:
        self.models = {
            "sd": models.sd_unet(**small.LEVELS),
            "sdxl": models.sdxl_unet(**small.LEVELS, transformer_layers_per_block=1),
            "ddpm": UNet2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ).eval(),
        }
        for unet in self.models.values():
            deepcache_fx.optimize(unet, interval=1, dynamic=True, max_captures=64, **TO_THE_BIT)

    @thorough
    @pytest.mark.parametrize("name", ["sd", "sdxl", "ddpm"])
    @examples(3, 15)
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(2, 17), st.integers(2, 17)), min_size=1, max_size=3),
        is_even=st.booleans(),
    )
    @torch.no_grad()
    def test_every_size_gives_what_the_model_gives_to_the_bit(
        self, name: str, sizes: list[tuple[int, int, int]], is_even: bool
    ) -> None:
        unet = self.models[name]
        for batch, height, width in sizes:
            if is_even or name == "ddpm":  # which takes no odd sizes
                height, width = 2 * height, 2 * width
            arguments: dict[str, Any] = {"sample": torch.randn(batch, 4, height, width), "timestep": 7}
            if name != "ddpm":
                arguments["encoder_hidden_states"] = torch.randn(batch, 7, models.TEXT)
            if name == "sdxl":
                arguments["added_cond_kwargs"] = {
                    "text_embeds": torch.randn(batch, models.TEXT),
                    "time_ids": torch.ones(batch, 6),
                }
            expected = super(type(unet), unet).forward(**arguments, return_dict=False)[0]
            assert torch.equal(unet(**arguments, return_dict=False)[0], expected)
