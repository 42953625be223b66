"""Weights laid out for compiled programs: fused, and never a wrong step, whatever happens to them; then as before."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import deepcache_fx
from deepcache_fx.execution import cuda_graphs, memory_format
from passes.weight_layout import lie_together
from tests import models
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import family, thorough
from tests.graphs import error

TIMESTEPS = torch.arange(950, -1, -50)
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([1, 1]), torch.randn(2, 3, 6)


def as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend that compiles nothing: the graph as Dynamo has it."""
    return graph.forward


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_format, "DEVICE_TYPES", ("cpu",))


@pytest.fixture(params=family([False, True], True), ids=["called", "recorded"])
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    return bool(request.param)


def fused(unet: Any = None, **options: Any) -> Any:
    return deepcache_fx.optimize(unet or CompVisUNet(), **{"branch": 1, "backend": as_it_is, **options})


def plain(unet: Any = None, **options: Any) -> Any:
    return deepcache_fx.optimize(unet or CompVisUNet(), **{"branch": 1, "backend": "eager", **options})


def projections(unet: CompVisUNet) -> list[torch.nn.Linear]:
    return [layer[1] for name, layer in unet.named_modules() if name.endswith("emb_layers")]  # type: ignore[index]


def _in_order(unet: CompVisUNet) -> list[torch.nn.Linear]:
    """Those of the shallow step first."""
    first, *between, last_but_one, last = projections(unet)
    return [first, last_but_one, last, *between]


def own_memory(unet: torch.nn.Module) -> bool:
    return all(p.untyped_storage().nbytes() == p.nbytes for p in unet.parameters())


def records(unet: torch.nn.Module, index: int = 0) -> dict[str, Any]:
    passes = deepcache_fx.report(unet).signatures[index].passes
    return {record.name: record for record in passes if record.name.startswith("fuse_linears")}


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return error((actual,), (expected,)) <= 1e-5


def test_all_time_projections_are_one_product_and_those_of_the_shallow_step_another(recording: bool) -> None:
    unet = CompVisUNet()
    before = [(id(p), p.data_ptr(), p.stride()) for p in unet.parameters()]
    expected = denoise(plain(copy.deepcopy(unet)), TIMESTEPS)
    assert close(denoise(fused(unet), TIMESTEPS), expected)
    full, shallow = records(unet)["fuse_linears (full)"], records(unet)["fuse_linears (shallow)"]
    assert [full.declined, shallow.declined] == [(), ()]
    assert [text.count("linear") for text in (*full.done, *shallow.done)] == [8, 3]
    assert "fuse_linears (full): " in str(deepcache_fx.report(unet))
    assert not own_memory(unet)
    addresses = [p.data_ptr() for p in unet.parameters()]
    assert close(denoise(unet, TIMESTEPS, size=16), denoise(plain(), TIMESTEPS, size=16))
    assert [p.data_ptr() for p in unet.parameters()] == addresses  # a second signature reads what there is
    assert records(unet, 1)["fuse_linears (full)"].done == full.done
    assert [item.cuda_graphs == "recorded" for item in deepcache_fx.report(unet).signatures] == [recording] * 2
    deepcache_fx.restore(unet)
    assert own_memory(unet)
    assert [(id(p), p.stride()) for p in unet.parameters()] == [(one, stride) for one, _, stride in before]
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), CompVisUNet().parameters(), strict=True))


def test_the_eager_backend_and_what_is_disabled_leave_weights_where_they_are() -> None:
    for options in ({"backend": "eager"}, {"disable": "all"}, {"disable": "fuse_linears"}):
        unet = fused(**options)
        denoise(unet, TIMESTEPS[:4])
        assert own_memory(unet)
        assert not any(record.done for record in records(unet).values())


def _double_and_back(unet: CompVisUNet) -> None:
    unet.double().float()


def _other_memory(unet: CompVisUNet) -> None:
    for parameter in unet.parameters():  # as offloading does, there and back
        parameter.data = parameter.data.clone()


def _in_place(unet: CompVisUNet) -> None:
    for parameter in unet.parameters():
        parameter.mul_(0.9)


