"""GDPO: every reward is normalised within its group before they are summed, so that different combinations stay different.

Paper: Group reward-Decoupled normalization Policy Optimization, arXiv 2601.05242. Semantics of TRL's `normalize_then_sum`:
a missing reward (NaN) is left out of the statistics, a rollout without any reward gets no credit. The last normalisation runs
over all rollouts of the step: per micro-batch it would destroy the magnitudes that decoupling keeps.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import group_moments, standardise, weighted_total
from localrl.algorithms.grpo import Clipped
from localrl.batch import Batch


class GDPO(Clipped):
    """GDPO with decoupled normalisation, on the clipped objective."""

    name: Literal["gdpo"] = "gdpo"
    """Group reward-Decoupled normalisation."""
    advantage_epsilon: float = Field(1e-4, gt=0)
    """Added to both standard deviations."""

    decouples_rewards = True
    reports: ClassVar[tuple[str, ...]] = (*Clipped.reports, "conflicting_rewards")

    def advantage(self, batch: Batch) -> Tensor:
        mean, std = group_moments(batch.rewards, batch.group)
        decoupled = (batch.rewards - mean) / (std + self.advantage_epsilon)
        return standardise(weighted_total(decoupled, batch.weights), self.advantage_epsilon)

    def observe(self, batch: Batch, credit: tuple[Tensor, ...]) -> dict[str, float]:
        """Share of rollouts on which two rewards disagree in sign: what decoupling is for."""
        signs = torch.sign(batch.rewards - group_moments(batch.rewards, batch.group)[0])
        return {"conflicting_rewards": ((signs > 0).any(1) & (signs < 0).any(1)).float().mean().item()}
