"""What a report says of its graphs: each variant as Python that parses, lists every operator, and computes the same."""

from __future__ import annotations

import ast
import copy
import gc
import json
import math
import operator
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import fx

import deepcache_fx
from deepcache_fx import DeepCacheError
from deepcache_fx.graph.listing import listing
from deepcache_fx.graph.split import Variants
from deepcache_fx.runtime.attach import runtime_of
from deepcache_fx.runtime.report import Report
from tests.compvis import CompVisUNet

INPUTS = {"x": torch.randn(2, 4, 8, 8), "timesteps": torch.full((2,), 7.0), "context": torch.randn(2, 3, 6)}
NAMES = ["full", "shallow", "full_prompt"]


@pytest.fixture(scope="module")
def unet() -> CompVisUNet:
    """Cut in the middle of its upper level; only the middle block attends to the prompt."""
    return deepcache_fx.optimize(CompVisUNet(), branch=1, example_inputs=INPUTS)


def variants_of(unet: torch.nn.Module) -> Variants:
    runtime = runtime_of(unet)
    assert runtime is not None
    [entry] = runtime._entries.values()
    return entry.variants


def modules_of(unet: torch.nn.Module) -> dict[str, fx.GraphModule]:
    variants = variants_of(unet)
    assert variants.full.prompt is not None
    return dict(zip(NAMES, (variants.full.step, variants.cuts[0].shallow.step, variants.full.prompt), strict=True))


class Root:
    """A captured graph's attributes, with `[0]` for children that are called "0"."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name, None)
        found = getattr(self._module.model, name) if found is None and hasattr(self._module, "model") else found
        return Root(found) if isinstance(found, torch.nn.Module) else found

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(index))


def execute(text: str, name: str, root: object, inputs: list[torch.Tensor]) -> Any:
    space: dict[str, Any] = {"self": root}
    exec(compile(text, name, "exec"), space)
    return space[name](*inputs)


def test_every_variant_of_every_signature_is_listed(unet: CompVisUNet) -> None:
    found = deepcache_fx.report(unet)
    assert len(found.graphs) == len(found.signatures) == 1
    assert list(found.graphs[0]) == NAMES
    assert found.graphs[0] is found.signatures[0].graphs
    with pytest.raises(KeyError, match="shallow_prompt"):
        found.graphs[0]["shallow_prompt"]


@pytest.mark.parametrize("name", NAMES)
def test_a_listing_is_python_that_names_every_operator_and_module(unet: CompVisUNet, name: str) -> None:
    text, module = deepcache_fx.report(unet).graphs[0][name], modules_of(unet)[name]
    assert text.isascii()
    [function] = [item for item in ast.parse(text).body if isinstance(item, ast.FunctionDef)]
    assert function.name == name
    assert [a.arg for a in function.args.args] == [n.name for n in module.graph.find_nodes(op="placeholder")]
    called = []
    for statement in function.body:
        if isinstance(statement, ast.Assign):
            [target] = statement.targets
            assert isinstance(target, ast.Name)
            value = statement.value
            what = ast.unparse(value.func) if isinstance(value, ast.Call) else "getitem"
            called.append((target.id, what.removeprefix("torch.ops.").split(".")[:2]))
    operators = [node for node in module.graph.nodes if node.op == "call_function"]
    assert called == [(node.name, _packet(node)) for node in operators]
    assert f"# {name}: {len(operators)} operators" in text


def _packet(node: fx.Node) -> list[str]:
    return ["getitem"] if node.target is operator.getitem else str(node.target).split(".")[:2]


@pytest.mark.parametrize("name", NAMES)
def test_a_listing_computes_what_the_graph_does(unet: CompVisUNet, name: str) -> None:
    module = modules_of(unet)[name]
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in values]
    with torch.no_grad():
        expected = module(*inputs)
        found = execute(deepcache_fx.report(unet).graphs[0][name], name, Root(module), inputs)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parameters_are_written_as_the_model_has_them(unet: CompVisUNet) -> None:
    text = deepcache_fx.report(unet).graphs[0]["shallow"]
    assert "# input_blocks.0.0\n    conv2d = aten.conv2d(x, self.input_blocks[0][0].weight," in text
    assert "  # f32[2, 8, 8, 8]" in text
    assert "middle_block" not in text  # the deep half is not there


def test_values_that_are_no_numbers_stay_python() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    odd = graph.get_attr("model.a-b.weight")
    filled = graph.call_function(torch.ops.aten.masked_fill.Scalar, (x, x, -math.inf))
    made = graph.call_function(
        torch.ops.aten.zeros.default, ([2, 3],), {"dtype": torch.float16, "device": torch.device("cpu")}
    )
    total = graph.call_function(operator.add, (filled, odd))
    graph.output((total, made))
    text = listing(fx.GraphModule({"model.a-b.weight": torch.ones(2, 3)}, graph), "odd")
    ast.parse(text)
    assert "masked_fill_scalar = aten.masked_fill(x, x, -inf)" in text
    assert "zeros_default = aten.zeros([2, 3], dtype=torch.float16, device=torch.device('cpu'))" in text
    assert "add = operator.add(masked_fill_scalar, getattr(self, 'a-b').weight)" in text
    assert "import operator\n" in text


def test_plain_values_leave_the_graphs_out_unless_asked(unet: CompVisUNet) -> None:
    found = deepcache_fx.report(unet)
    short, long = found.to_dict(), found.to_dict(graphs=True)
    assert "graphs" not in short["signatures"][0]
    assert short["engaged"] is False
    assert short["signatures"][0]["cuts"][0]["branch"] == 1
    assert json.loads(json.dumps(long))["signatures"][0].pop("graphs") == dict(found.graphs[0])
    assert {**long["signatures"][0], "graphs": None} == {**short["signatures"][0], "graphs": None}
    assert "aten" not in str(found)
    assert "aten" not in repr(found)


def test_nothing_is_written_before_it_is_asked_for(unet: CompVisUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("deepcache_fx.graph.listing.listing", lambda module, name: asked.append(name) or "text")
    found = deepcache_fx.report(unet)
    found.to_dict()
    str(found)
    assert asked == []
    assert found.graphs[0]["shallow"] == "text"
    assert asked == ["shallow"]


def test_a_report_keeps_no_graph_alive_and_says_so() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), example_inputs=INPUTS)
    found = deepcache_fx.report(unet)
    kept = copy.deepcopy(found)
    again: Report = pickle.loads(pickle.dumps(found))
    text: Mapping[str, str] = dict(found.graphs[0])
    deepcache_fx.restore(unet)
    gc.collect()
    with pytest.raises(DeepCacheError, match="have been dropped"):
        found.graphs[0]["shallow"]
    assert kept.graphs[0] == again.graphs[0] == text
    assert found.to_dict() == again.to_dict()
