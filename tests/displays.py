"""A display for runs within tests."""

from __future__ import annotations

from collections.abc import Callable


class Silent:
    """Shows nothing and keeps what it is told. `on_phase` hears where a run is."""

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None) -> None:
        self.said: list[str] = []
        self.phases: list[str] = []
        self.on_phase = on_phase

    def say(self, text: str) -> None:
        self.said.append(text)

    def phase(self, name: str) -> None:
        self.phases.append(name)
        self.on_phase(name)

    def part(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None: ...