def _through_data(unet: CompVisUNet) -> None:
    for layer in projections(unet):
        layer.weight.data += 0.1  # fusing a LoRA


def _one_of_them(unet: CompVisUNet) -> None:
    weight = projections(unet)[2].weight
    weight.data = weight.data * 3  # fusing one safely


def _the_shallow_ones(unet: CompVisUNet) -> None:
    for layer in (projections(unet)[0], *projections(unet)[-2:]):
        layer.weight.data = layer.weight.data * 3
        layer.bias.data = layer.bias.data + 1


def _tied(unet: CompVisUNet) -> None:
    projections(unet)[0].weight.data = projections(unet)[-1].weight.data


def _flat(unet: CompVisUNet) -> None:
    layers = projections(unet)
    flat = torch.cat([layer.weight.data * 2 for layer in layers])
    for layer, part in zip(layers, flat.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part


def _reversed_in_place(unet: CompVisUNet) -> None:
    """The same storage, the same addresses, other owners: only the order differs."""
    same = [layer.weight for layer in projections(unet) if len(layer.weight) == 16]
    for weight, data in zip(same, [weight.data for weight in reversed(same)], strict=True):
        weight.data = data


def _loaded(unet: CompVisUNet) -> None:
    unet.load_state_dict({name: value * 1.1 for name, value in unet.state_dict().items()})


IN_THE_MIDST: list[Callable[[CompVisUNet], None]] = [
    _double_and_back,
    _other_memory,
    _in_place,
    _through_data,
    _one_of_them,
    _the_shallow_ones,
    _tied,
    _flat,
    _reversed_in_place,
    _loaded,
]


def _assigned(unet: CompVisUNet) -> None:
    unet.load_state_dict({name: value * 1.1 for name, value in unet.state_dict().items()}, assign=True)


def _one_layer_replaced(unet: CompVisUNet) -> None:
    torch.manual_seed(7)
    unet.middle_block[0].emb_layers[1] = torch.nn.Linear(32, 16).eval()


@torch.no_grad()
def _as_at_first(*unets: CompVisUNet) -> None:
    for unet in unets:
        for parameter, value in zip(unet.parameters(), CompVisUNet().parameters(), strict=True):
            parameter.data = value.data.clone()


def test_whatever_happens_to_the_weights_between_runs_is_seen_by_the_next(recording: bool) -> None:
    unet, other = fused(), plain()
    for change in IN_THE_MIDST:
        _as_at_first(unet, other)
        denoise(unet, TIMESTEPS[:2])
        assert lie_together([layer.weight for layer in _in_order(unet)])
        with torch.no_grad():
            change(unet), change(other)
        for _ in range(2):
            assert close(denoise(unet, TIMESTEPS[:5]), denoise(other, TIMESTEPS[:5])), change.__name__
        again = change not in (_tied, _flat, _reversed_in_place)
        assert lie_together([layer.weight for layer in _in_order(unet)]) == again, change.__name__
    assert deepcache_fx.report(unet).captures == 1
    _as_at_first(unet)
    denoise(unet, TIMESTEPS[:2])
    deepcache_fx.restore(unet)
    assert own_memory(unet)


@pytest.mark.parametrize("step", family([2, 3], 2))
def test_whatever_happens_to_the_weights_within_a_run_is_seen_by_the_next_step(step: int, recording: bool) -> None:
    """Step 2 is shallow, step 3 full."""
    unet, other = fused(), plain()
    generator = torch.Generator().manual_seed(0)
    for change in IN_THE_MIDST:
        _as_at_first(unet, other)
        deepcache_fx.reset(unet), deepcache_fx.reset(other)
        with torch.no_grad():
            for index, t in enumerate(TIMESTEPS[:5]):
                if index == step:
                    change(unet), change(other)
                arguments = torch.randn(2, 4, 8, 8, generator=generator), t.expand(2), torch.ones(2, 3, 6)
                assert close(unet(*arguments), other(*arguments)), (change.__name__, index)
        assert deepcache_fx.report(unet).last_run == "FssFs"
    assert deepcache_fx.report(unet).captures == 1


@torch.no_grad()
def _one_weight_replaced(unet: CompVisUNet) -> None:
    layer = projections(unet)[1]
    layer.weight = torch.nn.Parameter(layer.weight * 1.3)


@pytest.mark.parametrize("change", family([_assigned, _one_layer_replaced, _one_weight_replaced], _assigned))
def test_replaced_weights_are_laid_out_as_those_before(change: Callable[[CompVisUNet], None], recording: bool) -> None:
    unet, other = fused(), plain()
    denoise(unet, TIMESTEPS[:2])
    before = list(unet.parameters())
    change(unet), change(other)
    for _ in range(2):
        assert close(denoise(unet, TIMESTEPS[:5]), denoise(other, TIMESTEPS[:5]))
    assert deepcache_fx.report(unet).captures == 1
    assert lie_together([layer.weight for layer in _in_order(unet)])
    kept = set(map(id, unet.parameters()))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in before if id(p) not in kept)
    assert lie_together([layer.weight for layer in _in_order(unet)])
    deepcache_fx.restore(unet)
    assert own_memory(unet)


