"""New run."""

from __future__ import annotations

import gradio as gr

from ..place import Place

TITLE, PATH = "New run", "/new"


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# New run")
