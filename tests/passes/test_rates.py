"""What changes rarely, what of it is held, and that two stages compute what the one graph did."""

from __future__ import annotations

import operator
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from deepcache_fx.graph.macs import total_macs
from deepcache_fx.graph.skips import find_skip_connections
from deepcache_fx.planning.presets import build_unet, preset
from passes import run_passes
from passes.rates import Extracted, Partition, also_return, extract, partition
from passes.shared.match import ancestors, is_op
from passes.split_over_cat import SplitOverCat
from tests.families import examples, thorough
from tests.graphs import GraphBuilder, captured, captured_unet, check_metadata, error, targets

aten = torch.ops.aten


def names(nodes: tuple[fx.Node, ...]) -> list[str]:
    return [node.name for node in nodes]


def read(b: GraphBuilder, *slow: fx.Node) -> fx.Node:
    """A fast value that reads these, whatever their shapes."""
    result = b.input(1)
    for node in slow:
        result = b.op(aten.add.Tensor, result, b.op(aten.sum.default, b.op(aten.mul.Tensor, node, result)))
    return result


def run_stages(stages: Extracted, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Both stages one after the other. The builder's placeholders are x1, x2, ... in the order of the inputs."""
    needed = [node.target for node in stages.first.graph.find_nodes(op="placeholder")]
    everything = {f"x{index + 1}": value for index, value in enumerate(inputs)}
    first_inputs = [everything[str(name)] for name in needed]
    kept = stages.first(*first_inputs)
    check_metadata(stages.first, first_inputs)
    check_metadata(stages.second, [*inputs, *kept])
    return stages.second(*inputs, *kept)


def check_partition(gm: fx.GraphModule, result: Partition, inputs: list[torch.Tensor]) -> Extracted:
    expected = gm(*inputs)
    stages = extract(gm, result.kept)
    assert error(run_stages(stages, inputs), expected) == 0
    return stages


def test_holds_a_product_rather_than_views_of_it() -> None:
    b = GraphBuilder()
    text = b.input(2, 5, 8)
    key = b.op(aten.linear.default, text, b.parameter(12, 8))
    heads = b.op(aten.transpose.int, b.op(aten.view.default, key, [2, 5, 3, 4]), 1, 2)
    gm = b.build(read(b, heads))
    result = partition(gm.graph, {text}, held=True)
    assert names(result.slow) == ["linear_default", "view_default", "transpose_int"]
    assert names(result.moved) == names(result.kept) == ["linear_default"]
    assert result.kept_bytes == 2 * 5 * 12 * 4
    stages = check_partition(gm, result, b.inputs)
    assert targets(stages.first) == [aten.linear.default]
    assert aten.linear.default not in targets(stages.second)


def test_holds_a_part_where_nothing_reads_the_rest() -> None:
    b = GraphBuilder()
    text = b.input(2, 8)
    both = b.op(aten.chunk.default, b.op(aten.linear.default, text, b.parameter(12, 8)), 2, -1)
    gm = b.build(read(b, b.op(operator.getitem, both, 1)))
    result = partition(gm.graph, {text}, held=True)
    assert names(result.kept) == ["getitem"]
    assert result.kept_bytes == 2 * 6 * 4
    stages = check_partition(gm, result, b.inputs)
    [value] = stages.first(b.inputs[0])
    assert value.untyped_storage().nbytes() == 2 * 6 * 4  # a view would hold both halves


def test_holds_the_whole_rather_than_all_of_its_parts() -> None:
    b = GraphBuilder()
    text = b.input(2, 8)
    both = b.op(aten.chunk.default, b.op(aten.linear.default, text, b.parameter(12, 8)), 2, -1)
    gm = b.build(read(b, b.op(operator.getitem, both, 0), b.op(operator.getitem, both, 1)))
    result = partition(gm.graph, {text}, held=True)
    assert names(result.kept) == ["linear_default"]
    check_partition(gm, result, b.inputs)


@pytest.mark.parametrize(
    ("larger", "arguments"),
    [
        (aten.expand.default, ([3, 2, 4],)),
        (aten.to.dtype, (torch.float64,)),
        (aten.repeat.default, ([1, 3],)),
        (aten.constant_pad_nd.default, ([1, 1],)),
    ],
)
def test_leaves_behind_what_only_makes_a_value_larger(larger: torch._ops.OpOverload, arguments: tuple[object]) -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    gm = b.build(read(b, b.op(larger, b.op(aten.linear.default, deep, b.parameter(4, 4)), *arguments)))
    result = partition(gm.graph, {deep})
    assert len(result.slow) == 2
    assert names(result.kept) == names(result.moved) == ["linear_default"]
    check_partition(gm, result, b.inputs)


def test_moves_pointwise_operators_that_make_a_value_no_larger() -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    activated = b.op(aten.silu.default, b.op(aten.linear.default, deep, b.parameter(4, 4)))
    gm = b.build(read(b, b.op(aten.to.dtype, activated, torch.float16)))
    result = partition(gm.graph, {deep})
    assert names(result.kept) == ["to_dtype"]
    assert result.kept_bytes == 2 * 4 * 2
    stages = check_partition(gm, result, b.inputs)
    assert targets(stages.first) == [aten.linear.default, aten.silu.default, aten.to.dtype]


def test_a_value_with_many_readers_is_held_once() -> None:
    """sin and cos of one value are twice its size: they stay behind."""
    b = GraphBuilder()
    deep = b.input(2, 4)
    angle = b.op(aten.linear.default, deep, b.parameter(4, 4))
    gm = b.build(read(b, b.op(aten.sin.default, angle), b.op(aten.cos.default, angle)))
    result = partition(gm.graph, {deep})
    assert names(result.kept) == ["linear_default"]
    check_partition(gm, result, b.inputs)


@pytest.mark.parametrize("work", ["product", "norm", "reduction", "attention"])
def test_all_work_moves_whatever_it_costs_to_hold(work: str) -> None:
    b = GraphBuilder()
    deep = b.input(2, 1, 4, 4)
    if work == "product":
        result = b.op(aten.conv2d.default, deep, b.parameter(8, 1, 1, 1))
    elif work == "norm":
        result = b.op(aten.group_norm.default, b.op(aten.expand.default, deep, [2, 8, 4, 4]), 4)
    elif work == "reduction":
        result = b.op(aten.cumsum.default, b.op(aten.repeat.default, deep, [1, 8, 1, 1]), 1)
    else:
        result = b.op(
            aten.scaled_dot_product_attention.default, b.op(aten.repeat.default, deep, [1, 8, 1, 1]), deep, deep
        )
    gm = b.build(read(b, result))
    found = partition(gm.graph, {deep})
    assert found.kept == (result,)
    assert found.kept_bytes == 8 * 2 * 16 * 4
    check_partition(gm, found, b.inputs)


@pytest.mark.parametrize("held", [True, False])
def test_a_slow_input_costs_nothing_where_it_is_at_hand(held: bool) -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    gm = b.build(read(b, b.op(aten.neg.default, deep)))
    result = partition(gm.graph, {deep}, held=held)
    assert names(result.kept) == (["x1"] if held else ["neg_default"])
    assert result.kept_bytes == (0 if held else 32)
    check_partition(gm, result, b.inputs)


def test_an_input_that_is_held_stays_an_input() -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    gm = b.build(read(b, deep, b.op(aten.linear.default, deep, b.parameter(4, 4))))
    result = partition(gm.graph, {deep})
    assert names(result.kept) == ["x1", "linear_default"]
    assert result.kept_bytes == 64
    stages = check_partition(gm, result, b.inputs)
    assert names(stages.kept) == ["linear_default"]
    assert [node.name for node in stages.second.graph.find_nodes(op="placeholder")] == [
        *("x1", "x2"),
        "kept_linear_default",
    ]


def test_what_depends_on_parameters_alone_is_computed_where_it_is_needed() -> None:
    """A weight that is computed, as from quantised values or LoRA factors, must not be held."""
    b = GraphBuilder()
    deep = b.input(2, 4)
    weight = b.op(aten.mm.default, b.parameter(4, 2), b.parameter(2, 4))
    slow = b.op(aten.linear.default, deep, weight)
    gm = b.build(b.op(aten.linear.default, b.op(aten.mul.Tensor, slow, b.input(2, 4)), weight))
    result = partition(gm.graph, {deep})
    assert names(result.slow) == ["linear_default"]
    stages = check_partition(gm, result, b.inputs)
    for stage in (stages.first, stages.second):
        assert aten.mm.default in targets(stage)
        assert {id(p) for p in stage.parameters()} == {id(p) for p in b.root.parameters()}


def test_a_random_value_is_drawn_anew_at_every_call() -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    gm = b.build(b.op(aten.add.Tensor, deep, b.op(aten.rand_like.default, deep)))
    assert partition(gm.graph, {deep}).slow == ()


def test_a_graph_without_slow_values_holds_nothing() -> None:
    b = GraphBuilder()
    deep, x = b.input(2, 4), b.input(2, 4)
    gm = b.build(b.op(aten.neg.default, x))
    result = partition(gm.graph, {deep})
    assert result == Partition((), (), (), 0)
    stages = check_partition(gm, result, b.inputs)
    assert stages.first() == ()


def test_what_a_moving_node_depends_on_does_not_matter() -> None:
    b = GraphBuilder()
    deep = b.op(aten.linear.default, b.input(2, 4), b.parameter(4, 4))
    gm = b.build(read(b, b.op(aten.linear.default, deep, b.parameter(2, 4))))
    result = partition(gm.graph, {deep})
    assert names(result.slow) == ["linear_default_1"]
    stages = check_partition(gm, result, b.inputs)
    assert targets(stages.first) == [aten.linear.default] * 2


def test_held_values_come_in_the_order_of_the_graph() -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    products = [b.op(aten.linear.default, deep, b.parameter(4, 4)) for _ in range(5)]
    gm = b.build(read(b, *reversed(products)))
    result = partition(gm.graph, {deep})
    assert result.kept == tuple(products)
    assert result == partition(gm.graph, {deep})
    check_partition(gm, result, b.inputs)


def test_outputs_share_no_memory_with_what_is_held() -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    product = b.op(aten.linear.default, deep, b.parameter(4, 4))
    gm = b.build(product, b.op(aten.t.default, product), b.op(aten.neg.default, b.input(1)))
    result = partition(gm.graph, {deep})
    assert names(result.kept) == ["linear_default"]
    stages = check_partition(gm, result, b.inputs)
    kept = stages.first(b.inputs[0])
    before = kept[0].clone()
    for output in stages.second(*b.inputs, *kept):
        output.zero_()
    assert torch.equal(kept[0], before)


def test_a_graph_may_return_what_is_held_beside_its_outputs() -> None:
    b = GraphBuilder()
    deep = b.input(2, 4)
    product = b.op(aten.linear.default, deep, b.parameter(4, 4))
    gm = b.build(b.op(aten.t.default, product), b.op(aten.neg.default, product))
    part = b.graph.find_nodes(op="call_function", target=aten.t.default)[0]
    both = also_return(gm, [product, part])
    check_metadata(both, b.inputs)
    expected = gm(*b.inputs)
    *outputs, first, second = both(*b.inputs)
    assert error(tuple(outputs), expected) == 0
    assert torch.equal(first, expected[0].t())
    assert torch.equal(second, expected[0])
    assert len({value.untyped_storage().data_ptr() for value in (*outputs, first, second)}) == 4
    assert [id(p) for p in both.parameters()] == [id(p) for p in gm.parameters()]
    assert len(gm(*b.inputs)) == 2


def test_a_held_view_with_gaps_is_held_without() -> None:
    b = GraphBuilder()
    deep = b.input(2, 6, 4)
    some = b.op(aten.slice.Tensor, deep, 1, 0, 2)
    gm = b.build(read(b, b.op(aten.neg.default, b.op(aten.reshape.default, some, [2, 8]))))
    result = partition(gm.graph, {deep})
    assert result.kept_bytes == 2 * 2 * 4 * 4
    check_partition(gm, result, b.inputs)


OPERATORS = ["linear", "neg", "half", "double", "view", "expand", "slice", "join", "sum"]


@st.composite
def programs(draw: st.DrawFn) -> tuple[GraphBuilder, fx.Node, fx.GraphModule]:
    """Random operators on a slow, a fast and earlier values; some of the values are returned."""
    b = GraphBuilder(torch.float64)
    deep, x = b.input(2, 4), b.input(2, 4)
    values = [deep, x]
    for _ in range(draw(st.integers(1, 9))):
        a = values[draw(st.integers(0, len(values) - 1))]
        kind = draw(st.sampled_from(OPERATORS))
        if kind == "linear":
            new = b.op(aten.linear.default, a, b.parameter(4, 4))
        elif kind in ("neg", "half"):
            new = b.op(aten.neg.default if kind == "neg" else aten.tanh.default, a)
        elif kind == "double":
            new = b.op(aten.repeat.default, a, [2, 1])
            new = b.op(aten.slice.Tensor, b.op(aten.sin.default, new), 0, 0, 2)
        elif kind == "view":
            new = b.op(aten.view.default, b.op(aten.reshape.default, a, [8]), [2, 4])
        elif kind == "expand":
            new = b.op(aten.expand.default, b.op(aten.slice.Tensor, a, 0, 1, 2), [2, 4])
        elif kind == "slice":
            new = b.op(aten.constant_pad_nd.default, b.op(aten.slice.Tensor, a, 1, 0, 2), [1, 1])
        elif kind == "join":
            new = b.op(aten.add.Tensor, a, values[draw(st.integers(0, len(values) - 1))])
        else:
            new = b.op(aten.sum.dim_IntList, b.op(aten.stack.default, [a, a]), [0])
        values.append(new)
    returned = draw(st.lists(st.sampled_from(values[2:]), min_size=1, max_size=3, unique=True))
    gm = b.build(*(b.op(aten.clone.default, value) for value in returned))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return b, deep, gm


@examples(15)
@given(programs(), st.booleans())
def test_two_stages_compute_what_one_graph_does(
    program: tuple[GraphBuilder, fx.Node, fx.GraphModule], held: bool
) -> None:
    b, deep, gm = program
    result = partition(gm.graph, {deep}, held=held)
    stages = extract(gm, result.kept)
    expected = gm(*b.inputs)
    actual = run_stages(stages, b.inputs)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    work = {aten.linear.default, aten.sum.dim_IntList}
    assert {node for node in result.slow if node.target in work} <= set(result.moved)


@examples(15)
@given(programs())
def test_no_other_choice_holds_fewer_bytes(program: tuple[GraphBuilder, fx.Node, fx.GraphModule]) -> None:
    _, deep, gm = program
    result = partition(gm.graph, {deep})
    work = {aten.linear.default, aten.sum.dim_IntList}
    needed = ancestors([node for node in result.slow if node.target in work]) & {*result.slow, deep}
    optional = [node for node in result.slow if node not in needed]
    best = result.kept_bytes
    for size in range(len(optional) + 1):
        for chosen in combinations(optional, size):
            moved = needed | {deep} | set(chosen)
            if all(
                source in moved for node in moved - {deep} for source in node.all_input_nodes if source.op != "get_attr"
            ):
                frontier = [node for node in moved if any(user not in moved for user in node.users)]
                best = min(best, sum(node.meta["val"].numel() * 8 for node in frontier))
    assert result.kept_bytes == best


def test_the_prompt_stage_of_a_unet_is_its_projections_of_the_text() -> None:
    gm, inputs = captured_unet()
    *_, text = gm.graph.find_nodes(op="placeholder")
    result = partition(gm.graph, {text}, held=True)
    stages = extract(gm, result.kept)
    [needed] = stages.first.graph.find_nodes(op="placeholder")
    assert needed.target == text.target
    assert set(targets(stages.first)) == {aten.linear.default}
    assert len(targets(stages.first)) == len(result.kept) == 2 * 4
    second_text = stages.second.graph.find_nodes(op="placeholder")[2]
    assert second_text.target == text.target
    assert not second_text.users
    with torch.no_grad():
        kept = stages.first(inputs[2])
        assert torch.equal(stages.second(*inputs, *kept)[0], gm(*inputs)[0])
    check_metadata(stages.second, [*inputs, *kept])
    own = {id(p) for p in gm.parameters()}
    assert {id(p) for p in (*stages.first.parameters(), *stages.second.parameters())} == own


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_the_refresh_stage_of_a_unet_is_what_the_deep_feature_alone_decides(index: int) -> None:
    gm, inputs = captured_unet()
    skip = find_skip_connections(gm.graph)[index]
    with torch.no_grad():
        expected = gm(*inputs)
        before = total_macs(ancestors([gm.graph.output_node()], given=[skip.deep])).total
        operands = list(skip.cat.args[0])  # type: ignore[call-overload]
        run_passes(gm, [SplitOverCat(skip.cat.name, alone=operands.index(skip.deep))])
        result = partition(gm.graph, {skip.deep})
        stages = extract(gm, result.kept)
        kept = stages.first(*inputs)
        assert error(stages.second(*inputs, *kept), expected) <= 1e-5
        noise, *again = also_return(gm, result.kept)(*inputs)
        assert error((noise,), expected) <= 1e-5
        assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))
    after = total_macs(stages.second.graph.nodes).total
    assert before - after == total_macs(result.moved).total > 0
    assert sum(is_op(node, aten.conv2d.default) for node in result.moved) == 2