def test_another_schedule_a_with_block_and_another_branch_lay_out_what_they_need() -> None:
    unet = fused()
    expected = denoise(plain(), TIMESTEPS)
    assert close(denoise(unet, TIMESTEPS), expected)
    with deepcache_fx.optimized(unet, branch=2, backend=as_it_is):
        assert close(denoise(unet, TIMESTEPS), denoise(plain(branch=2), TIMESTEPS))
    with deepcache_fx.optimized(unet, branch=1, backend="eager"):
        assert own_memory(unet)
        denoise(unet, TIMESTEPS[:2])
        assert own_memory(unet)
    assert close(denoise(unet, TIMESTEPS), expected)
    deepcache_fx.optimize(unet, interval=5, branch=1, backend=as_it_is)
    assert close(denoise(unet, TIMESTEPS), denoise(plain(interval=5), TIMESTEPS))
    assert deepcache_fx.report(unet).captures == 1
    deepcache_fx.restore(unet)
    assert own_memory(unet)


def test_of_two_models_with_the_same_parameters_one_has_them_laid_out() -> None:
    unet, twin = CompVisUNet(), CompVisUNet()
    for name, module in twin.named_modules():
        module._parameters.update(unet.get_submodule(name)._parameters)
    fused(unet), fused(twin)
    expected = denoise(plain(), TIMESTEPS)
    for _ in range(2):
        assert close(denoise(unet, TIMESTEPS), expected)
        assert close(denoise(twin, TIMESTEPS), expected)
    assert records(twin)["fuse_linears (full)"].done == ()
    assert "not laid out together" in records(twin)["fuse_linears (full)"].declined[0]
    deepcache_fx.restore(unet)
    for _ in range(2):
        assert close(denoise(twin, TIMESTEPS), expected)
    assert own_memory(unet)


def test_a_model_that_shares_memory_with_another_sees_its_own_values() -> None:
    """As after load_state_dict(assign=True) from another: parameters of its own over the same storages."""
    unet, twin = CompVisUNet(), CompVisUNet()
    twin.load_state_dict(unet.state_dict(), assign=True)
    expected = denoise(plain(), TIMESTEPS)
    assert close(denoise(fused(twin), TIMESTEPS), expected)
    assert own_memory(unet)
    assert close(denoise(fused(unet), TIMESTEPS), expected)
    assert close(denoise(twin, TIMESTEPS), expected)


