"""Trials made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from localrl.batch import Prompt, Request, Rollout
from localrl.lab.trial import Trial
from localrl.rewards import Health, RewardSettings

NAN = float("nan")


def rollouts(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[Rollout, ...]:
    """Groups of completions, each by its rewards."""
    return tuple(
        Rollout(Request(Prompt(number, (1, 2), f"question {number}", {"answer": str(number)}), sample), (3,) * (1 + sample), f"text {sample}", True, 0,
                rewards=tuple(map(float, rewards)))
        for number, group in enumerate(groups) for sample, rewards in enumerate(group)
    )  # fmt: skip


def trial(groups: Sequence[Sequence[Sequence[float]]], weights: Sequence[float], probes: dict[str, Sequence[Sequence[float]]] | None = None) -> Trial:
    """Rewards a, b, ... with these weights."""
    functions = [{"function": "regex", "name": name, "weight": weight, "args": {"pattern": "."}} for name, weight in zip("abcd", weights, strict=False)]
    fakes = {
        kind: tuple(replace(r, rewards=tuple(map(float, v))) for r, v in zip(rollouts([[v] for v in rows]), rows, strict=True))
        for kind, rows in (probes or {}).items()
    }
    settings = RewardSettings.model_validate({"functions": functions})
    return Trial(settings, rollouts(groups), 8, "made by hand", {"a": Health(seconds=0.25)}, {}, (), fakes)
