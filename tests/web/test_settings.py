"""What visitors send is checked against its bounds, whatever they send."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.schedules.patterns import Nested, Power, Steps, Uniform
from deepcache_fx.web.settings import FIELDS, Choices, Settings
from tests.families import examples

CHOICES = Choices(sizes=((32, 32), (32, 48)), schedulers=("ddim", "heun"), branches=6)
GOOD: dict[str, Any] = {
    "prompt": "a sneaker",
    "negative_prompt": "",
    "seed": 1,
    "steps": 20,
    "scheduler": "ddim",
    "size": "32x48",
    "guidance_scale": 4,
    "schedule": "uniform",
    "interval": 3,
    "power": 1.4,
    "center": 5,
    "deeper": 3,
    "deeper_interval": 3,
    "full_steps": "0, 5 10",
    "branch": 0,
    "forecast": "auto",
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("uniform", Uniform(3)),
        ("power", Power(3, 1.4, 5)),
        ("nested", Nested(3, {3: 3})),
        ("steps", Steps([0, 5, 10])),
    ],
)
def test_each_schedule_is_made_of_its_controls(schedule: str, expected: object) -> None:
    found = Settings.read({**GOOD, "schedule": schedule}, CHOICES)
    assert found.timetable() == expected
    assert (found.width, found.height, found.order) == (32, 48, "auto")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("prompt", "  ", "empty"),
        ("prompt", "x" * 1001, "1001 characters"),
        ("prompt", ["a"], "must be text"),
        ("negative_prompt", 3, "must be text"),
        ("seed", -1, "0 to 4294967295"),
        ("seed", 2**32, "0 to 4294967295"),
        ("seed", 0.5, "whole number"),
        ("seed", None, "whole number"),
        ("steps", 0, "1 to 150"),
        ("steps", 10**9, "1 to 150"),
        ("steps", True, "whole number"),
        ("steps", math.nan, "whole number"),
        ("scheduler", "../../etc/passwd", "one of ddim, heun"),
        ("size", "4096x4096", "one of 32x32, 32x48"),
        ("guidance_scale", math.inf, "0 to 30"),
        ("schedule", "random", "one of uniform"),
        ("interval", 0, "1 to 150"),
        ("full_steps", "1; drop", "step numbers as in 0, 5, 10"),
        ("branch", 6, "0 to 5"),
        ("forecast", 1, "one of auto"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_what_may_be(name: str, value: object, told: str) -> None:
    schedule = {"schedule": "steps"} if name == "full_steps" else {}
    with pytest.raises(DeepCacheError, match=told):
        Settings.read({**GOOD, **schedule, name: value}, CHOICES)


def test_deeper_steps_begin_deeper() -> None:
    with pytest.raises(DeepCacheError, match="deeper skip connection than 3"):
        Settings.read({**GOOD, "schedule": "nested", "branch": 3}, CHOICES)


ANYTHING = st.one_of(st.none(), st.text(max_size=20), st.floats(), st.integers(), st.lists(st.integers(), max_size=3))


@examples(20)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_anything_at_all_is_either_in_bounds_or_refused(name: str, value: object) -> None:
    with contextlib.suppress(DeepCacheError):
        found = Settings.read({**GOOD, name: value}, CHOICES)
        assert found.size in ("32x32", "32x48")
        assert 1 <= found.steps <= 150
        assert 0 <= found.branch < 6
        assert len(found.prompt) <= 1000
