"""Events that belong to a page, not to one of its components."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.context import Context

PULSE = 5.0
"""Seconds."""


def pulse() -> None:
    """An event that does nothing, so that no other waits for ever.

    gradio closes the stream of a page when its last event is answered. One that is asked for while the closing is on its way is answered
    into no stream, counts as pending, and keeps its like from being asked again, until any other event opens the stream and brings what waits.
    """
    gr.Timer(PULSE).tick(lambda: None, trigger_mode="multiple", show_progress="hidden", api_visibility="private")


def on_load(*args: Any, **kwargs: Any) -> Any:
    """`Blocks.load` of the page that is being built: whenever somebody opens or reloads it."""
    assert Context.root_block is not None
    return Context.root_block.load(*args, **kwargs)
