"""Reward lab."""

from __future__ import annotations

import gradio as gr

from ..place import Place

TITLE, PATH = "Reward lab", "/lab"


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Reward lab")
