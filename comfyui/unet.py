"""ComfyUI's UNet as a function of tensors: what deepcache_fx captures. The UNet itself, shared by all clones, stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch

READ = ("patches", "patches_replace", "optimized_attention_override")
"""Of the transformer options, what the UNet calls: functions and objects, which a graph bakes in."""

READ_BY_PATCHES = ("cond_or_uncond", "sigmas")
"""What else most patches read. Without patches nobody does, and its values are no reason for another graph."""

_plain: ContextVar[Callable[[], torch.Tensor]] = ContextVar("plain")


class Withheld:
    """Stands for a transformer option that no graph may take in. Whoever reads it cannot be captured, and hears why."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise LookupError(f"a patch reads transformer_options[{self.name!r}], which is another one from call to call")

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __call__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


_withheld: dict[str, Withheld] = {}


def capturable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Transformer options that a graph may be made with: the others are there, and refuse to be read."""
    has_patches = any(options.get(name) for name in READ)
    read = (*READ, *READ_BY_PATCHES) if has_patches else READ
    return {
        name: value if name in read else _withheld.setdefault(name, Withheld(name)) for name, value in options.items()
    }


class UNetOfTensors(torch.nn.Module):
    """Its forward is what the UNet does past all wrappers; outside a capture, what `running` was given."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.train(unet.training)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            return _plain.get()()  # a call that runs uncached sees the options as they are
        of_tensors: Any = self.unet._forward
        result: torch.Tensor = of_tensors(x, timesteps, context, y, control, transformer_options, **extra)
        return result


@contextmanager
def running(plain: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Within the block an uncached call is this one."""
    token = _plain.set(plain)
    try:
        yield
    finally:
        _plain.reset(token)
