"""What `optimize(preset=)` stands for: the card's values, and the user's own in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepcache_fx.cards.family import Facts, family_of
from deepcache_fx.cards.table import CARDS, PRESETS
from deepcache_fx.errors import OptionError


@dataclass(frozen=True)
class Chosen:
    """Arguments of `optimize`, and what the report says of them."""

    options: dict[str, Any]
    description: str


def check_preset(preset: object) -> str:
    """The preset, as it is.

    Raises:
        OptionError: there is none of that name.
    """
    if preset not in PRESETS:
        raise OptionError(f"preset must be one of {', '.join(map(repr, PRESETS))} or None, got {preset!r}")
    return str(preset)


def choose(preset: str, facts: Facts, **given: Any) -> Chosen:
    """The preset's interval, branch and forecast for the model; those that are `given`, and not None, come first.

    Raises:
        OptionError: there is no such preset, both an interval and a schedule are given, or the model is distilled for
            few steps.
    """
    card_name = check_preset(preset)
    if given.get("interval") is not None and given.get("schedule") is not None:
        raise OptionError(
            f"interval={given['interval']!r} and schedule={given['schedule']!r} contradict each other: leave one out"
        )
    family = family_of(facts)
    if family.few_steps is not None:
        raise OptionError(
            f"there is no preset for a model that is distilled for few steps ({family.few_steps}): its steps differ "
            "too much for a cache, do not use one. Name interval and branch yourself to try"
        )
    card = CARDS[family.name]
    choice = card.choices[card_name]
    values: dict[str, Any] = {"interval": choice.interval, "branch": choice.branch, "forecast": choice.forecast}
    own = {name: value for name, value in given.items() if value is not None}
    if "schedule" in own:
        del values["interval"]
    text = f"{card_name} for {card.title} ({family.reason}): {choice}. {choice.source}. {card.note}"
    if own:
        text += f". Given instead: {', '.join(f'{name} {value}' for name, value in own.items())}"
    return Chosen({**values, **own}, text)
