"""Live run."""

from __future__ import annotations

import gradio as gr

from ..place import Place

TITLE, PATH = "Live run", "/live"


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Live run")
