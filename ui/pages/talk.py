"""Chat and compare."""

from __future__ import annotations

import gradio as gr

from ..place import Place

TITLE, PATH = "Chat and compare", "/chat"


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Chat and compare")