def test_threads_that_begin_at_once_after_the_weights_have_moved_get_what_they_get_alone() -> None:
    expected = {size: denoise(plain(), TIMESTEPS[:6], size=size) for size in (8, 16)}
    unet, num_threads = fused(), torch.get_num_threads()
    for size in expected:
        denoise(unet, TIMESTEPS[:6], size=size)
    results: list[tuple[int, torch.Tensor]] = []
    gate = threading.Barrier(4, action=lambda: _other_memory(unet))

    def work(size: int) -> None:
        torch.set_num_threads(num_threads)
        for _ in range(3):
            gate.wait()
            results.append((size, denoise(unet, TIMESTEPS[:6], size=size)))

    threads = [threading.Thread(target=work, args=(size,)) for size in (8, 16, 8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(close(result, expected[size]) for size, result in results)


def test_a_weight_that_a_program_reads_stays_where_it_is() -> None:
    """Another thread may be running that program."""
    unet = fused()
    linear = torch.nn.Linear(32, 8)
    denoise(unet, TIMESTEPS[:2])
    unet.input_blocks[1][0].register_module("extra", linear)  # new settings: captured anew, nothing replaced
    addresses = [p.data_ptr() for p in unet.parameters()]
    denoise(unet, TIMESTEPS[:2])
    assert deepcache_fx.report(unet).captures == 2
    assert [p.data_ptr() for p in unet.parameters()] == addresses


def test_neither_replaced_weights_nor_a_dropped_model_are_held() -> None:
    unet = fused()
    denoise(unet, TIMESTEPS[:2])
    old = [weakref.ref(p) for p in unet.parameters()]
    _assigned(unet)
    denoise(unet, TIMESTEPS[:2])
    gc.collect()
    assert [reference for reference in old if reference() is not None] == []
    model = weakref.ref(unet)
    del unet
    gc.collect()
    assert model() is None


def test_a_step_in_inference_mode_leaves_weights_that_can_be_trained() -> None:
    unet = fused()
    with torch.inference_mode():
        denoise(unet, TIMESTEPS[:4])
    with pytest.warns(UserWarning, match="gradients are enabled"):
        unet(*INPUTS).sum().backward()
    assert projections(unet)[0].weight.grad is not None


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return models.sd_unet(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@torch.no_grad()
def steps(unet: Any) -> torch.Tensor:
    torch.manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, models.TEXT)
    for t in TIMESTEPS[:5]:
        x = x - 0.1 * unet(x, t, text).sample
    return x


def test_queries_keys_and_values_are_one_product(unet: UNet2DConditionModel, tmp_path: Any) -> None:
    expected = steps(plain(copy.deepcopy(unet), branch=0))
    assert close(steps(fused(unet, branch=0)), expected)
    for name in ("full", "shallow"):
        assert any(text.count("linear") == 3 for text in records(unet)[f"fuse_linears ({name})"].done)
        assert records(unet)[f"fuse_linears ({name})"].declined == ()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    q, k, v = (layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v))
    assert [k.data_ptr() - q.data_ptr(), v.data_ptr() - k.data_ptr()] == [q.nbytes, k.nbytes]
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())
    assert own_memory(again)
    assert own_memory(copy.deepcopy(unet))
    assert close(steps(unet), expected)


def test_an_adapter_loaded_fused_safely_and_unloaded_is_seen(unet: UNet2DConditionModel) -> None:
    other = copy.deepcopy(unet)
    fused(unet, branch=0), plain(other, branch=0)

    def add(model: Any) -> None:
        torch.manual_seed(5)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))

    changes: list[Callable[[Any], object]] = [
        lambda model: None,
        add,
        lambda model: model.fuse_lora(safe_fusing=True),
        lambda model: model.unfuse_lora(),
        lambda model: model.delete_adapters("default"),
    ]
    results = []
    for change in changes:
        change(unet), change(other)
        results.append(steps(unet))
        assert close(results[-1], steps(other))
    assert not close(results[1], results[0])
    deepcache_fx.restore(unet)
    assert own_memory(unet)


@thorough
def test_inductor_reads_laid_out_weights(unet: UNet2DConditionModel) -> None:
    expected = steps(plain(copy.deepcopy(unet), branch=0))
    fused(unet, branch=0, backend="inductor")
    for _ in range(2):
        assert float((steps(unet) - expected).norm() / expected.norm()) < 1e-4
        for parameter in unet.parameters():
            parameter.data = parameter.data.clone()
    assert any("read as one" in text for text in records(unet)["fuse_linears (full)"].done)
