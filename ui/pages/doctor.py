"""Doctor."""

from __future__ import annotations

import gradio as gr

from ..place import Place

TITLE, PATH = "Doctor", "/doctor"


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Doctor")
