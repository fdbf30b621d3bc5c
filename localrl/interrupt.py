"""Ctrl-C at the right moment: never between an update and its record."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupts:
    """While open, Ctrl-C, `kill` and a closed terminal all raise KeyboardInterrupt, at once or, after `hold`, at `release`.

    Signals reach the main thread only: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.held = self.waiting = False
        self._before: dict[Any, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if not self.held:
            raise KeyboardInterrupt
        self.waiting = True

    def hold(self) -> None:
        """From here on there is no way back: an interrupt waits."""
        self.held = True

    def release(self) -> None:
        """All is written down. Raises KeyboardInterrupt if one came meanwhile."""
        self.held = False
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt
