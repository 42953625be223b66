"""Import both packages from an installed wheel and run a cached UNet. Started outside the repository."""

from pathlib import Path

import torch
from diffusers import UNet2DModel

import deepcache_fx
import passes

for package in (deepcache_fx, passes):
    where = Path(package.__file__ or "")
    assert "site-packages" in where.parts, f"{package.__name__} came from {where}"
    assert (where.parent / "py.typed").exists(), f"{package.__name__} ships no type information"

unet = UNet2DModel(
    sample_size=8,
    block_out_channels=(8, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    add_attention=False,
).eval()
deepcache_fx.optimize(unet, interval=3)
with torch.no_grad():
    for t in torch.arange(60, 0, -10):
        unet(torch.ones(1, 3, 8, 8), t)
report = deepcache_fx.report(unet)
assert report.last_run == "FssFss", report.last_run
print(report)
