"""Weights side by side in one storage: what moves, what stays, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes.weight_layout import are_adjacent, lay_out


def attention() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({name: torch.nn.Linear(4, 6) for name in ("q", "k", "v")})


def weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]


def test_moves_weights_into_one_storage_and_back_without_changing_them() -> None:
    model = attention()
    parameters = list(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layout = lay_out([weights(model)])
    assert layout.intact()
    assert layout.has(model["q"].weight)
    assert not layout.has(model["q"].bias)
    assert len({w.untyped_storage().data_ptr() for w in weights(model)}) == 1
    for _ in range(2):
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        layout.undo()  # and a second time it does nothing
        assert not layout.intact()
    addresses = [w.data_ptr() for w in weights(model)]
    layout.undo()
    assert [w.data_ptr() for w in weights(model)] == addresses
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in weights(model))


def test_undoing_keeps_changes_made_in_place() -> None:
    model = attention()
    layout = lay_out([weights(model)])
    with torch.no_grad():
        model["k"].weight.fill_(7)
    layout.undo()
    assert (model["k"].weight == 7).all()
    assert not (model["q"].weight == 7).any()


def test_moving_the_model_parts_the_weights() -> None:
    model = attention()
    layout = lay_out([weights(model)])
    model.to(torch.float64)
    assert not layout.intact()
    model.to(torch.float32)
    layout.undo()
    assert not layout.intact()


def test_a_model_laid_out_is_copied_and_saved_as_before(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = attention()
    lay_out([weights(model)])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin["q"].weight.zero_()
    assert model["q"].weight.any()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_works_on_the_meta_device() -> None:
    model = attention().to("meta")
    layout = lay_out([weights(model)])
    assert layout.intact()
    layout.undo()
    assert not layout.intact()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.zeros(6, 4, dtype=torch.float64), "agree in dtype"),
        (torch.zeros(6, 5), "agree in dtype"),
        (torch.zeros(6, 4, device="meta"), "agree in dtype"),
        (None, "given twice"),
    ],
)
def test_refuses_weights_that_cannot_lie_together_before_any_moves(other: torch.Tensor | None, message: str) -> None:
    model = attention()
    first = weights(model)
    addresses = [w.data_ptr() for w in first]
    last = first[0] if other is None else torch.nn.Parameter(other)
    with pytest.raises(ValueError, match=message):
        lay_out([first[1:], [first[0], last]])
    assert [w.data_ptr() for w in first] == addresses


def test_only_dense_neighbours_in_order_are_adjacent() -> None:
    joined = torch.randn(12, 4)
    a, b, c = joined.split(4)
    assert are_adjacent([a, b, c])
    assert not are_adjacent([a, c])
    assert not are_adjacent([b, a])
    assert not are_adjacent([a, b.clone()])
    assert not are_adjacent([a.t(), b])
    assert not are_adjacent([a, b.view(torch.int32)])
    assert not are_adjacent([a, b.reshape(8, 2)])
