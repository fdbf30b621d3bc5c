"""A trial: rewards, completions, what the one said of the other. One JSON file, so that weights can be moved without running anything again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from localrl.batch import Rollout
from localrl.folder import clean, write_whole
from localrl.lab.samples import as_row, of_row
from localrl.lab.score import health_of
from localrl.rewards import Health, RewardSettings
from localrl.settings import UserError


@dataclass(frozen=True)
class Trial:
    """Everything that the lab shows is computed from this."""

    settings: RewardSettings
    rollouts: tuple[Rollout, ...]
    """With one reward for each of the settings' functions; NaN: none."""
    limit: int
    source: str
    health: Mapping[str, Health]
    troubles: Mapping[str, str]
    messages: tuple[str, ...]
    probes: Mapping[str, tuple[Rollout, ...]]
    gram: tuple[tuple[float, ...], ...] | None = None
    """Inner products of the rewards' gradients on these completions, each as if its weight were positive; None: nobody asked for them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards', in order."""
        return self.settings.names

    @property
    def weights(self) -> tuple[float, ...]:
        """As they were when it was run."""
        return self.settings.weights

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_whole(path, json.dumps(clean(self.to_dict()), ensure_ascii=False))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a missing reward is NaN."""
        return {
            "rewards": self.settings.model_dump(mode="json"), "limit": self.limit, "source": self.source, "gram": self.gram,
            "health": {name: asdict(health) for name, health in self.health.items()}, "troubles": dict(self.troubles), "messages": list(self.messages),
            "rows": [_row(rollout) for rollout in self.rollouts], "probes": {kind: [_row(r) for r in rows] for kind, rows in self.probes.items()},
        }  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Trial:
        """UserError if the file is none."""
        try:
            values = json.loads(path.read_text("utf-8"))
            return cls(
                RewardSettings.model_validate(values["rewards"]), _rollouts(values["rows"]), int(values["limit"]), str(values["source"]),
                {name: health_of(health) for name, health in values["health"].items()}, dict(values["troubles"]), tuple(values["messages"]),
                {kind: _rollouts(rows) for kind, rows in values["probes"].items()},
                None if values["gram"] is None else tuple(tuple(float(v) for v in row) for row in values["gram"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no trial ({type(error).__name__}): try again") from None


def _row(rollout: Rollout) -> dict[str, Any]:
    return {**as_row(rollout), "rewards": list(rollout.rewards)}


def _rollouts(rows: Sequence[Mapping[str, Any]]) -> tuple[Rollout, ...]:
    return tuple(replace(of_row(row), rewards=tuple(math.nan if v is None else float(v) for v in row["rewards"])) for row in rows)
