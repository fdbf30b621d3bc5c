"""Events that belong to a page, not to one of its components."""

from __future__ import annotations

from typing import Any

from gradio.context import Context


def on_load(*args: Any, **kwargs: Any) -> Any:
    """`Blocks.load` of the page that is being built: whenever somebody opens or reloads it."""
    assert Context.root_block is not None
    return Context.root_block.load(*args, **kwargs)