@thorough
@pytest.mark.parametrize(("name", "shallow", "saved"), [("sd15", 63.252, 0.1326), ("sdxl", 98.078, 0.3421)])
def test_hoisting_saves_the_published_share_of_a_shallow_step(name: str, shallow: float, saved: float) -> None:
    """Branch 0 runs the outermost layers alone: without most of its inner ones, a UNet has the same shallow step."""
    given = preset(name)
    config = {
        **given.config,
        "block_out_channels": given.config["block_out_channels"][:2],
        "down_block_types": (given.config["down_block_types"][0], "DownBlock2D"),
        "up_block_types": ("UpBlock2D", given.config["up_block_types"][-1]),
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "layers_per_block": 1,
    }
    unet = build_unet(config)
    gm, _ = captured(unet, **given.inputs(unet))
    skip = find_skip_connections(gm.graph)[0]
    output = gm.graph.output_node()
    before = total_macs(ancestors([output], given=[skip.deep])).total
    assert before / 1e9 == pytest.approx(shallow, abs=1e-3)
    operands = list(skip.cat.args[0])  # type: ignore[call-overload]
    run_passes(gm, [SplitOverCat(skip.cat.name, alone=operands.index(skip.deep))])
    result = partition(gm.graph, {skip.deep})
    after = total_macs(ancestors([output], given=result.kept)).total
    assert 1 - after / before == pytest.approx(saved, abs=1e-4)
    # One half of the convolution and one of the shortcut are held, each as large as the deep feature.
    assert result.kept_bytes == 2 * skip.deep.meta["val"].numel() * 4
