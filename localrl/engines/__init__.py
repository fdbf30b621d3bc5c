"""Engines: requests become rollouts. The protocol alone, cheap to import; `localrl.engines.torch` samples from the weights that learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from localrl.batch import Request, Rollout
    from localrl.config import RolloutSettings


class Engine(Protocol):
    """Whoever samples. An answer may be to an earlier question: nobody assumes that it matches the last one asked."""

    exact: bool
    """Samples come from the very weights that learn."""

    def generate(self, requests: list[Request], version: int, *, settings: RolloutSettings | None = None) -> list[Rollout]:
        """One rollout for each request, in whole groups. `version` is the policy's step, and part of the random stream's name.

        `settings`: other sampling settings for this call (evaluation)."""
        ...

    def load(self, adapter: Path | None, version: int) -> None:
        """Sample from this adapter from now on (None: from the base)."""
        ...
