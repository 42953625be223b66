"""Calls in canonical form: equal calls have equal keys, different ones do not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepcache_fx.graph.signature import CallReader, UnsupportedInput
from tests.families import examples


class Shut:
    """Compares by value and shows none."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "closed"


def endless() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


class Model(nn.Module):
    def forward(
        self, sample: Any, timestep: Any, states: Any = None, extra: Any = None, scale: float = 1.0, **rest: Any
    ) -> Any:
        raise NotImplementedError


MODEL = Model()
READER = CallReader(Model.forward)
X, S = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)


def key(*args: Any, **kwargs: Any) -> Any:
    return READER.read(MODEL, args, kwargs).key


def test_position_keyword_and_default_are_the_same_call() -> None:
    assert key(X, 1, S) == key(sample=X, timestep=1, states=S) == key(X, timestep=1, states=S, extra=None, scale=1.0)


def test_the_order_of_dictionaries_does_not_matter() -> None:
    a, b = torch.ones(1), torch.ones(2)
    one = READER.read(MODEL, (X, 1), {"extra": {"a": a, "b": b}})
    other = READER.read(MODEL, (X, 1), {"extra": {"b": b, "a": a}})
    assert one.key == other.key
    assert [t.shape for t in one.tensors] == [t.shape for t in other.tensors]


def test_another_timestep_is_the_same_key_and_another_kind_of_timestep_is_not() -> None:
    assert key(X, 1) == key(X, 2) == key(X, torch.tensor(3))
    assert key(X, 1.0) == key(X, 0.5)
    assert key(X, 1) != key(X, 1.0)
    assert key(X, torch.tensor([1, 2])) != key(X, 1)


@pytest.mark.parametrize(
    "other",
    [
        lambda: key(X[:1], 1, S),
        lambda: key(X.double(), 1, S),
        lambda: key(X.to(memory_format=torch.channels_last), 1, S),
        lambda: key(X.to("meta"), 1, S),
        lambda: key(X, 1, S[:, :2]),
        lambda: key(X, 1, None),
        lambda: key(X, 1, S, scale=0.5),
        lambda: key(X, 1, S, extra={"a": S}),
        lambda: key(X, 1, S, extra=[S]),
        lambda: key(X, 1, S, extra=(S,)),
        lambda: key(X, 1, S, more=2),
    ],
)
def test_any_other_difference_is_another_key(other: Any) -> None:
    assert other() != key(X, 1, S)


def test_autocast_is_part_of_the_key() -> None:
    plain = key(X, 1)
    with torch.autocast("cpu", torch.bfloat16):
        half = key(X, 1)
    with torch.autocast("cpu", torch.float16):
        other = key(X, 1)
    assert len({plain, half, other}) == 3


def test_a_number_becomes_a_tensor_of_the_type_diffusers_gives_it() -> None:
    whole, real = READER.read(MODEL, (X, 7), {}), READER.read(MODEL, (X, 7.5), {})
    assert whole.timestep is not None
    assert real.timestep is not None
    assert (whole.timestep.dtype, real.timestep.dtype) == (torch.int64, torch.float64)
    assert whole.tensors[1] is whole.timestep


def test_a_rebuilt_call_has_the_new_tensors_in_order() -> None:
    call = READER.read(MODEL, (X, 1), {"extra": {"b": S, "a": X}, "more": [S, 3]})
    fresh = [torch.full_like(t, i) for i, t in enumerate(call.tensors)]
    args, kwargs = READER.rebuild(call, fresh)
    again = READER.read(MODEL, args, kwargs)
    assert again.key == call.key
    assert all(a is b for a, b in zip(again.tensors, fresh, strict=True))


def test_a_rebuilt_call_names_all_but_the_sample() -> None:
    """A decorated forward may look for it there: diffusers' looks for the scale of a LoRA."""
    call = READER.read(MODEL, (X, 1), {"states": S, "more": 3})
    args, kwargs = READER.rebuild(call, list(call.tensors))
    assert (len(args), list(kwargs)) == (1, ["timestep", "states", "extra", "scale", "more"])


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedInput, match=r"argument extra cannot be part of a key: .*iterator .* used up"):
        key(X, 1, extra={"a": iter([1])})
    with pytest.raises(
        UnsupportedInput, match=r"argument extra .*: Shut closed may change, and does not show what it holds"
    ):
        key(X, 1, extra=Shut())
    with pytest.raises(UnsupportedInput, match=r"argument extra .*: it holds more than 2000 values, .*`ignore`"):
        key(X, 1, extra=lambda: MANY)
    with pytest.raises(UnsupportedInput, match=r"argument rest holds itself"):
        key(X, 1, more=endless())
    with pytest.raises(UnsupportedInput, match="argument sample is no tensor but list"):
        key([X], 1)


def test_arguments_that_do_not_fit_are_a_type_error_as_ever() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'timestep'"):
        key(X)


MANY = list(range(3000))
NAMES = ("sample", "timestep", "states", "extra", "scale", "unknown")


def bind(function: Any, *call: Any) -> tuple[inspect.BoundArguments | None, str]:
    model, args, kwargs = call
    try:
        return inspect.signature(function).bind(model, *args, **kwargs), ""
    except TypeError as error:
        return None, str(error)


@examples(30)
@given(st.integers(0, 7), st.sets(st.sampled_from(NAMES)))
def test_the_quick_way_to_bind_arguments_agrees_with_pythons(positional: int, keywords: set[str]) -> None:
    class Plain(nn.Module):
        def forward(self, sample: Any, timestep: Any, states: Any = None, extra: Any = 5, scale: float = 1.0) -> Any:
            raise NotImplementedError

    model, reader = Plain(), CallReader(Plain.forward)
    args = (X, *range(1, positional))[:positional]
    kwargs = {name: (X if name == "sample" else 10 + NAMES.index(name)) for name in sorted(keywords)}
    bound, message = bind(Plain.forward, model, args, kwargs)
    if bound is None:
        with pytest.raises(TypeError) as caught:
            reader.read(model, args, kwargs)
        assert str(caught.value) == message
        return
    bound.apply_defaults()
    expected = {name: value for name, value in bound.arguments.items() if name not in ("self", "timestep")}
    actual = dict(reader.read(model, args, kwargs).arguments)
    assert float(actual.pop("timestep")) == bound.arguments["timestep"]
    assert list(actual) == list(expected)
    assert all(actual[name] is expected[name] for name in expected)


def test_a_tensor_subclass_is_another_key() -> None:
    class Marked(torch.Tensor):
        pass

    assert key(X.as_subclass(Marked), 1) != key(X, 1)
