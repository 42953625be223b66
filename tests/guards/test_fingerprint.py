"""Changes of a model that a captured graph would not see."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Hashable

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

import deepcache_fx
from deepcache_fx.guards.fingerprint import Fingerprint
from deepcache_fx.planning.presets import preset
from tests import models
from tests.compvis import CompVisUNet, denoise
from tests.oracles import TO_THE_BIT


def fingerprint(module: nn.Module) -> Hashable:
    return Fingerprint().read(module).structure


class Own(nn.Parameter):
    pass


class Processor:
    def __init__(self) -> None:
        self.scale = [1.0, 2.0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.twin = nn.Linear(2, 2)
        self.block = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1)})
        self.scaling = {"default": 0.5}
        self.processor = Processor()
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("other", torch.zeros(3), persistent=False)


def scaled(model: Model, scale: float) -> Model:
    model.scaling["default"] = scale
    return model


def test_minus_one_and_minus_two_are_different_although_their_hashes_are_equal() -> None:
    model = Model()
    assert hash(-1.0) == hash(-2.0)
    assert fingerprint(scaled(model, -1.0)) != fingerprint(scaled(model, -2.0))


def test_one_and_true_are_different_although_they_are_equal() -> None:
    model = Model()
    assert fingerprint(scaled(model, 1)) != fingerprint(scaled(model, True))


def test_an_object_is_not_taken_for_a_later_one_at_its_address() -> None:
    model, seen = Model(), []
    for value in (1.5, 2.0, 3.0, 4.0):
        model.number = np.float32(value)
        seen.append(fingerprint(model))
    assert len(set(seen)) == 4


def test_attributes_made_in_inference_mode_are_read() -> None:
    model = Model()
    with torch.inference_mode():
        model.lazy = torch.ones(2)
    assert fingerprint(model) == fingerprint(model)


def double(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return factor * x


def test_the_arguments_of_a_partial_function_are_read() -> None:
    model, seen = Model(), []
    for factor in (1.5, 2.5, 1.5):
        model.layer.forward = functools.partial(double, factor=factor)
        seen.append(fingerprint(model))
    assert seen[0] == seen[2] != seen[1]


CHANGES: dict[str, Callable[[Model], object]] = {
    "training mode": lambda m: m.train(not m.training),
    "an adapter's scale": lambda m: m.scaling.update(default=0.7),
    "a new adapter": lambda m: m.scaling.update(other=1.0),
    "a processor's list": lambda m: m.processor.scale.__setitem__(0, 3.0),
    "another processor": lambda m: setattr(m, "processor", object()),
    "a layer's setting": lambda m: setattr(m.block["a"], "padding", (1, 1)),
    "a new attribute": lambda m: setattr(m, "s1", 0.9),
    "a patched layer's forward": lambda m: setattr(m.layer, "forward", lambda x: x),
    "a diffusers configuration": lambda m: setattr(m, "_internal_dict", {"center_input_sample": True}),
    "a replaced layer": lambda m: setattr(m, "layer", nn.Linear(2, 2, bias=False)),
    "an added layer": lambda m: m.block.update({"b": nn.Identity()}),
    "a removed layer": lambda m: m.block.pop("a"),
    "a parameter of another shape": lambda m: setattr(m.layer, "weight", nn.Parameter(torch.zeros(3, 2))),
    "a parameter of other strides": lambda m: setattr(m.layer, "weight", nn.Parameter(torch.zeros(2, 2).t())),
    "a parameter of a class of its own": lambda m: setattr(m.layer, "weight", Own(torch.zeros(2, 2))),
    "another type": lambda m: m.half(),
    "a buffer of another type": lambda m: setattr(m, "table", torch.ones(3, dtype=torch.int64)),
    "two names of one parameter": lambda m: setattr(m.twin, "weight", m.layer.weight),
    "two names of one buffer": lambda m: setattr(m, "other", m.table),
}


@pytest.mark.parametrize("change", CHANGES)
def test_is_seen(change: str) -> None:
    """Also by what is kept, which must not be taken to hold, and then reads what a new reading would."""
    model, kept = Model(), Fingerprint()
    before = fingerprint(model)
    assert fingerprint(model) == before == kept.read(model).structure
    assert kept.known(model, at_run_start=True) is kept.read(model)
    alive = [model.layer, model.processor, model.table, *model.parameters()]
    CHANGES[change](model)
    assert fingerprint(model) != before, alive
    assert kept.known(model, at_run_start=True) is None
    assert kept.read(model).structure == fingerprint(model)
    assert kept.known(model, at_run_start=True) is not None


REPLACED: dict[str, Callable[[Model], object]] = {
    "a parameter": lambda m: setattr(m.layer, "weight", nn.Parameter(torch.zeros(2, 2))),
    "a parameter that is trained": lambda m: setattr(m.layer, "bias", nn.Parameter(torch.ones(2), requires_grad=False)),
    "a buffer": lambda m: setattr(m, "table", torch.ones(3)),
    "a buffer that is not stored": lambda m: setattr(m, "other", torch.ones(3)),
    "a layer": lambda m: setattr(m, "layer", nn.Linear(2, 2)),
    "all": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", REPLACED)
def test_other_weights_of_the_same_kind_are_the_same_structure_and_other_settings(change: str) -> None:
    model, kept = Model(), Fingerprint()
    before, old = kept.read(model), kept.weights()
    REPLACED[change](model)
    assert kept.known(model, at_run_start=True) is None
    after, new = kept.read(model), kept.weights()
    assert after != before
    assert after.structure is before.structure
    names = [*dict(model.named_parameters()).values(), *dict(model.named_buffers()).values()]
    assert {id(tensor) for tensor in new} == {id(tensor) for tensor in names}
    assert [one.shape for one in new] == [one.shape for one in old]
    assert kept.known(model, at_run_start=True) is after is kept.read(model)


def test_weights_that_are_numbered_anew_are_other_settings() -> None:
    model, kept = Model(), Fingerprint()
    before = kept.read(model)
    kept.renumber()
    assert kept.known(model, at_run_start=True) != before
    assert kept.read(model).structure is before.structure


SETTINGS = {
    "an adapter's scale",
    "a new adapter",
    "a processor's list",
    "another processor",
    "a new attribute",
    "training mode",
    "a diffusers configuration",  # where there was none
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_seen_at_a_glance_too(change: str) -> None:
    model, kept = Model(), Fingerprint()
    kept.read(model)
    CHANGES[change](model)
    assert (kept.known(model, at_run_start=False) is None) == (change in SETTINGS)


def test_equal_values_in_new_objects_are_read_again_and_are_no_change() -> None:
    model, kept = Model(), Fingerprint()
    before = kept.read(model)
    model.scaling = {"default": float("0.5")}
    model.processor.scale = [1.0, 2.0]
    assert kept.known(model, at_run_start=False) is None
    assert kept.read(model) is before
    model.scaling["default"] = 0.7  # of the new dictionary
    assert kept.known(model, at_run_start=False) is None


def test_what_has_expired_is_read_again_and_is_no_change() -> None:
    model, kept = Model(), Fingerprint()
    kept.expire()  # of nothing
    before = kept.read(model)
    kept.expire()
    assert kept.known(model, at_run_start=True) is kept.known(model, at_run_start=False) is None
    assert kept.read(model) is before
    assert kept.known(model, at_run_start=True) is before


def test_another_model_is_not_taken_for_the_one_that_was_read() -> None:
    kept = Fingerprint()
    kept.read(Model())
    assert kept.known(Model(), at_run_start=False) is None


def test_to_find_a_published_unet_unchanged_costs_a_fraction_of_reading_it() -> None:
    """Of Stable Diffusion 1.5, once a run and once a call; the fastest of several tries each, on the same machine."""
    unet, kept = preset("sd15").build(), Fingerprint()
    kept.read(unet)

    def fastest(function: Callable[[], object]) -> float:
        times = []
        for _ in range(15):
            started = time.perf_counter()
            assert function() is not None
            times.append(time.perf_counter() - started)
        return min(times)

    reading = fastest(lambda: fingerprint(unet))
    assert fastest(lambda: kept.known(unet, at_run_start=True)) < reading / 5
    assert fastest(lambda: kept.known(unet, at_run_start=False)) < reading / 40


def test_new_values_in_the_same_weights_are_not_a_change() -> None:
    model = Model()
    before = fingerprint(model)
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    assert fingerprint(model) == before


def test_a_diffusers_unet_is_stable_and_its_settings_are_seen() -> None:
    unet = models.sd_unet(layers_per_block=1)
    unet.set_attn_processor(AttnProcessor2_0())
    seen = [fingerprint(unet)]
    assert fingerprint(unet) == seen[0]
    unet.set_attn_processor(AttnProcessor())
    seen.append(fingerprint(unet))
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    seen.append(fingerprint(unet))
    unet.enable_freeu(0.9, 0.2, 1.1, 1.4)
    seen.append(fingerprint(unet))
    unet.disable_freeu()
    seen.append(fingerprint(unet))
    assert len({*seen}) == len(seen) - (seen[-1] == seen[1])
    assert seen[0] != seen[1] != seen[2] != seen[3] != seen[4]


class Closure:
    """A function in a model, and what it holds."""

    def __init__(self, held: object) -> None:
        self.held = held

        def function(x: torch.Tensor, factors: tuple[float, ...] = (1.0,)) -> object:
            return x, held, factors

        def change(value: object) -> None:
            nonlocal held
            held = value

        self.function, self.change = function, change


class OfAUser:
    scale = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


HOLDING: dict[str, tuple[object, Callable[[Closure], object]]] = {
    "a plain value": (1.0, lambda c: c.change(2.0)),
    "a list's item": ([1.0], lambda c: c.held.append(2.0)),
    "a dictionary's item": ({"scale": 1.0}, lambda c: c.held.update(scale=2.0)),
    "a tensor in place": (torch.ones(2), lambda c: c.held.mul_(2)),
    "another tensor": (torch.ones(2), lambda c: c.change(torch.ones(2))),
    "another object": (OfAUser(), lambda c: c.change(Processor())),
    "an object's attribute": (OfAUser(), lambda c: setattr(c.held, "scale", 2.0)),
    "a default": (None, lambda c: setattr(c.function, "__defaults__", ((2.0,),))),
}
"""What a closure holds, and how that becomes another."""

FUNCTIONS: dict[str, Callable[[Model, Callable[..., object]], object]] = {
    "a layer's forward": lambda m, f: setattr(m.layer, "forward", f),
    "a processor": lambda m, f: setattr(m, "processor", f),
    "a processor's attribute": lambda m, f: setattr(m.processor, "patch", f),
    "an item of a list": lambda m, f: setattr(m, "patches", [f]),
    "a partial": lambda m, f: setattr(m, "patch", functools.partial(f)),
    "another closure": lambda m, f: setattr(m, "patch", lambda x: f(x)),
    "a decorated function": lambda m, f: setattr(m, "patch", torch.no_grad()(f)),
}
"""Where a model has a function."""


@pytest.mark.parametrize("where", FUNCTIONS)
@pytest.mark.parametrize("what", HOLDING)
def test_what_a_function_holds_is_a_setting(what: str, where: str) -> None:
    held, change = HOLDING[what]
    model, kept, closure = Model(), Fingerprint(), Closure(copy.deepcopy(held))
    FUNCTIONS[where](model, closure.function)
    before = kept.read(model)
    assert fingerprint(model) == before.structure
    assert kept.known(model, at_run_start=False) is before
    change(closure)
    assert kept.known(model, at_run_start=False) is None
    assert kept.known(model, at_run_start=True) is None
    assert kept.read(model).structure == fingerprint(model) != before.structure


def test_an_equal_value_in_a_closure_is_no_change() -> None:
    model, kept, closure = Model(), Fingerprint(), Closure(0.5)
    model.patch = closure.function
    before = kept.read(model)
    closure.change(float("0.5"))
    assert kept.read(model) is before


def test_of_a_schedulers_steps_in_a_closure_nothing_is_noted() -> None:
    """A library's object changes for reasons of its own, a new capture at every step would be the end of caching."""
    model, kept, closure = Model(), Fingerprint(), Closure(models.scheduler())
    model.patch = closure.function
    before = kept.read(model)
    closure.held.set_timesteps(7)
    assert kept.known(model, at_run_start=True) is before


