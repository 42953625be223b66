"""What else people do to a UNet, and caching on top of it: one test per cell of the table in docs/stacking.md.

"Works" means: the optimised model returns what the same model returns eagerly with its deep operand replaced by the one
of the last full step (`tests.oracles.specified`), and shallow steps run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from DeepCache import DeepCacheSDHelper
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.planning.example_inputs import example_inputs
from passes.approximate import MergeTokens
from tests import models, small
from tests.families import family, thorough
from tests.oracles import REPEATING, TO_THE_BIT, specified

aten = torch.ops.aten

TIMESTEPS = (900, 700, 500, 300)
FULL = {0, 3}  # of interval=3: full, shallow, shallow, full


def make_unet() -> UNet2DConditionModel:
    return models.sd_unet(**small.ATTENTION_ON_TOP).requires_grad_(False)


@torch.no_grad()
def denoise(unet: torch.nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(memory_format=memory_format)
    text = torch.randn(2, 5, models.TEXT, generator=generator)
    for t in TIMESTEPS:
        x = x - 0.3 * unet(x, t, text).sample
    return x


def oracle(unet: torch.nn.Module, **call: Any) -> torch.Tensor:
    """Of a copy, which is plain whether `unet` is optimised or not."""
    twin = SimpleNamespace(unet=copy.deepcopy(unet))
    with specified(twin, FULL, 0):
        return denoise(twin.unet, **call)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def check_cached(unet: torch.nn.Module, expected: torch.Tensor, tolerance: float = 1e-5, **call: Any) -> None:
    """The optimised UNet returns what is expected, in two full and two shallow steps."""
    before = deepcache_fx.report(unet)
    actual = denoise(unet, **call)
    report = deepcache_fx.report(unet)
    assert report.shallow_calls - before.shallow_calls == 2
    assert (report.last_run, report.original_calls) == ("FssF", 0)
    assert difference(actual, expected) <= tolerance


def check_works(unet: torch.nn.Module, tolerance: float = 1e-5, *, options: Any = None, **call: Any) -> None:
    """Optimise, compare with the oracle, and see that caching has an effect that the comparison would show."""
    expected = oracle(unet, **call)
    assert difference(denoise(unet, **call), expected) > 10 * tolerance
    with deepcache_fx.optimized(unet, interval=3, **{**REPEATING, **(options or {})}):
        check_cached(unet, expected, tolerance, **call)


def changes(unet: torch.nn.Module, change: Callable[[Any], Any]) -> None:
    """Apply a change, and see that it is one."""
    before = denoise(unet)
    change(unet)
    assert difference(denoise(unet), before) > 1e-5


# Quantisation.


def quantize(unet: torch.nn.Module, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes(unet, lambda model: quantization.quantize_(model, getattr(quantization, config)()))


@thorough
def test_int8_weights_of_torchao_before_optimize() -> None:
    unet = make_unet()
    quantize(unet, "Int8WeightOnlyConfig")
    check_works(unet)


@thorough
def test_float8_weights_of_torchao_before_optimize() -> None:
    unet = make_unet()
    quantize(unet, "Float8WeightOnlyConfig")
    check_works(unet)


@thorough
def test_dynamic_int8_of_torchao_before_optimize_to_the_bit_without_passes() -> None:
    """With them a sum taken in another order may move an activation to the next of the 8-bit values."""
    unet = make_unet()
    quantize(unet, "Int8DynamicActivationInt8WeightConfig")
    check_works(unet, 0.0, options={"disable": "all"})


@thorough
def test_dynamic_int8_of_torchao_before_optimize_within_the_error_of_quantising() -> None:
    unet = make_unet()
    exact = oracle(unet)
    quantize(unet, "Int8DynamicActivationInt8WeightConfig")
    check_works(unet, difference(oracle(unet), exact))


# Adapters.


def load_lora(unet: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    unet.add_adapter(config)
    unet.requires_grad_(False)


def test_a_lora_loaded_before_optimize() -> None:
    unet = make_unet()
    changes(unet, load_lora)
    check_works(unet)


@thorough
def test_a_lora_fused_before_optimize() -> None:
    unet = make_unet()
    changes(unet, load_lora)
    unet.fuse_lora()
    check_works(unet)


@thorough
def test_a_loras_scale_that_is_given_with_the_call() -> None:
    unet = make_unet()
    load_lora(unet)
    given = example_inputs(unet)

    def call(scale: float) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = unet(**given, cross_attention_kwargs={"scale": scale}).sample
        return result

    scales = (1.0, 0.2, 0.0, 0.2)
    expected = [call(scale) for scale in scales]
    assert difference(expected[1], expected[0]) > 1e-3
    with deepcache_fx.optimized(unet, interval=1, **TO_THE_BIT):
        assert all(torch.equal(call(scale), wanted) for scale, wanted in zip(scales, expected, strict=True))


def test_a_lora_loaded_and_fused_and_unloaded_after_optimize() -> None:
    unet = make_unet()
    plain = oracle(unet)
    with deepcache_fx.optimized(unet, interval=3, **REPEATING):
        check_cached(unet, plain)
        load_lora(unet)
        loaded = oracle(unet)
        assert difference(loaded, plain) > 1e-3
        check_cached(unet, loaded)
        for safe in (False, True):
            unet.fuse_lora(safe_fusing=safe)
            check_cached(unet, loaded)
            unet.unfuse_lora()
        unet.unload_lora()
        check_cached(unet, plain)


# Settings of the model.


@thorough
def test_freeu_switched_on_before_optimize() -> None:
    unet = make_unet()
    changes(unet, lambda model: model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6))
    check_works(unet)


def test_freeu_switched_on_and_off_after_optimize() -> None:
    unet = make_unet()
    plain = oracle(unet)
    with deepcache_fx.optimized(unet, interval=3, **REPEATING):
        check_cached(unet, plain)
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        with_freeu = oracle(unet)
        assert difference(with_freeu, plain) > 1e-3
        check_cached(unet, with_freeu)
        unet.disable_freeu()
        check_cached(unet, plain)


def test_channels_last() -> None:
    unet = make_unet().to(memory_format=torch.channels_last)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    check_works(unet, memory_format=torch.channels_last)


class Sharpened:
    """An attention processor of one's own: the scores of queries and keys are doubled."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        mixed = F.scaled_dot_product_attention(2 * q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


