"""Arguments that are no tensors in the key of a call: by value, or by what they hold; a change never goes unnoticed."""

from __future__ import annotations

import copy
import enum
import functools
import types
import uuid
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn

from deepcache_fx.graph.signature import Call, CallReader, UnsupportedInput


class Model(nn.Module):
    def forward(self, x: Any, t: Any, /, extra: Any = None, *args: Any, more: Any = None, **rest: Any) -> Any:
        raise NotImplementedError


MODEL = Model()
READER = CallReader(Model.forward)
X = torch.randn(2, 4, 8, 8)


def read(extra: Any, **rest: Any) -> Call:
    return READER.read(MODEL, (X, 1, extra), rest)


def key(extra: Any, **rest: Any) -> Any:
    return read(extra, **rest).key


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Box:
    strength = 1.0

    def __init__(self, held: Any) -> None:
        self.held = held

    def method(self, x: Any) -> Any:
        return x


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class DirectPrograms(Box):
    def __call__(self, x: Any) -> Any:
        return x * SCALE


@dataclass
class Record:
    scale: float
    mask: Any = None
    inner: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    scale: float
    mask: Any = None


Named = namedtuple("Named", ["a", "b"])
SCALE = 0.5


def adding(amount: Any) -> Any:
    return lambda x: x + amount


def scaled(x: Any) -> Any:
    return [y * SCALE for y in x]


def by_default(x: Any, *, scale: float = 1.0) -> Any:
    return x * scale


EQUAL: dict[str, Any] = {
    "uuid": lambda: uuid.UUID(int=3),
    "enum": lambda: Color.RED,
    "dtype": lambda: torch.float16,
    "nan": lambda: float("inf") - float("inf"),
    "nan in a list": lambda: {"a": [float("inf") * 0]},
    "nan in an object of values": lambda: Record(float("inf") * 0),
    "numpy number": lambda: np.float32(0.5),
    "numpy nan": lambda: np.float64("nan"),
    "array": lambda: np.arange(3.0),
    "set": lambda: {"b", "a"},
    "frozen record": lambda: Frozen(0.5, [1]),
    "record": lambda: Record(0.5, inner={"a": (1, None)}),
    "namespace": lambda: types.SimpleNamespace(a=1),
    "empty namespace": lambda: types.SimpleNamespace(),
    "a function made anew": lambda: adding(0.5),
    "partial": lambda: functools.partial(by_default, scale=2.0),
    "slice": lambda: slice(0, 2),
    "deque": lambda: deque([1, 2]),
    "bytearray": lambda: bytearray(b"12"),
    "complex": lambda: 1j,
    "a method of a module": lambda: torch.relu,
}


@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL)
def test_equal_values_in_other_objects_are_the_same_key(make: Any) -> None:
    assert key(make()) == key(make())
    assert hash(key(make())) == hash(key(make()))
    assert key({"deep": [make()]}) == key({"deep": [make()]})


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "uuid": (uuid.UUID(int=3), uuid.UUID(int=4)),
    "enum": (Color.RED, Color.BLUE),
    "true and one": (True, 1),
    "one and one": (1, 1.0),
    "signed zeros": (0.0, -0.0),
    "signed zeros in an object": (Frozen(0.0), Frozen(-0.0)),
    "nan and none": (float("nan"), None),
    "list and tuple": ([1], (1,)),
    "set and frozenset": ({1}, frozenset({1})),
    "tuple and named tuple": ((1, 2), Named(1, 2)),
    "dictionary and ordered": ({"a": 1}, OrderedDict(a=1)),
    "names that are equal": ({1: "a"}, {True: "a"}),
    "record": (Record(0.5), Record(0.25)),
    "record and frozen": (Record(0.5), Frozen(0.5)),
    "arrays": (np.arange(3.0), np.arange(3.0) + 1),
    "array types": (np.arange(3, dtype=np.int32), np.arange(3, dtype=np.float32)),
    "array and number": (np.zeros(()), np.float64(0)),
    "closures": (adding(0.5), adding(0.25)),
    "closures over equal values": (adding(1), adding(True)),
    "functions": (lambda x: x, lambda x: x),
    "partials": (functools.partial(by_default, scale=2.0), functools.partial(by_default, scale=3.0)),
    "objects": (Box(1), Box(1)),
    "methods": (Box(1).method, Box(1).method),
    "classes": (Box, Slotted),
    "modules": (nn.Identity(), nn.Identity()),
    "tensors that are held": (Box(torch.ones(1)), Box(torch.ones(1))),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_value_is_another_key(one: Any, other: Any) -> None:
    assert key(one) == key(one)
    assert key(one) != key(other)
    assert key({"deep": [one]}) != key({"deep": [other]})


