"""The generated code of graphs: torch.fx keeps the source of every graph module there ever was, for tracebacks."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import graph_module


@contextmanager
def sources_forgotten() -> Iterator[None]:
    """Sources of graph modules that are made in the block are given up at its end: a capture makes a dozen."""
    kept: dict[str, Any] = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
    before = set(kept)
    try:
        yield
    finally:
        for name in [name for name in tuple(kept) if name not in before]:
            kept.pop(name, None)
            linecache.cache.pop(name, None)
