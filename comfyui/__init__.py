"""DeepCache FX as nodes of ComfyUI. Clone or link this folder into `custom_nodes`; needs `pip install deepcache-fx`.

Start reading at `nodes`. Only `nodes` imports ComfyUI, and of deepcache_fx only public functions are used.
"""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI asks for the nodes of this folder."""
    from .nodes import DeepCacheFXExtension

    return DeepCacheFXExtension()