def attribute(box: Any) -> None:
    box.held = 2


def changed_cell() -> Any:
    amount = 1

    def function(x: Any) -> Any:
        return x + amount

    def change() -> None:
        nonlocal amount
        amount = 2

    return function, change


def changed_global() -> Any:
    def change() -> None:
        global SCALE
        SCALE = 0.25 if SCALE == 0.5 else 0.5

    return change


def changes() -> dict[str, tuple[Any, Any]]:
    box, slotted, nested, called = Box(1), Slotted(1), Box(Box({"a": [1]})), DirectPrograms(1)
    mask, layer, array, items = torch.ones(2), nn.Linear(2, 2), np.ones(2), {"a": [1]}
    deep = nn.Sequential(nn.Sequential(nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))))
    cell, change_cell = changed_cell()
    cycle = Box(None)
    cycle.held = [cycle, {"scale": 1}]

    def default(x: Any, scale: float = 1.0) -> Any:
        return x * scale

    def with_attribute(x: Any) -> Any:
        return x * with_attribute.scale  # type: ignore[attr-defined]

    with_attribute.scale = 1  # type: ignore[attr-defined]

    class Own(Box):
        bias = 1

    own = Own(1)
    return {
        "attribute": (box, lambda: attribute(box)),
        "slot": (slotted, lambda: attribute(slotted)),
        "nested attribute": (nested, lambda: nested.held.held["a"].append(2)),
        "attribute behind a method": (Box(box).method, lambda: attribute(box) or setattr(box, "held", 3)),
        "attribute behind a partial": (functools.partial(by_default, nested), lambda: setattr(nested, "held", 0)),
        "class attribute": (own, lambda: setattr(Own, "bias", 2)),
        "cell": (cell, change_cell),
        "default": (default, lambda: setattr(default, "__defaults__", (2.0,))),
        "keyword default": (by_default, lambda: by_default.__kwdefaults__.update(scale=2.0)),
        "function attribute": (with_attribute, lambda: setattr(with_attribute, "scale", 2)),
        "code": (default, lambda: setattr(default, "__code__", (lambda x, scale=1.0: x).__code__)),
        "global in a comprehension": (scaled, changed_global()),
        "global of a callable object": (called, changed_global()),
        "wrapped function": (functools.wraps(cell)(lambda *args: cell(*args)), lambda: change_cell()),
        "tensor written into": (adding(mask), lambda: mask.add_(1)),
        "layer written into": (adding(layer), lambda: layer.weight.detach().zero_()),
        "layer deep inside": (adding(deep), lambda: deep[0][0][0][0][0].bias.detach().zero_()),
        "layer replaced": (adding(layer), lambda: setattr(layer, "bias", nn.Parameter(torch.ones(2)))),
        "mode of a layer": (adding(deep), lambda: deep[0][0].train(False)),
        "array": (adding(array), lambda: array.fill(2)),
        "items of a dictionary": (adding(items), lambda: items["a"].append(2)),
        "a cycle": (cycle, lambda: cycle.held[1].update(scale=2)),
    }


@pytest.mark.parametrize("name", changes())
def test_what_changes_inside_of_a_function_or_an_object_changes_the_key(name: str) -> None:
    if name == "wrapped function":
        function, change = changed_cell()
        value: Any = functools.wraps(function)(lambda *args: function(*args))
    else:
        value, change = changes()[name]
    before, nested = key(value), key({"patches": [value]})
    assert before == key(value)
    change()
    assert key(value) != before
    assert key({"patches": [value]}) != nested
    assert key(value) == key(value)


