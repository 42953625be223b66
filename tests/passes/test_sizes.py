"""Sizes that are symbols, in the graph of a layer that was exported with them."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from passes.shared.match import eliminate_dead_code, is_op
from passes.shared.sizes import hint, is_size, layout, read_from_inputs, symbols

aten = torch.ops.aten
AUTO = torch.export.Dim.AUTO


class Tokens(nn.Module):
    """Reads a size of what a convolution has made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return x.new_ones(y.shape[0], y.shape[2] * y.shape[3])


@pytest.fixture
def module() -> fx.GraphModule:
    axes = {0: AUTO, 2: AUTO, 3: AUTO}
    program = torch.export.export(Tokens(), (torch.ones(2, 2, 8, 6),), strict=False, dynamic_shapes=(axes,))
    made = program.module(check_guards=False)
    assert isinstance(made, fx.GraphModule)
    return made


def test_what_was_computed_for_its_size_alone_is_not_computed_any_more(module: fx.GraphModule) -> None:
    assert read_from_inputs(module.graph)
    eliminate_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    assert not [node for node in module.graph.nodes if is_op(node, aten.conv2d.default)]
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")
    for shape in ((2, 2, 8, 6), (3, 2, 9, 5), (5, 2, 4, 12)):
        assert torch.equal(module(torch.ones(shape)), Tokens()(torch.ones(shape)))


def test_sizes_stay_where_the_inputs_lack_one(module: fx.GraphModule) -> None:
    before = str(module.graph)
    assert not read_from_inputs(module.graph, [])
    assert str(module.graph) == before


def test_a_graph_of_numbers_is_left_as_it_is() -> None:
    made = torch.export.export(Tokens(), (torch.ones(2, 2, 8, 6),), strict=False).module(check_guards=False)
    before = str(made.graph)
    assert read_from_inputs(made.graph)
    assert str(made.graph) == before


def test_layouts_are_compared_without_asking_what_a_symbol_is(module: fx.GraphModule) -> None:
    value = module.graph.find_nodes(op="placeholder")[-1].meta["val"]
    shape_env = value.fake_mode.shape_env
    before = len(shape_env.guards)
    assert layout(value) == layout(value.clone())
    assert layout(value) != layout(value.transpose(2, 3))
    assert len(shape_env.guards) == before
    assert len(symbols(value)) == 3
    assert [hint(size) for size in value.shape] == [2, 2, 8, 6]
    assert any(map(is_size, module.graph.nodes))
