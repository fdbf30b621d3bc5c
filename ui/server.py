"""The web server: this machine only unless told otherwise, nothing from elsewhere in the pages, nothing to other pages.

Three headers do most of it. The content policy lets a page load nothing but from here, so that neither gradio's own links to fonts and scripts of others nor
anything in a model's answer reaches the network. The Host must be the one that was listened on: a page elsewhere that has its name point here gets nothing.
No other site may frame a page.
"""

from __future__ import annotations

import hmac
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localrl.sockets import is_here

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' ws: wss:; worker-src 'self' blob:; frame-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


class Guarded:
    """ASGI around the pages: only asked for by a Host that is allowed, and with the headers above on everything."""

    def __init__(self, app: Any, allowed: Callable[[str], bool]) -> None:
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        heads = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not self.allowed(_host(heads.get("host", ""))) or not self._own(heads):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this address is not served here"})
            return

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, told)

    def _own(self, heads: dict[str, str]) -> bool:
        """A request that a page of another site makes says so in Origin."""
        origin = heads.get("origin")
        return origin in (None, "null") or origin.split("://")[-1] == heads.get("host")


def _host(header: str) -> str:
    """Without its port.

    >>> _host("127.0.0.1:7860"), _host("[::1]:80"), _host("localhost")
    ('127.0.0.1', '::1', 'localhost')
    """
    return header[1 : header.index("]")] if header.startswith("[") and "]" in header else header.rsplit(":", 1)[0] if ":" in header else header


def application(
    blocks: Any, *, loopback: bool, password: str | None, theme: Any, css: str, allowed_paths: list[str], download: Callable[[str, str], Path | None]
) -> Any:
    """The pages as an ASGI application, guarded. `password`: asked for from everybody (user name: localrl). `download`: (token, name) -> the file."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
    from fastapi import FastAPI
    from starlette.responses import FileResponse, PlainTextResponse, Response

    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @outer.get("/download/{token}/{name:path}")
    async def fetch(token: str, name: str) -> Response:
        path = download(token, name)
        return PlainTextResponse("there is no such file: open the page again", 404) if path is None else FileResponse(path, filename=path.name)

    def right(name: str, given: str) -> bool:
        return name == "localrl" and hmac.compare_digest(given.encode(), (password or "").encode())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SSR mode")                # it is off, and gradio says so all the same
        inner = gr.mount_gradio_app(
            outer, blocks, path="/", auth=right if password else None, theme=theme, css=css,
            auth_message="The password that `localrl ui` was started with; the user is: localrl", footer_links=[], allowed_paths=allowed_paths,
            ssr_mode=False, show_error=True, max_file_size="64mb", enable_monitoring=False, mcp_server=False, pwa=False,
        )  # fmt: skip
    return Guarded(inner, is_here if loopback else lambda host: True)


def serve(app: Any, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Until Ctrl-C. `ready` is called once requests are answered."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, access_log=False)
    Server(config).run(sockets=[bound])
