"""The minimum cut against all cuts."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from passes.shared.minimum_cut import Network
from tests.families import examples

Edges = dict[tuple[int, int], int]
POINTS = 6
SOURCE, SINK = 0, POINTS - 1


def cost(edges: Edges, sink_side: set[int]) -> int:
    return sum(capacity for (start, end), capacity in edges.items() if start not in sink_side and end in sink_side)


def network(edges: Edges) -> Network:
    result = Network()
    for (start, end), capacity in edges.items():
        result.add(start, end, capacity)
    return result


def test_cuts_the_cheaper_of_two_edges_in_a_row() -> None:
    assert network({(0, 1): 3, (1, 5): 2}).sink_side(0, 5) == {5}
    assert network({(0, 1): 2, (1, 5): 3}).sink_side(0, 5) == {1, 5}


def test_of_cuts_that_cost_the_same_takes_the_smallest_sink_side() -> None:
    assert network({(0, 1): 2, (1, 2): 2, (2, 5): 2}).sink_side(0, 5) == {5}


def test_capacities_of_parallel_edges_add_up() -> None:
    parallel = Network()
    parallel.add("a", "b", 1)
    parallel.add("a", "b", 1)
    parallel.add("b", "c", 1)
    assert parallel.sink_side("a", "c") == {"c"}


edges = st.dictionaries(
    st.tuples(st.integers(0, POINTS - 1), st.integers(0, POINTS - 1)).filter(lambda edge: edge[0] != edge[1]),
    st.integers(0, 5),
)


@examples(50)
@given(edges)
def test_no_cut_is_cheaper_and_none_as_cheap_is_smaller(edges: Edges) -> None:
    found = network(edges).sink_side(SOURCE, SINK)
    between = range(1, POINTS - 1)
    sides = [{SINK, *chosen} for size in range(POINTS - 1) for chosen in combinations(between, size)]
    cheapest = min(cost(edges, side) for side in sides)
    assert SOURCE not in found
    assert found == set.intersection(*(side for side in sides if cost(edges, side) == cheapest))
