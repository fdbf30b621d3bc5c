"""What kind of device something runs on, and how to pretend another: a plan for a card is made where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Kind = Literal["cuda", "cpu"]
_PRETENDED: ContextVar[Kind | None] = ContextVar("pretended", default=None)

_HEARS: ContextVar[Callable[[torch.Tensor], None] | None] = ContextVar("hears", default=None)


def kind_of(device: torch.device) -> str:
    """"cuda" or "cpu" (or another of torch's): decides which code runs where the two differ.

    >>> with pretending("cuda"):
    ...     kind_of(torch.device("cpu"))
    'cuda'
    """
    return _PRETENDED.get() or device.type


def moved_out(tensor: torch.Tensor) -> torch.Tensor:
    """Says that a tensor was made in the host's memory in order to spare a card's. -> the same."""
    if (hear := _HEARS.get()) is not None:
        hear(tensor)
    return tensor


@contextmanager
def hearing_of_moves(hear: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Hear of every tensor that is moved out while it is open."""
    token = _HEARS.set(hear)
    try:
        yield
    finally:
        _HEARS.reset(token)


@contextmanager
def pretending(kind: Kind | None) -> Iterator[None]:
    """While it is open, every device counts as one of that kind; None: as what it is."""
    token = _PRETENDED.set(kind)
    try:
        yield
    finally:
        _PRETENDED.reset(token)
