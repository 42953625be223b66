"""`DeepCacheSDHelper` as published: parameters, on, off."""

from __future__ import annotations

import weakref
from typing import Any

from deepcache_fx.compat.published import ByTimestep, helper_branch
from deepcache_fx.compat.switch import AS_PUBLISHED, Switch
from deepcache_fx.errors import DeepCacheError, OptionError


class DeepCacheSDHelper:
    """In place of `DeepCache.DeepCacheSDHelper`: the same constructor, methods and images, with compiled graphs.

    What is captured is kept while it is off. Each run is as with a helper newly enabled: the published one goes on with
    the phase and the features of the run before.

    Args:
        pipe: A diffusers pipeline with a `.unet` and a `.scheduler`.
        options: Arguments of `deepcache_fx.optimize`, such as `backend`. `forecast` is 0 where it is not given.

    Example:
        >>> helper = DeepCacheSDHelper(pipe=pipe)
        >>> helper.set_params(cache_interval=3, cache_branch_id=0)
        >>> helper.enable()
        >>> image = pipe(prompt).images[0]
        >>> helper.disable()
    """

    def __init__(self, pipe: Any = None, **options: Any) -> None:
        if refused := sorted(options.keys() & {"interval", "branch", "schedule", "preset"}):
            raise OptionError(f"{refused[0]} is not an option of DeepCacheSDHelper: set_params says it")
        self.pipe = pipe
        self.options = {**AS_PUBLISHED, **options}
        self._switch = Switch()
        self.set_params()

    def set_params(self, cache_interval: int = 1, cache_branch_id: int = 0, skip_mode: str = "uniform") -> None:
        """Every `cache_interval`-th step is full; 1 caches nothing. While it is on, from the next UNet call.

        Args:
            cache_interval: At least 1.
            cache_branch_id: The skip connection, three to a block, counted from the output.
            skip_mode: "uniform"; the published code knows no other.

        Raises:
            DeepCacheError: a value makes no sense.
        """
        if skip_mode != "uniform":
            raise OptionError(f"skip_mode must be 'uniform', got {skip_mode!r}")
        ByTimestep(cache_interval, weakref.ref(self))
        helper_branch(None, cache_branch_id)
        self.params = {
            "cache_interval": cache_interval,
            "cache_layer_id": cache_branch_id % 3,
            "cache_block_id": cache_branch_id // 3,
            "skip_mode": skip_mode,
        }
        self._branch_id = cache_branch_id
        if self._switch.is_on:
            self.enable()

    def enable(self, pipe: Any = None) -> None:
        """Cache from the next call of the pipeline on; of this one, where one is given.

        Raises:
            DeepCacheError: there is no pipeline, or its UNet cannot be optimised.
        """
        if pipe is not None and pipe is not self.pipe:
            self.disable()
            self.pipe = pipe
        if self.pipe is None:
            raise DeepCacheError("there is no pipeline: DeepCacheSDHelper(pipe=pipe), or enable(pipe)")
        schedule = ByTimestep(self.params["cache_interval"], weakref.ref(self.pipe))  # type: ignore[arg-type]
        branch = helper_branch(self.pipe.unet, self._branch_id)
        self._switch.on(self.pipe, schedule=schedule, branch=branch, **self.options)

    def disable(self) -> None:
        """Run the pipeline as it was before. Nothing where nothing is enabled."""
        self._switch.off()
