"""A pass for one kind of step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from deepcache_fx.errors import OptionError
from passes import Pass


@dataclass(frozen=True)
class Only:
    """Applies a pass to the full or to the shallow variant alone, after the split.

    Example:
        >>> deepcache_fx.optimize(pipe, passes=[Only("full", MergeTokens(0.5))])
    """

    variant: Literal["full", "shallow"]
    item: Pass

    def __post_init__(self) -> None:
        if self.variant not in ("full", "shallow"):
            raise OptionError(f'a variant is "full" or "shallow", got {self.variant!r}')
        if not callable(self.item):
            raise OptionError(f"Only takes a PassBase object or a function of a GraphModule, got {self.item!r}")

    def __call__(self, graph_module: fx.GraphModule) -> Any:
        return self.item(graph_module)
