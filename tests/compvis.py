"""A U-Net written outside diffusers, in the style of CompVis: input, middle and output blocks, a stack of skips."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TIMESTEPS = torch.arange(950, -1, -50)
INPUTS: dict[str, Any] = {
    "x": torch.randn(2, 4, 8, 8),
    "timesteps": torch.tensor([1, 1]),
    "context": torch.randn(2, 3, 6),
}
"""Of one call of `CompVisUNet`."""


def timestep_embedding(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, cout))
        self.out_layers = nn.Sequential(nn.GroupNorm(4, cout), nn.SiLU(), nn.Conv2d(cout, cout, 3, padding=1))
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(context, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        query = self.q(self.norm(x).reshape(b, c, h * w).transpose(1, 2))
        key, value = self.kv(context).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return x + self.out(mixed).transpose(1, 2).reshape(b, c, h, w)


class Stage(nn.ModuleList):
    """Layers in a row, each given what it takes (TimestepEmbedSequential)."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, Attention):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class CompVisUNet(nn.Module):
    """`model(x, timesteps, context)`: (b, c, h, w), (b,), (b, tokens, width) -> (b, c, h, w)."""

    def __init__(self, channels: int = 8, mult: tuple[int, ...] = (1, 2), blocks: int = 1, context: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        emb = 4 * channels
        self.width = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(4, channels, 3, padding=1)])])
        widths, ch = [channels], channels
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(Stage([ResBlock(ch, factor * channels, emb)]))
                ch = factor * channels
                widths.append(ch)
            if level < len(mult) - 1:
                self.input_blocks.append(Stage([nn.Conv2d(ch, ch, 3, stride=2, padding=1)]))
                widths.append(ch)
        self.middle_block = Stage([ResBlock(ch, ch, emb), Attention(ch, context), ResBlock(ch, ch, emb)])
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers: list[nn.Module] = [ResBlock(ch + widths.pop(), factor * channels, emb)]
                ch = factor * channels
                if level and i == blocks:
                    layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(nn.GroupNorm(4, ch), nn.SiLU(), nn.Conv2d(ch, 4, 3, padding=1))
        self.eval()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.width))
        hs, h = [], x
        for module in self.input_blocks:
            h = module(h, emb, context)
            hs.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb, context)
        return self.out(h)


@torch.no_grad()
def denoise(
    model: nn.Module,
    timesteps: torch.Tensor,
    seed: int = 0,
    batch: int = 2,
    size: int = 8,
    stop: int | None = None,
) -> torch.Tensor:
    """A denoising loop of one's own over a tensor of timesteps: no pipeline, no scheduler."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, 3, 6, generator=generator)
    for index, t in enumerate(timesteps):
        if index == stop:
            break
        x = x - 0.1 * model(x, t.expand(batch), context)
    return x
