"""Rewards that need no function: a log of responses brings its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from localrl.batch import Rollout
    from localrl.rewards.pool import Report


class Scores(Protocol):
    """What learning needs of rewards."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def weights(self) -> Sequence[float]: ...
    def score(self, rollouts: list[Rollout]) -> list[Rollout]: ...
    def report(self) -> Report: ...


class LoggedRewards:
    """The log's rewards under their names there, each of weight 1."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names: Sequence[str] = tuple(names)
        self.weights: Sequence[float] = (1.0,) * len(self.names)

    def score(self, rollouts: list[Rollout]) -> list[Rollout]:
        """They are scored already."""
        return rollouts

    def report(self) -> Report:
        """Nothing can have gone wrong."""
        from localrl.rewards.pool import Report

        return Report({}, ())
