"""A U-Net that is called as ComfyUI calls its own: patches, wrappers and identifiers in a dictionary of options.

Written after its contract, with none of its code: forward writes where it is into the options, patches read that.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import torch

from tests.compvis import Attention, CompVisUNet, ResBlock, timestep_embedding

Options = dict[str, Any]


class ComfyUNet(CompVisUNet):
    """`model(x, timesteps, context, y, control, transformer_options)`, of which the last four may be left out."""

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: dict[str, list[torch.Tensor | None]] | None = None,
        transformer_options: Options = {},  # noqa: B006 as there
        **kwargs: Any,
    ) -> torch.Tensor:
        def forward(options: Options) -> torch.Tensor:
            return self._forward(x, timesteps, context, control, options)

        for wrapper in transformer_options.get("wrappers", {}).get("diffusion_model", {}).get("ours", []):
            forward = wrapped(wrapper, forward)
        return forward(transformer_options)

    def _forward(self, x: Any, timesteps: Any, context: Any, control: Any, options: Options) -> torch.Tensor:
        options["original_shape"] = list(x.shape)
        emb = self.time_embed(timestep_embedding(timesteps, self.width))
        hs, h = [], x
        for number, module in enumerate(self.input_blocks):
            options["block"] = ("input", number)
            h = self._stage(module, h, emb, context, options)
            hs.append(h)
        options["block"] = ("middle", 0)
        h = self._stage(self.middle_block, h, emb, context, options)
        residuals = control["output"] if control is not None else []
        for number, module in enumerate(self.output_blocks):
            options["block"] = ("output", number)
            skip = hs.pop()
            residual = residuals.pop() if residuals else None
            skip = skip if residual is None else skip + residual
            for patch in options.get("patches", {}).get("output_block_patch", []):
                h, skip = patch(h, skip, options)
            h = self._stage(module, torch.cat([h, skip], dim=1), emb, context, options)
        result: torch.Tensor = self.out(h)
        return result

    def _stage(self, stage: Any, h: Any, emb: Any, context: Any, options: Options) -> Any:
        for layer in stage:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, Attention):
                for patch in options.get("patches", {}).get("attn2_patch", []):
                    context = patch(context, {**options, "n_heads": 1})
                h = layer(h, context)
            else:
                h = layer(h)
        return h


def wrapped(wrapper: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda options: wrapper(inner, options)


class Scaled:
    """A patch that is an object, as most of a program's are."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, h: torch.Tensor, skip: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
        assert options["block"][0] == "output"
        return h * self.strength if options["block"][1] == 3 else h, skip * (2 - self.strength)


def options(*output_patches: Any, attention: Any = (), wrappers: Any = (), cond: tuple[int, ...] = (0, 1)) -> Options:
    """As of one call: identifiers of its conditions, fresh dictionaries, the same functions."""
    return {
        "cond_or_uncond": list(cond),
        "uuids": [uuid.UUID(int=number) for number in cond],
        "sigmas": torch.tensor([1.0]),
        "patches": {"output_block_patch": list(output_patches), "attn2_patch": list(attention)},
        "wrappers": {"diffusion_model": {"ours": list(wrappers)}},
        "callbacks": {},
    }