def test_what_a_hook_of_the_whole_collects_is_no_setting() -> None:
    model, kept, seen = Model(), Fingerprint(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    before = kept.read(model)
    seen.append(1)
    assert kept.known(model, at_run_start=True) is before
    assert fingerprint(model) == before.structure


def test_a_class_attribute_of_the_users_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = Model(), Fingerprint()
    model.processor = OfAUser()
    before = kept.read(model)
    monkeypatch.setattr(OfAUser, "scale", 2.0)
    assert kept.known(model, at_run_start=False) is None
    assert kept.read(model) != before


def test_a_bound_methods_object_is_a_setting() -> None:
    model, kept, user = Model(), Fingerprint(), OfAUser()
    model.patch = user.__call__
    before = kept.read(model)
    user.scale = 2.0
    assert kept.known(model, at_run_start=False) is None
    assert kept.read(model) != before


def test_being_optimised_is_no_setting() -> None:
    model = CompVisUNet()
    before = fingerprint(model)
    deepcache_fx.optimize(model)
    assert fingerprint(model) == before


def test_a_scale_in_a_closure_that_the_user_changes_is_in_the_next_image() -> None:
    scale = 1.0

    def patch(module: torch.nn.Module) -> None:
        plain = module.forward
        module.forward = lambda x: scale * plain(x)

    model, expected = CompVisUNet(), CompVisUNet()
    for unet in (model, expected):
        patch(unet.middle_block[0].in_layers[2])
    deepcache_fx.optimize(model, **TO_THE_BIT)
    timestep = torch.tensor([500])
    assert torch.equal(denoise(model, timestep), before := denoise(expected, timestep))
    scale = 2.0
    after = denoise(model, timestep)
    assert torch.equal(after, denoise(expected, timestep))
    assert not torch.equal(after, before)
    assert deepcache_fx.report(model).captures == 2
