"""The cheapest way to part a directed graph in two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable


class Network:
    """Points and directed edges with capacities.

    Example:
        >>> network = Network()
        >>> network.add("source", "a", 3)
        >>> network.add("a", "sink", 2)
        >>> network.sink_side("source", "sink")
        {'sink'}
    """

    def __init__(self) -> None:
        self._capacities: Counter[tuple[Hashable, Hashable]] = Counter()

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        self._capacities[start, end] += capacity

    def sink_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """The sink's side of a minimum cut, the smallest one where there are several: what the sink is reached from."""
        import networkx  # slow to import, and only needed here

        graph = networkx.DiGraph([(*edge, {"capacity": capacity}) for edge, capacity in self._capacities.items()])
        graph.add_nodes_from((source, sink))
        found: set[Hashable] = networkx.minimum_cut(graph, source, sink)[1][1]
        return found
