"""What a visitor may ask for: every input checked against its bounds. No tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from deepcache_fx.errors import OptionError
from deepcache_fx.options import Forecast
from deepcache_fx.schedules.patterns import Nested, Power, Steps, Uniform
from deepcache_fx.schedules.schedule import Schedule

LONGEST_TEXT = 1000
"""Characters of a prompt."""
MOST_STEPS = 150
LARGEST_SEED = 2**32 - 1
LARGEST_GUIDANCE = 30.0
LARGEST_POWER = 4.0
SCHEDULES = ("uniform", "power", "nested", "steps")
FORECASTS = ("auto", "0", "1", "2")


@dataclass(frozen=True)
class Choices:
    """What the model leaves to choose from."""

    sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels."""
    schedulers: tuple[str, ...]
    """Short names."""
    branches: int
    """How many skip connections there are."""


@dataclass(frozen=True)
class Settings:
    """One picture's settings, all of them checked. The names are those of the page's controls."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    scheduler: str
    size: str
    """As 512x768: width, height."""
    guidance_scale: float
    schedule: str
    """One of `SCHEDULES`."""
    interval: int
    power: float
    center: int
    deeper: int
    """The skip connection of a nested schedule's deeper steps."""
    deeper_interval: int
    full_steps: str
    """Of the schedule `steps`: numbers with commas between them."""
    branch: int
    forecast: str
    """One of `FORECASTS`."""

    @staticmethod
    def read(values: Mapping[str, object], choices: Choices) -> Settings:
        """Check what a page, or a program in its place, sent.

        Raises:
            OptionError: in one sentence, the value, and what it may be.
        """
        sizes = [f"{width}x{height}" for width, height in choices.sizes]
        steps = _integer(values, "steps", 1, MOST_STEPS)
        last_branch = choices.branches - 1
        found = Settings(
            prompt=_text(values, "prompt"),
            negative_prompt=_text(values, "negative_prompt"),
            seed=_integer(values, "seed", 0, LARGEST_SEED),
            steps=steps,
            scheduler=_one_of(values, "scheduler", choices.schedulers),
            size=_one_of(values, "size", sizes),
            guidance_scale=_number(values, "guidance_scale", 0.0, LARGEST_GUIDANCE),
            schedule=_one_of(values, "schedule", SCHEDULES),
            interval=_integer(values, "interval", 1, MOST_STEPS),
            power=_number(values, "power", 1.05, LARGEST_POWER),
            center=_integer(values, "center", 0, MOST_STEPS),
            deeper=_integer(values, "deeper", 0, last_branch),
            deeper_interval=_integer(values, "deeper_interval", 1, MOST_STEPS),
            full_steps=_text(values, "full_steps"),
            branch=_integer(values, "branch", 0, last_branch),
            forecast=_one_of(values, "forecast", FORECASTS),
        )
        if not found.prompt.strip():
            raise OptionError("The prompt is empty: say what the picture should show.")
        if found.schedule == "nested" and found.deeper <= found.branch:
            raise OptionError(
                f"Deeper steps must begin at a deeper skip connection than {found.branch}, the branch of the others; "
                f"got {found.deeper}."
            )
        found.timetable()
        return found

    def timetable(self) -> Schedule:
        """Which steps are full.

        Raises:
            DeepCacheError: there is no such schedule.
        """
        if self.schedule == "power":
            return Power(self.interval, self.power, self.center)
        if self.schedule == "nested":
            return Nested(self.interval, ((self.deeper, self.deeper_interval),))
        if self.schedule == "steps":
            return Steps(_numbers(self.full_steps))
        return Uniform(self.interval)

    @property
    def order(self) -> Forecast:
        """What `optimize(forecast=)` takes."""
        return "auto" if self.forecast == "auto" else int(self.forecast)

    @property
    def width(self) -> int:
        return int(self.size.split("x")[0])

    @property
    def height(self) -> int:
        return int(self.size.split("x")[1])

    def to_dict(self) -> dict[str, Any]:
        """What describes the picture: plain values, without those that the schedule does not read."""
        values = asdict(self)
        del values["size"]
        unread = {
            "uniform": ("power", "center", "deeper", "deeper_interval", "full_steps"),
            "power": ("deeper", "deeper_interval", "full_steps"),
            "nested": ("power", "center", "full_steps"),
            "steps": ("interval", "power", "center", "deeper", "deeper_interval"),
        }[self.schedule]
        kept = {name: value for name, value in values.items() if name not in unread}
        return {**kept, "width": self.width, "height": self.height}


FIELDS = tuple(field.name for field in fields(Settings))
"""In the order in which the page sends them."""


def _text(values: Mapping[str, object], name: str) -> str:
    value = values.get(name)
    value = "" if value is None else value
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        given = f"{len(value)} characters" if isinstance(value, str) else f"{value!r:.40}"
        raise OptionError(f"{_name(name)} must be text of at most {LONGEST_TEXT} characters, got {given}.")
    return value


def _number(values: Mapping[str, object], name: str, low: float, high: float) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise OptionError(f"{_name(name)} must be a number from {low:g} to {high:g}, got {value!r:.40}.")
    return float(value)


def _integer(values: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value % 1:
        raise OptionError(f"{_name(name)} must be a whole number from {low} to {high}, got {value!r:.40}.")
    return int(value)


def _one_of(values: Mapping[str, object], name: str, known: list[str] | tuple[str, ...]) -> str:
    value = values.get(name)
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{_name(name)} must be one of {', '.join(known)}, got {value!r:.40}.")
    return value


def _numbers(text: str) -> list[int]:
    parts = [part for part in re.split(r"[\s,]+", text.strip()) if part]
    if not all(re.fullmatch(r"[0-9]{1,3}", part) for part in parts):
        raise OptionError(f"Full steps must be step numbers as in 0, 5, 10, got {text!r:.40}.")
    return [int(part) for part in parts]


def _name(name: str) -> str:
    return name.replace("_", " ").capitalize()
