"""Which tests `make test` runs: the representatives, and nothing falls between the targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.conftest import SLOWEST_FIRST
from tests.families import examples, family

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def marked(params: list[Any]) -> list[tuple[Any, bool]]:
    """Values, and whether only `make test-all` runs them."""
    return [(param.values, bool(param.marks)) for param in params]


def test_all_but_the_representatives_are_left_to_make_test_all() -> None:
    assert marked(family("abc", "b")) == [(("a",), True), (("b",), False), (("c",), True)]
    assert marked(family({"x": 1, "y": 2}, "x", "y")) == [(("x",), False), (("y",), False)]
    assert marked(family([("x", 1), ("y", 2)], "y")) == [(("x", 1), True), (("y", 2), False)]


def test_a_representative_that_is_no_member_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'d'.*no such members"):
        family("abc", "a", "d")


def test_a_property_is_tried_with_more_examples_in_make_test_all() -> None:
    profile = settings.get_current_profile_name()
    try:
        settings.load_profile("quick")
        assert (examples(4).max_examples, examples(4, 15).max_examples) == (4, 4)
        settings.load_profile("thorough")
        assert (examples(4).max_examples, examples(4, 15).max_examples) == (40, 15)
    finally:
        settings.load_profile(profile)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("hypothesis", [False, True])
@pytest.mark.parametrize("thorough", [False, True])
def test_every_test_is_run_by_a_target_and_properties_by_two(gpu: bool, hypothesis: bool, thorough: bool) -> None:
    expressions = dict(re.findall(r"^(test\S*):.*\n.* -m (?:\"([^\"]+)\"|gpu)", MAKEFILE.read_text(), re.MULTILINE))
    names = {"gpu": gpu, "hypothesis": hypothesis, "thorough": thorough, "comfyui": False, "web": False}
    targets = {name for name, text in expressions.items() if eval(text or "gpu", {}, names)}
    if gpu:
        assert targets == {"test-gpu"}
    elif hypothesis and not thorough:
        assert targets == {"test", "test-all"}
    else:
        assert targets == {"test-all" if thorough else "test"}


def test_modules_that_come_first_are_there() -> None:
    assert set(SLOWEST_FIRST) <= {path.stem for path in Path(__file__).parents[1].rglob("test_*.py")}
