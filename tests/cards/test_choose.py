"""Presets: the card's values, the user's own before them, and no preset where a cache is not for the model."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

import deepcache_fx
from deepcache_fx.cards.choose import choose
from deepcache_fx.cards.family import Facts, facts_of, family_of
from deepcache_fx.cards.table import CARDS, PRESETS
from deepcache_fx.errors import OptionError
from deepcache_fx.planning.presets import PRESETS as MODELS
from tests import models, small

FAMILIES = {
    "sd15": "sd15",
    "sd21": "sd21",
    "sdxl": "sdxl",
    "sdxl-refiner": "sdxl",
    "svd": "svd",
    "ldm4-imagenet": "ldm",
    "ddpm-church": "ddpm",
    "ddpm-bedroom": "ddpm",
    "ddpm-cifar10": "ddpm",
}
SDXL = MODELS["sdxl"].config
EULER = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


def test_every_published_configuration_is_of_its_family() -> None:
    assert {name: family_of(Facts(preset.config)).name for name, preset in MODELS.items()} == FAMILIES
    assert {family_of(Facts(preset.config)).few_steps for preset in MODELS.values()} == {None}
    assert family_of(Facts({"_class_name": "UNetMotionModel", "block_out_channels": [320, 640]})).name == "animatediff"
    assert family_of(Facts({}, pipeline="LDMPipeline")).name == "ldm"


@pytest.mark.parametrize(
    "facts",
    [
        Facts(SDXL, {"_class_name": "LCMScheduler"}),
        Facts(SDXL, {"_class_name": "TCDScheduler"}),
        Facts({**SDXL, "time_cond_proj_dim": 256}),
        Facts(SDXL, names=("stabilityai/sdxl-turbo",)),
        Facts(SDXL, names=("SDXL-Lightning",)),
        Facts({**SDXL, "_name_or_path": "somewhere/lcm-sdxl"}),
        Facts(SDXL, names=("Hyper-SDXL-8steps",)),
        Facts({**SDXL, "sample_size": 64}, EULER),
    ],
)
def test_models_for_few_steps_are_refused(facts: Facts) -> None:
    with pytest.raises(OptionError, match="distilled for few steps"):
        choose("fast", facts)


@pytest.mark.parametrize(
    "facts",
    [
        Facts({**SDXL, "_name_or_path": "turbo/sdxl-base"}),
        Facts(SDXL, names=("hyperion",)),
        Facts(SDXL, EULER),
        Facts({**SDXL, "sample_size": 64}, {**EULER, "prediction_type": "v_prediction"}),
    ],
)
def test_what_only_looks_a_little_like_them_is_not(facts: Facts) -> None:
    assert family_of(facts).few_steps is None


def test_every_card_has_every_preset_from_fast_to_close_and_says_where_it_is_from() -> None:
    for card in CARDS.values():
        assert tuple(card.choices) == PRESETS
        intervals = [choice.interval for choice in card.choices.values()]
        assert intervals == sorted(intervals, reverse=True)
        assert len(set(intervals)) == 3
        assert all(choice.source and card.note for choice in card.choices.values())


def test_given_values_come_first_and_the_description_tells() -> None:
    facts = Facts(SDXL)
    chosen = choose("balanced", facts, interval=None, branch=None, forecast=None, schedule=None)
    assert chosen.options == {"interval": 3, "branch": 0, "forecast": "auto"}
    chosen = choose("balanced", facts, interval=7, branch=0)
    assert chosen.options == {"interval": 7, "branch": 0, "forecast": "auto"}
    assert "Given instead: interval 7, branch 0" in chosen.description
    assert "interval" not in choose("fast", facts, schedule=deepcache_fx.Steps([3])).options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "quick"}, "preset must be one of 'fast', 'balanced', 'close' or None, got 'quick'"),
        ({"preset": "fast", "interval": 3, "schedule": deepcache_fx.Uniform(2)}, "contradict each other"),
    ],
)
def test_unknown_presets_and_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    unet = small.pipeline().unet
    with pytest.raises(OptionError, match=message):
        deepcache_fx.optimize(unet, **arguments)


def test_optimize_takes_a_preset_and_the_report_says_what_was_chosen() -> None:
    pipe = small.pipeline()
    deepcache_fx.optimize(pipe, preset="close", backend="eager")
    models.generate(pipe, 4, **small.SIZE)
    report = deepcache_fx.report(pipe)
    assert report.last_run == "FsFs"
    assert "preset: close for another U-Net" in str(report)
    assert report.to_dict()["preset"] == report.preset
    deepcache_fx.optimize(pipe, preset="fast", backend="eager")
    models.generate(pipe, 6, **small.SIZE)
    report = deepcache_fx.report(pipe)
    assert (report.last_run, report.captures) == ("FssssF", 1)
    assert "fast for another U-Net" in (report.preset or "")
    deepcache_fx.optimize(pipe, 5, backend="eager")
    assert deepcache_fx.report(pipe).preset is None


def test_a_pipelines_scheduler_counts_as_it_is_now() -> None:
    pipe = small.pipeline()
    assert family_of(facts_of(pipe.unet, pipe)).few_steps is None
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(OptionError, match="its scheduler is LCMScheduler"):
        deepcache_fx.optimize(pipe, preset="fast")
