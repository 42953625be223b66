"""The pass package: what it imports, the runner, the predicates, canonicalisation."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import passes
from passes import Canonicalize, PassError, pass_name, run_passes
from passes.shared.match import ancestors, eliminate_dead_code, is_op, only_user

aten = torch.ops.aten
ALLOWED = {"torch", "triton", "networkx", "sympy", "passes", *sys.stdlib_module_names}


def foreign_imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names - ALLOWED


def test_passes_import_torch_what_comes_with_it_and_the_standard_library_alone() -> None:
    files = list(Path(passes.__file__).parent.rglob("*.py"))
    assert len(files) >= 4
    for file in files:
        assert foreign_imports(file.read_text()) == set(), file.name


def test_the_import_check_can_fail() -> None:
    assert foreign_imports("import deepcache_fx.api\nfrom diffusers import X\nimport torch") == {
        "deepcache_fx",
        "diffusers",
    }


def graph_of(build, *inputs: torch.Tensor) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    """A GraphModule whose graph `build(graph, *placeholders)` makes by hand, with fake values as metadata."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    result = build(graph, *nodes)
    graph.output(result if isinstance(result, tuple) else (result,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(module, mode).propagate(*inputs)
    return module


def check(item: PassBase, module: fx.GraphModule, delta: int, *inputs: torch.Tensor) -> fx.GraphModule:
    """Node delta, truthful flag, a second run that changes nothing, equal values."""
    expected = module(*inputs)
    before = len(module.graph.nodes)
    result, [record] = run_passes(module, [item])
    assert len(result.graph.nodes) - before == delta
    assert record.modified == (delta != 0)
    again = item(result)
    assert not again.modified
    assert again.graph_module is result
    for a, b in zip(result(*inputs), expected, strict=True):
        assert torch.equal(a, b)
    return result


X = torch.randn(2, 3)


def test_canonicalize_drops_a_division_by_one() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        half = g.call_function(aten.div.Tensor, (g.call_function(aten.sin.default, (x,)), 1.0))
        return g.call_function(aten.neg.default, (half,))

    gm = graph_of(build, X)
    result = check(Canonicalize(), gm, -1, X)
    assert all("val" in n.meta for n in result.graph.nodes if n.op != "output")


def test_canonicalize_drops_a_division_with_several_users() -> None:
    def build(g: fx.Graph, x: fx.Node) -> tuple[fx.Node, ...]:
        half = g.call_function(aten.div.Tensor, (g.call_function(aten.neg.default, (x,)), 1))
        return g.call_function(aten.sin.default, (half,)), g.call_function(aten.cos.default, (half,))

    check(Canonicalize(), graph_of(build, X), -1, X)


def test_canonicalize_drops_a_chain_of_divisions() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        x = g.call_function(aten.neg.default, (x,))
        for _ in range(3):
            x = g.call_function(aten.div.Tensor, (x, 1.0))
        return g.call_function(aten.sin.default, (x,))

    check(Canonicalize(), graph_of(build, X), -3, X)


def test_canonicalize_drops_assertions_and_what_only_they_used() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        checked = g.call_function(aten.neg.default, (x,))
        g.call_function(aten._assert_tensor_metadata.default, (checked,), {"dtype": torch.float32})
        return g.call_function(aten.sin.default, (x,))

    check(Canonicalize(), graph_of(build, X), -2, X)


def test_canonicalize_keeps_a_division_that_closes_gaps() -> None:
    x = torch.randn(4, 4)

    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        sparse = g.call_function(aten.slice.Tensor, (g.call_function(aten.sin.default, (x,)), 1, 0, 4, 2))
        dense = g.call_function(aten.div.Tensor, (sparse, 1.0))
        return g.call_function(aten.view.default, (dense, [8]))

    check(Canonicalize(), graph_of(build, x), 0, x)


def test_canonicalize_keeps_a_division_between_an_input_and_an_output() -> None:
    gm = check(Canonicalize(), graph_of(lambda g, x: g.call_function(aten.div.Tensor, (x, 1.0)), X), 0, X)
    assert gm(X)[0].data_ptr() != X.data_ptr()


@pytest.mark.parametrize("divisor", [2.0, -1.0, 0.999])
def test_canonicalize_keeps_a_division_by_anything_else(divisor: float) -> None:
    check(Canonicalize(), graph_of(lambda g, x: g.call_function(aten.div.Tensor, (x, divisor)), X), 0, X)


def test_canonicalize_keeps_a_division_that_changes_the_type() -> None:
    whole = torch.arange(6)
    check(Canonicalize(), graph_of(lambda g, x: g.call_function(aten.div.Tensor, (x, 1)), whole), 0, whole)


def test_canonicalize_drops_a_clone_that_changes_nothing() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = g.call_function(aten.sin.default, (x,))
        return g.call_function(aten.cos.default, (g.call_function(aten.clone.default, (y,)),))

    check(Canonicalize(), graph_of(build, X), -1, X)


@pytest.mark.parametrize(("last", "delta"), [(torch.float16, -2), (torch.float64, -1)])
def test_canonicalize_drops_a_cast_that_only_widens_before_another(last: torch.dtype, delta: int) -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = g.call_function(aten.sin.default, (x,))
        for dtype in (torch.float32, last):
            y = g.call_function(aten.to.dtype, (y, dtype))
        return g.call_function(aten.cos.default, (y,))

    x = X.half()
    check(Canonicalize(), graph_of(build, x), delta, x)


def test_canonicalize_keeps_a_cast_that_rounds_and_one_that_is_a_copy_of_an_input() -> None:
    def rounds(g: fx.Graph, x: fx.Node) -> fx.Node:
        for dtype in (torch.float16, torch.float32):
            x = g.call_function(aten.to.dtype, (x, dtype))
        return g.call_function(aten.cos.default, (x,))

    def copies(g: fx.Graph, x: fx.Node) -> fx.Node:
        for dtype in (torch.float64, torch.float32):
            x = g.call_function(aten.to.dtype, (x, dtype))
        return x

    check(Canonicalize(), graph_of(rounds, X), 0, X)
    gm = check(Canonicalize(), graph_of(copies, X), 0, X)
    assert gm(X)[0].data_ptr() != X.data_ptr()


def test_canonicalize_drops_a_view_to_the_shape_there_is() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = g.call_function(aten.sin.default, (x,))
        for operator in (aten.view.default, aten.reshape.default, aten.expand.default):
            y = g.call_function(operator, (y, [2, 3]))
        return g.call_function(aten.cos.default, (g.call_function(aten.view.default, (y, [3, 2])),))

    check(Canonicalize(), graph_of(build, X), -3, X)


def test_canonicalize_keeps_a_clone_that_makes_its_input_contiguous() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = g.call_function(aten.t.default, (x,))
        return g.call_function(aten.clone.default, (y,), {"memory_format": torch.contiguous_format})

    check(Canonicalize(), graph_of(build, X), 0, X)


def test_canonicalize_drops_what_returns_its_argument() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        x = g.call_function(aten.sin.default, (x,))
        x = g.call_function(aten.dropout.default, (x, 0.5, False))
        x = g.call_function(aten.to.dtype, (x, torch.float32))
        return g.call_function(aten.cos.default, (g.call_function(aten.contiguous.default, (x,)),))

    check(Canonicalize(), graph_of(build, X), -3, X)


def test_canonicalize_keeps_what_changes_type_or_layout_or_copies() -> None:
    def build(g: fx.Graph, x: fx.Node) -> tuple[fx.Node, ...]:
        x = g.call_function(aten.t.default, (x,))
        double = g.call_function(aten.to.dtype, (x, torch.float64))
        copied = g.call_function(aten.to.dtype, (x, torch.float32, False, True))
        return double, copied, g.call_function(aten.contiguous.default, (x,))

    check(Canonicalize(), graph_of(build, X), 0, X)


def test_canonicalize_drops_dropout_of_nothing_in_training() -> None:
    gm = graph_of(
        lambda g, x: g.call_function(aten.neg.default, (g.call_function(aten.dropout.default, (x, 0.0, True)),)), X
    )
    result = Canonicalize()(gm)
    assert result.modified
    assert not gm.graph.find_nodes(op="call_function", target=aten.dropout.default)


def test_canonicalize_keeps_dropout_in_training() -> None:
    gm = graph_of(lambda g, x: g.call_function(aten.dropout.default, (x, 0.5, True)), X)
    assert not Canonicalize()(gm).modified


@pytest.mark.parametrize("through_a_view", [False, True])
def test_canonicalize_keeps_a_clone_between_an_input_and_an_output(through_a_view: bool) -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = g.call_function(aten.view.default, (x, [3, 2])) if through_a_view else x
        return g.call_function(aten.clone.default, (y,))

    gm = check(Canonicalize(), graph_of(build, X), 0, X)
    assert gm(X)[0].data_ptr() != X.data_ptr()


def test_a_record_tells_what_a_pass_left_as_it_was() -> None:
    class Choosy(PassBase):
        declined = ("here: too small",)

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            return PassResult(graph_module, False)

    _, [record] = run_passes(graph_of(lambda g, x: x, X), [Choosy()])
    assert record.declined == ("here: too small",)
    assert str(record).endswith(" ms; left 1 as they were")


def test_a_pass_that_raises_is_named() -> None:
    class BreakThings(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            raise KeyError("oops")

    with pytest.raises(PassError, match=r"pass 'break_things' failed: KeyError: 'oops'"):
        run_passes(graph_of(lambda g, x: x, X), [BreakThings()])


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    def swap_order(gm: fx.GraphModule) -> fx.GraphModule:
        first, second = [n for n in gm.graph.nodes if n.op == "call_function"]
        first.args = (second,)
        return gm

    gm = graph_of(lambda g, x: g.call_function(aten.sin.default, (g.call_function(aten.cos.default, (x,)),)), X)
    with pytest.raises(PassError, match="swap_order"):
        run_passes(gm, [swap_order])


def test_a_pass_that_returns_something_else_is_named() -> None:
    def answer(gm: fx.GraphModule) -> int:
        return 42

    with pytest.raises(PassError, match=r"answer.*returns a GraphModule"):
        run_passes(graph_of(lambda g, x: x, X), [answer])


def test_a_plain_function_is_a_pass_and_gets_its_metadata_refreshed() -> None:
    def double(gm: fx.GraphModule) -> fx.GraphModule:
        output = gm.graph.output_node()
        value = output.args[0][0]  # type: ignore[index]
        with gm.graph.inserting_before(output):
            twice = gm.graph.call_function(aten.add.Tensor, (value, value))
        output.args = ((twice,),)
        return gm

    gm, [record] = run_passes(graph_of(lambda g, x: g.call_function(aten.sin.default, (x,)), X), [double])
    assert torch.equal(gm(X)[0], X.sin() * 2)
    assert (record.name, record.modified, record.nodes_after - record.nodes_before) == ("double", True, 1)
    assert gm.graph.output_node().args[0][0].meta["val"].shape == (2, 3)  # type: ignore[index,union-attr]
    assert "double" in str(record)


def test_a_pass_that_returns_none_did_not_apply() -> None:
    gm = graph_of(lambda g, x: x, X)
    result, [record] = run_passes(gm, [lambda gm: None])
    assert result is gm
    assert not record.modified


def test_pass_names_are_snake_case_classes_or_function_names() -> None:
    assert pass_name(Canonicalize()) == "canonicalize"
    assert pass_name(graph_of) == "graph_of"


def test_predicates_compare_overloads_and_walk_to_the_inputs() -> None:
    gm = graph_of(lambda g, x, y: g.call_function(aten.add.Tensor, (g.call_function(aten.sin.default, (x,)), x)), X, X)
    x, _y, sin, add, _ = gm.graph.nodes
    assert is_op(sin, aten.cos.default, aten.sin.default)
    assert not is_op(sin, aten.sin)  # the packet is not the overload
    assert not is_op(x, aten.sin.default)
    assert only_user(sin) is add
    assert only_user(x) is None
    assert ancestors([add]) == {x, sin, add}


def test_dead_code_elimination_removes_attention_but_keeps_writes_into_inputs() -> None:
    q = torch.randn(1, 1, 4, 8)

    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        g.call_function(aten.scaled_dot_product_attention.default, (x, x, x))
        g.call_function(aten.copy_.default, (x, x))
        return g.call_function(aten.sin.default, (x,))

    gm = graph_of(build, q)
    assert eliminate_dead_code(gm.graph)
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [aten.copy_.default, aten.sin.default]
    assert not eliminate_dead_code(gm.graph)