def test_the_model_itself_is_not_read_where_a_function_leads_to_it() -> None:
    patch = adding(Box(MODEL))
    before = key(patch)
    MODEL.note = object()
    assert key(patch) == before
    del MODEL.note


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Record(0.5, t, {"a": [t]}),
        lambda t: Frozen(0.5, (t, {"b": t})),
        lambda t: types.SimpleNamespace(t=t, u=1),
        lambda t: Named(t, [t]),
        lambda t: OrderedDict(b=t, a=t),
        lambda t: BaseOutput(sample=t),
        lambda t: {"a": {"b": (t, [t])}, "c": torch.Size([1])},
    ],
)
def test_tensors_in_containers_and_records_are_inputs_and_not_part_of_the_key(make: Any) -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    call = read(make(one), more=make(one), other=make(one))
    assert call.key == read(make(other), more=make(other), other=make(other)).key
    assert len(call.tensor_names()) == len(set(call.tensor_names())) == len(call.tensors)
    assert call.tensor_names()[:2] == ["x", "t"]
    fresh = [torch.full_like(t, i) for i, t in enumerate(call.tensors)]
    args, kwargs = READER.rebuild(call, fresh)
    again = READER.read(MODEL, args, kwargs)
    assert again.key == call.key
    assert all(a is b for a, b in zip(again.tensors, fresh, strict=True))
    assert type(args[2]) is type(make(one))


def test_a_rebuilt_call_shares_objects_and_copies_what_forward_may_write_into() -> None:
    box, shared, unique, array = Box(1), {"n": 1}, {1}, np.ones(2)
    record = Record(0.5, inner={"a": 1})
    ordered = OrderedDict(b=1, a=2)
    given = {"box": box, "one": shared, "two": [shared], "set": unique, "array": array, "r": record, "o": ordered}
    before = copy.deepcopy({name: value for name, value in given.items() if name not in ("box", "array")})
    args, _ = READER.rebuild(read(given), list(read(given).tensors))
    made = args[2]
    assert made["box"] is box
    assert made["one"] is made["two"][0]
    assert list(made["o"]) == ["b", "a"]
    made["one"]["n"], made["array"][0], made["r"].scale, made["r"].inner["a"], made["o"]["c"] = 2, 5, 1, 2, 3
    made["set"].add(2)
    made["new"] = 1
    assert {name: value for name, value in given.items() if name not in ("box", "array")} == before
    assert array.tolist() == [1, 1]


def test_a_call_tells_its_functions_and_objects() -> None:
    box, function = Box(1), adding(1)
    call = read({"a": [box, X, 1, None, uuid.UUID(int=1)], "b": Record(0.5, function)}, more=Color.RED, other=MODEL)
    assert call.objects() == [box, function, MODEL]


def test_large_arrays_and_arrays_of_objects_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedInput, match=r"argument extra .*NumPy array of 8388608 bytes, .*pass a tensor"):
        key(np.zeros(2**20))
    with pytest.raises(UnsupportedInput, match=r"NumPy array of Python objects"):
        key(np.array([object()]))


def test_positional_and_further_arguments_with_tensors_keep_their_places() -> None:
    first, second = torch.ones(1), torch.ones(2)
    call = READER.read(MODEL, (X, 1, None, first, {"a": second}), {"z": first, "b": second})
    args, kwargs = READER.rebuild(call, list(call.tensors))
    assert args[3] is first
    assert args[4]["a"] is second
    assert (kwargs["z"] is first, kwargs["b"] is second) == (True, True)


def ignoring(*paths: str) -> Any:
    reader = CallReader(Model.forward, ignore=paths)
    return lambda extra, **rest: reader.read(MODEL, (X, 1, extra), rest)


def test_ignored_values_are_not_part_of_the_key_and_tensors_among_them_are_inputs() -> None:
    read = ignoring("extra.uuids", "extra.deep.er", "step")
    t = torch.ones(2)

    def call(number: Any, tensor: Any = t, **rest: Any) -> Call:
        return read({"uuids": [number, tensor, number], "deep": {"er": number, "kept": 1}}, **rest)

    one, other = call(1, step=1), call(iter([2]), 2 * t, step=2)
    assert one.key == other.key == call(3).key
    assert one.tensors[2] is t
    assert torch.equal(other.tensors[2], 2 * t)
    assert one.key != call(1, torch.ones(3)).key
    assert one.key != call(1, None).key
    assert one.key != call(1, other=2).key
    assert read({"deep": {"kept": 1}}).key == read({"deep": {"kept": 1, "er": 5}, "uuids": []}).key
    assert read({"deep": {"kept": 1}}).key != read({"deep": {"kept": 2}}).key
    assert read({"deep": None}).key != read({"deep": {}}).key


def test_an_argument_is_ignored_as_a_whole_by_its_name() -> None:
    read = ignoring("extra", "more")
    assert read({"a": 1}, more=2).key == read(None).key == read([object()], more=object()).key
    assert read({"a": X}).key != read({"b": X}).key
