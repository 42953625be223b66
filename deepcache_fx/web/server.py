"""Serves the page, and nothing else: of what Gradio's server answers, only what the page itself asks for.

Uploads, files of the machine, streams and requests on behalf of others are refused before Gradio sees them, and so are
pages of other sites: a browser on this machine may have such a page open.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import fastapi
import gradio as gr
import uvicorn

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.web.line import Line
from deepcache_fx.web.page import CSS, build_page
from deepcache_fx.web.studio import Studio

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

READ = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/queue/data", "/gradio_api/app_id")
READ_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
WRITTEN = ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset")
LONGEST_REQUEST = 64 * 1024
"""Bytes."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; connect-src 'self'; frame-ancestors 'none'; "
    "form-action 'none'; base-uri 'self'"
)
"""What a browser may load: nothing from elsewhere. Gradio's templates are compiled in the page, hence the evals."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Gate:
    """An ASGI application that lets through what the page needs.

    Args:
        inner: Gradio's application.
        hosts: Names that a request may be for; None for any. For a server of this machine alone: other names that
            resolve to it are those of other sites.
    """

    def __init__(self, inner: Any, hosts: tuple[str, ...] | None) -> None:
        self._inner, self._hosts = inner, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        elif scope["type"] == "http" and (refusal := self._refusal(scope)) is None:
            await self._inner(scope, receive, _with_policy(send))
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": refusal, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> int | None:
        """The status that refuses a request, or None."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, path, method = headers.get("host", ""), scope["path"], scope["method"]
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            return 403
        if "origin" in headers and urlsplit(headers["origin"]).netloc != host:
            return 403
        if method == "POST" and path in WRITTEN:
            length = headers.get("content-length", "")
            return None if length.isdigit() and int(length) <= LONGEST_REQUEST else 413
        if method in ("GET", "HEAD") and (path in READ or path.startswith(READ_BELOW)) and ".." not in path:
            return None
        return 404


def _with_policy(send: Send) -> Send:
    async def sending(event: MutableMapping[str, Any]) -> None:
        if event["type"] == "http.response.start":
            added = ((b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"))
            event["headers"] = [*event.get("headers", ()), *added]
        await send(event)

    return sending


def application(
    studio: Studio, line: Line, *, prompts: tuple[str, ...], guidance_scale: float, hosts: tuple[str, ...] | None
) -> Gate:
    """The page as an ASGI application; see `build_page` and `Gate`."""
    page = build_page(studio, line, prompts=prompts, guidance_scale=guidance_scale)
    plain = ["system-ui", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="blue", font=plain, font_mono=["ui-monospace", "monospace"], spacing_size="sm", text_size="sm"
    )
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
    )
    return Gate(app, hosts)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve at; port 0 takes a free one.

    Raises:
        DeepCacheError: the port is taken, or there is no such address here.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise DeepCacheError(f"cannot serve at {host}:{port}: {error.strerror}; choose another --port") from error


def serve(app: Gate, at: socket.socket, line: Line) -> None:
    """Answer until Ctrl-C; then stop everyone's run."""
    server = make_server(app)
    try:
        server.run(sockets=[at])
    finally:
        line.close()


def make_server(app: Gate) -> uvicorn.Server:
    """uvicorn, which says what is wrong only; open streams do not hold it up when it ends."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
