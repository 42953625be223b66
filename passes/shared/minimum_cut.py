"""The cheapest way to part a directed graph in two (Edmonds and Karp, 1972)."""

from __future__ import annotations

from collections import defaultdict, deque
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
        self._residual: dict[Hashable, dict[Hashable, int]] = defaultdict(dict)

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        self._residual[start][end] = self._residual[start].get(end, 0) + capacity
        self._residual[end].setdefault(start, 0)

    def sink_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """The sink's side of a minimum cut, the smallest one where there are several (Edmonds and Karp)."""
        while path := self._augmenting_path(source, sink):
            flow = min(self._residual[start][end] for start, end in path)
            for start, end in path:
                self._residual[start][end] -= flow
                self._residual[end][start] += flow
        seen, stack = {sink}, [sink]
        while stack:
            end = stack.pop()
            for start in self._residual[end]:
                if start not in seen and self._residual[start][end] > 0:
                    seen.add(start)
                    stack.append(start)
        return seen

    def _augmenting_path(self, source: Hashable, sink: Hashable) -> list[tuple[Hashable, Hashable]]:
        came_from: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue and sink not in came_from:
            start = queue.popleft()
            for end, capacity in self._residual[start].items():
                if capacity > 0 and end not in came_from:
                    came_from[end] = start
                    queue.append(end)
        path: list[tuple[Hashable, Hashable]] = []
        while sink in came_from and sink != source:
            path.append((came_from[sink], sink))
            sink = came_from[sink]
        return path
