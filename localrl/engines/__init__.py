"""Engines: requests become rollouts. The protocol alone, cheap to import; `localrl.engines.torch` samples from the weights that learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from localrl.batch import Request, Rollout
    from localrl.sections import RolloutSettings


class Engine(Protocol):
    """Whoever samples. An answer may be to an earlier question: nobody assumes that it matches the last one asked."""

    exact: bool
    """Samples come from the very weights that learn."""

    def generate(self, requests: list[Request], version: int, *, settings: RolloutSettings | None = None) -> list[Rollout]:
        """Rollouts, in whole groups: one for each request, or, where sampling goes on elsewhere, those that are ready by now.

        `version` is the policy's step, and part of the random stream's name. `settings`: other sampling settings for this call."""
        ...

    def follow(self, save_weights: Callable[[Path], None], version: int) -> None:
        """The policy has been updated `version` times: sample from it as it is now. An engine that shares its weights has nothing to do."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the last calls of `generate` did: `rollout/...`."""
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...