@pytest.mark.parametrize("processor", family([AttnProcessor, AttnProcessor2_0, Sharpened], Sharpened))
def test_attention_processors(processor: type) -> None:
    unet = make_unet()
    unet.set_attn_processor(processor())
    check_works(unet)


@thorough
def test_an_attention_processor_set_after_optimize() -> None:
    unet = make_unet()
    with deepcache_fx.optimized(unet, interval=3, **REPEATING):
        check_cached(unet, oracle(unet))
        changes(unet, lambda model: model.set_attn_processor(Sharpened()))
        check_cached(unet, oracle(unet))


def test_projections_fused_by_diffusers_before_optimize() -> None:
    unet = make_unet()
    unet.fuse_qkv_projections()
    assert any(name.endswith("to_qkv") for name, _ in unet.named_modules())
    check_works(unet)


# Passes.


class GeluByTanh(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = graph_module.graph.find_nodes(op="call_function", target=aten.gelu.default)
        for node in found:
            node.kwargs = {"approximate": "tanh"}
        return PassResult(graph_module, bool(found))


def gelu_by_tanh(graph_module: fx.GraphModule) -> fx.GraphModule:
    return GeluByTanh()(graph_module).graph_module


@pytest.mark.parametrize("item", family([GeluByTanh(), gelu_by_tanh], gelu_by_tanh), ids=["PassBase", "function"])
def test_a_pass_of_the_users_own(item: Callable[..., Any]) -> None:
    unet = make_unet()
    changed = copy.deepcopy(unet)
    for module in changed.modules():
        if isinstance(module, GEGLU):
            module.gelu = lambda gate: F.gelu(gate, approximate="tanh")  # type: ignore[method-assign]
    expected = oracle(changed)
    assert difference(oracle(unet), expected) > 1e-5
    with deepcache_fx.optimized(unet, interval=3, **REPEATING, passes=[item]):
        check_cached(unet, expected, 1e-6)
        [signature] = deepcache_fx.report(unet).signatures
        assert any(record.name == "gelu_by_tanh" and record.modified for record in signature.passes)


def test_merged_tokens_in_full_and_shallow_steps() -> None:
    """Against tomesd on the same UNet: the published token merging, under the published caching."""
    tomesd = pytest.importorskip("tomesd", reason="the authors' implementation is not installed")
    unet = make_unet()
    merged = copy.deepcopy(unet)
    tomesd.apply_patch(merged, ratio=0.5, use_rand=False)
    expected = oracle(merged)
    assert difference(oracle(unet), expected) > 1e-3
    with deepcache_fx.optimized(unet, interval=3, **REPEATING, passes=[MergeTokens(0.5)]):
        check_cached(unet, expected)


@thorough
def test_merged_tokens_and_a_lora_and_freeu_at_once() -> None:
    tomesd = pytest.importorskip("tomesd", reason="the authors' implementation is not installed")
    unet = make_unet()
    load_lora(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    merged = copy.deepcopy(unet)
    tomesd.apply_patch(merged, ratio=0.5, use_rand=False)
    with deepcache_fx.optimized(unet, interval=3, **REPEATING, passes=[MergeTokens(0.5)]):
        check_cached(unet, oracle(merged))


# What is refused, with the remedy.


def test_a_unet_wrapped_by_torch_compile_is_refused() -> None:
    with pytest.raises(DeepCacheError, match=r"wrapped by torch\.compile: pass the original \(unet\._orig_mod\)"):
        deepcache_fx.optimize(torch.compile(make_unet()))


def test_a_unet_compiled_in_place_is_refused() -> None:
    unet = make_unet()
    unet.compile()
    with pytest.raises(DeepCacheError, match=r"compile\(\) was called on this UNet: load it anew"):
        deepcache_fx.optimize(unet)


def test_a_unet_that_the_published_helper_runs_is_refused_until_it_is_disabled() -> None:
    pipe = small.pipeline()
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    with pytest.raises(DeepCacheError, match=r"for DeepCacheSDHelper: helper\.disable\(\)"):
        deepcache_fx.optimize(pipe)
    helper.disable()
    deepcache_fx.restore(deepcache_fx.optimize(pipe))
