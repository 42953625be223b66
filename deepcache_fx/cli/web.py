"""What `deepcache-fx web` does: load a pipeline, and serve a page that makes pictures with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deepcache_fx.cli import options as option
from deepcache_fx.cli.compare import DEFAULT_PROMPT
from deepcache_fx.comparing import loading
from deepcache_fx.errors import DeepCacheError

EMBEDDED = Path(__file__).parents[2] / "benchmarks" / "models" / "fashion-t2i"
"""Of a checkout; an installed package has none."""
EMBEDDED_GUIDANCE, USUAL_GUIDANCE = 4.0, 7.5


def web_command(
    model: Annotated[
        str | None,
        typer.Option(help="A pipeline: a directory, or a name on the Hugging Face Hub. Default: a checkout's own."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to serve at. 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    dtype: option.Dtype = None,
    variant: option.Variant = None,
    device: option.Device = None,
    backend: option.Backend = "auto",
    precision: option.Precision = None,
) -> None:
    """Serve a web page that makes pictures with and without caching, on this machine alone unless told otherwise."""
    if importlib.util.find_spec("gradio") is None:
        raise DeepCacheError("the web page needs Gradio: pip install 'deepcache-fx[web]'")
    if model is None and not EMBEDDED.is_dir():
        raise DeepCacheError("name a pipeline with --model: only a checkout of the repository has one of its own")
    where = str(EMBEDDED) if model is None else model
    local = loading.check_model(where)
    prompts = loading.read_prompts(where) or (DEFAULT_PROMPT,)
    at = loading.pick_device(device)
    kind = loading.pick_dtype(None if dtype is None else dtype.value, at)
    from deepcache_fx.web import server
    from deepcache_fx.web.line import Line
    from deepcache_fx.web.studio import Studio

    console = Console(stderr=True)
    with server.listen(host, port) as socket:
        with loading.quiet(keep_download_bars=not local):
            console.print(f"loading {where}", markup=False, highlight=False)
            pipe = loading.load_pipeline(where, dtype=kind, device=at, variant=variant)
            studio = Studio(pipe, name=Path(where).name if local else where, backend=backend, precision=precision)
            line = Line()
            app = server.application(
                studio,
                line,
                prompts=prompts,
                guidance_scale=EMBEDDED_GUIDANCE if model is None else USUAL_GUIDANCE,
                hosts=server.LOOPBACK if host in server.LOOPBACK else None,
            )
            shown = f"[{host}]" if ":" in host else host
            console.print(f"http://{shown}:{socket.getsockname()[1]} (Ctrl-C ends it)", markup=False, highlight=False)
            server.serve(app, socket, line)
