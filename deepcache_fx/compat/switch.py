"""Switch a pipeline's cache on and off again, and keep what was captured in between."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from deepcache_fx.api import optimize, restore
from deepcache_fx.runtime.attach import bring_back, runtime_of
from deepcache_fx.runtime.runtime import Runtime

AS_PUBLISHED: dict[str, Any] = {"forecast": 0, "on_failure": "uncached"}
"""Arguments of `optimize`: the cached feature is repeated, and no model is refused."""


class Switch:
    """For one pipeline at a time. What `optimize` had attached to its UNet before `on` is there again after `off`."""

    def __init__(self) -> None:
        self._unet: weakref.ref[torch.nn.Module] | None = None
        self._before: Runtime | None = None
        self._kept: Runtime | None = None
        self.is_on = False

    def on(self, pipe: Any, **options: Any) -> None:
        """Cache, with these arguments of `optimize`; other ones where it is on already.

        Raises:
            DeepCacheError: as of `optimize`; the pipeline is then as it was.
        """
        unet = pipe.unet
        if self.is_on and not self._is_of(unet):
            self.off()
        if not self.is_on:
            self._begin(unet)
        try:
            optimize(pipe, **options)
        except BaseException:
            self.off()
            raise

    def off(self) -> None:
        """Stop caching, and free the cache. Nothing where it is off."""
        unet = self._unet() if self._unet is not None else None
        if not self.is_on or unet is None:
            return
        self.is_on = False
        self._kept = runtime_of(unet) or self._kept  # None where the user called `restore` meanwhile
        if self._kept is not None:
            self._kept.reset()
        restore(unet)
        before, self._before = self._before, None
        if before is not None:
            bring_back(unet, before)

    def _begin(self, unet: torch.nn.Module) -> None:
        if not self._is_of(unet):
            self._unet, self._kept = weakref.ref(unet), None
        self._before = runtime_of(unet)
        if self._kept is not None:
            restore(unet)
            bring_back(unet, self._kept)
        self.is_on = True

    def _is_of(self, unet: torch.nn.Module) -> bool:
        return self._unet is not None and self._unet() is unet

    def __reduce__(self) -> Any:
        """A copy of a pipeline has a switch of its own, which is off."""
        return Switch, ()
