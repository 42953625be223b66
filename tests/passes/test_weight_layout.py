"""Weights side by side in one storage: what moves, what stays, what is read after anything moved, and the way back."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes.weight_layout import Joined, WeightLayout, lie_together


def attention() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({name: torch.nn.Linear(4, 6) for name in ("q", "k", "v")})


def weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]


def laid_out(model: torch.nn.Module, *groups: list[torch.nn.Parameter]) -> WeightLayout:
    layout = WeightLayout()
    layout.lay_out(groups or [weights(model)], within=model)
    return layout


def own_memory(model: torch.nn.Module) -> bool:
    return all(w.untyped_storage().nbytes() == w.nbytes for w in model.parameters())


def test_moves_weights_into_one_storage_and_back_without_changing_them() -> None:
    model = attention()
    parameters = list(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layout = laid_out(model)
    assert lie_together(weights(model))
    assert layout.has(model["q"].weight)
    assert not layout.has(model["q"].bias)
    assert len({w.untyped_storage().data_ptr() for w in weights(model)}) == 1
    for _ in range(2):
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        layout.undo()  # and a second time it does nothing
        assert own_memory(model)
    addresses = [w.data_ptr() for w in weights(model)]
    layout.undo()
    assert [w.data_ptr() for w in weights(model)] == addresses
    layout.renew(model)
    assert lie_together(weights(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_undoing_keeps_changes_made_in_place_and_memory_that_is_not_ours() -> None:
    model = attention()
    layout = laid_out(model)
    flat = torch.randn(12, 4)
    with torch.no_grad():
        model["k"].weight.fill_(7)
    model["v"].weight.data = flat[6:]
    layout.undo()
    assert (model["k"].weight == 7).all()
    assert not (model["q"].weight == 7).any()
    assert model["v"].weight.data_ptr() == flat[6:].data_ptr()


def test_undoing_leaves_weights_in_memory_of_the_user_that_looks_like_ours() -> None:
    model = attention()
    layout = laid_out(model)
    flat = torch.randn(18, 4)
    for weight, part in zip(weights(model), flat.split(6), strict=True):
        weight.data = part
    layout.renew(model)
    layout.undo()
    assert [w.data_ptr() for w in weights(model)] == [part.data_ptr() for part in flat.split(6)]


def test_groups_that_share_a_weight_lie_in_one_row() -> None:
    """The few weights of the shallow step first: a part of all those of the full one."""
    model = attention()
    q, k, v = weights(model)
    layout = laid_out(model, [v, q], [q, k, v])
    assert lie_together([v, q, k])
    assert [list(map(id, run)) for run in layout.runs([q, v])] == [[id(v), id(q)]]
    assert layout.runs([v, k]) == []


CHANGES: dict[str, Callable[[torch.nn.Module], object]] = {
    "nothing": lambda model: None,
    "in place": lambda model: model["k"].weight.data.mul_(3),
    "to another type and back": lambda model: model.half().float(),
    "one replaced": lambda model: setattr(model["k"].weight, "data", torch.randn(6, 4)),
    "the first replaced": lambda model: setattr(model["q"].weight, "data", torch.randn(6, 4)),
    "all replaced": lambda model: [setattr(w, "data", w.data * 2) for w in weights(model)],
    "all in a user's own memory": lambda model: [
        setattr(w, "data", part) for w, part in zip(weights(model), torch.randn(18, 4).split(6), strict=True)
    ],
    "in a user's own memory, in another order": lambda model: [
        setattr(w, "data", part) for w, part in zip(weights(model), torch.randn(18, 4).split(6)[::-1], strict=True)
    ],
    "transposed where they are": lambda model: [
        setattr(w, "data", w.data.as_strided((6, 4), (1, 6))) for w in weights(model)
    ],
    "two tied": lambda model: setattr(model["k"].weight, "data", model["q"].weight.data),
    "undone": lambda model: [setattr(w, "data", w.data.clone()) for w in weights(model)],
}


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_joined_weights_are_those_of_now_whatever_has_happened(name: str, renewed: bool) -> None:
    model = attention()
    layout = laid_out(model)
    joined, part = Joined(weights(model)), Joined(weights(model)[1:])
    CHANGES[name](model)
    expected = [w.detach().clone() for w in weights(model)]
    if renewed:
        layout.renew(model)
    for one, values in ((joined, expected), (part, expected[1:])):
        assert torch.equal(one.tensor(), torch.cat(values))
        with torch.no_grad():
            one.weights[1].mul_(2)  # and once more
            assert torch.equal(one.tensor()[6:12], one.weights[1])
            one.weights[1].div_(2)
    layout.undo()
    assert all(torch.equal(w, value) for w, value in zip(weights(model), expected, strict=True))


def test_joined_weights_are_no_copy_where_they_lie_together() -> None:
    model = attention()
    laid_out(model)
    joined = Joined(weights(model)).tensor()
    assert joined.data_ptr() == model["q"].weight.data_ptr()
    assert not joined.requires_grad
    assert not joined._is_view()


def test_neighbours_in_separate_allocations_are_not_read_as_one() -> None:
    """A caching allocator may place them so: the addresses follow one another, and no storage holds both."""
    memory = torch.randn(18, 4).numpy()
    model = attention()
    for index, weight in enumerate(weights(model)):
        weight.data = torch.from_numpy(memory[6 * index : 6 * index + 6])
    q, k, _ = weights(model)
    assert k.data_ptr() == q.data_ptr() + q.nbytes
    assert not lie_together([q, k])


def test_renewing_moves_what_has_come_apart_alone() -> None:
    model, other = attention(), attention()
    both = torch.nn.ModuleList([model, other])
    layout = laid_out(both, weights(model), weights(other))
    addresses = [w.data_ptr() for w in weights(model)]
    other.double()
    layout.renew(both)
    assert [w.data_ptr() for w in weights(model)] == addresses
    assert lie_together(weights(other))
    layout.undo()
    assert own_memory(both)


@pytest.mark.parametrize(
    "case", ["tied", "a view of another", "a flat buffer", "another type", "meta", "laid out by another", "transposed"]
)
def test_weights_that_are_not_free_to_move_stay(case: str) -> None:
    model = attention()
    q, k, v = weights(model)
    beside = model
    if case == "tied":
        q.data = k.data
    elif case == "a view of another":
        model.register_buffer("both", torch.randn(12, 4))
        q.data, k.data = model.both[:6], model.both[6:]
    elif case == "a flat buffer":
        q.data, k.data = torch.randn(12, 4).split(6)
    elif case == "another type":
        q.data, k.data = q.data.double(), k.data.half()
    elif case == "meta":
        beside.to("meta")
    elif case == "transposed":
        q.data, k.data = torch.randn(4, 6).t(), torch.randn(4, 6).t()
    else:
        laid_out(model)
    addresses = [w.data_ptr() for w in (q, k, v)]
    layout = laid_out(model)
    assert [w.data_ptr() for w in (q, k, v)] == addresses
    assert not any(map(layout.has, (q, k, v)))


def test_a_tied_weight_does_not_keep_the_others_from_moving() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 6) for name in "abcd"})
    a, b, c, d = weights(model)
    a.data = torch.nn.Parameter(torch.randn(6, 4)).data
    model.register_buffer("alias", a.data)
    layout = laid_out(model, [a, b, c, d])
    assert not layout.has(a)
    assert lie_together([b, c, d])


def test_what_remains_of_a_group_gets_memory_of_its_own() -> None:
    model = attention()
    layout = laid_out(model)
    model["k"] = torch.nn.Linear(4, 6)
    layout.keep_only({id(p) for p in model.parameters()})
    assert own_memory(model)
    assert not layout.has(model["q"].weight)
    layout.lay_out([weights(model)], within=model)
    assert lie_together(weights(model))


def test_a_model_laid_out_is_copied_and_saved_as_before(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = attention()
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        sizes.append(len(file.getvalue()))
        laid_out(model)
    assert sizes[1] <= sizes[0]
    twin = copy.deepcopy(model)
    assert own_memory(twin)
    with torch.no_grad():
        twin["q"].weight.zero_()
    assert model["q"].weight.any()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_gradients_flow_through_weights_that_move_between_the_passes() -> None:
    model, plain = attention(), attention()
    x = torch.randn(3, 4)
    outputs = [sum(layer(x).sin().sum() for layer in m.values()) for m in (model, plain)]
    layout = laid_out(model)
    for output in outputs:
        output.backward()
    layout.undo()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_weights_that_moved_in_inference_mode_can_be_trained() -> None:
    model = attention()
    with torch.inference_mode():
        layout = laid_out(model)
    x = torch.randn(2, 4, requires_grad=True)
    model["q"](x).sum().backward()
    with torch.inference_mode():
        layout.undo()
    model["q"](x).sum().backward()
    with torch.inference_mode():
        born_there = attention()
        assert not laid_out(born_there).has(born_there["q"].weight)


def test_threads_that_renew_at_once_move_the_weights_once() -> None:
    model = attention()
    layout = laid_out(model)
    model.double()
    gate, addresses = threading.Barrier(4), []

    def work() -> None:
        gate.wait()
        layout.renew(model)
        addresses.append([w.data_ptr() for w in weights(model)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(each) for each in addresses}) == 1
    assert lie_together(weights(model))
