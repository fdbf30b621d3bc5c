"""All pages together. A page is a file in `pages/` with TITLE, PATH and `build(place)`; the order here is that of the navigation."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")           # before gradio is imported: it asks at once

import gradio as gr

from .events import pulse
from .look import CSS, theme
from .pages import doctor, export, home, lab, live, new, talk
from .place import Place

PAGES = (home, new, lab, live, talk, export, doctor)


def blocks(place: Place) -> gr.Blocks:
    """Every page, the first one at /."""
    first, *others = PAGES
    with gr.Blocks(title="localrl", analytics_enabled=False) as app:
        gr.Navbar(main_page_name=first.TITLE)
        first.build(place)
        pulse()
    for page in others:
        with app.route(page.TITLE, page.PATH):
            gr.Navbar(main_page_name=first.TITLE)
            page.build(place)
            pulse()
    return app


def application(place: Place, *, loopback: bool = True, password: str | None = None) -> Any:
    """The ASGI application."""
    from . import exporting, server

    return server.application(
        blocks(place), loopback=loopback, password=password, theme=theme(), css=CSS, allowed_paths=[], download=partial(exporting.file_of, place)
    )
