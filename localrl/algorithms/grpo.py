"""GRPO: a rollout is good if its reward is above its group's mean. No critic.

Paper: DeepSeekMath, arXiv 2402.03300, section 4.1. Variants by settings: Dr. GRPO (arXiv 2503.20783): share = fixed_length,
scale_rewards = none; DAPO (arXiv 2503.14476): share = token_mean, epsilon_high = 0.28, rollout.dynamic_sampling = true; GSPO: ratio_level = sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import ShareName, group_moments, k3, mean_per_row, ratio_to, weighted_total
from localrl.algorithms.base import Columns
from localrl.algorithms.on_policy import OnPolicy
from localrl.batch import Batch, Loss, Readout


class Credit(NamedTuple):
    """What the clipped objective needs of each rollout."""

    advantage: Tensor
    """(B,)"""
    share: Tensor
    """(B, T), sums to 1 over the step; where samples are corrected, times the importance weight."""
    old: Tensor | None
    """(B, T) log-probabilities when the step began; None: this is the only update on these rollouts."""
    single: Tensor | None = None
    """(B, 1, R) each reward's own advantage, with the sign of its weight, on the scale of `advantage`; None: nobody steers between them. (Not
    (B, R): a credit's second dimension is cut to a micro-batch's columns.)"""


class Clipped(OnPolicy):
    """The clipped objective that GRPO and its kin share; a subclass says what the advantage is."""

    epsilon: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the probability ratio may push (the lower clip)."""
    epsilon_high: float | None = Field(None, gt=0)
    """How far above 1 it may push; DAPO takes 0.28. Unset: the same as epsilon."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL penalty (k3) against the reference, the base without its adapter. 0: no reference pass."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Clip each token's probability ratio, or the whole response's geometric mean (GSPO, arXiv 2507.18071; its clip range is about 4e-4)."""
    share: ShareName = "token_mean"
    """How tokens are weighed: sequence_mean (GRPO's paper), token_mean (DAPO), fixed_length (Dr. GRPO)."""

    reports: ClassVar[tuple[str, ...]] = ("clip_ratio", "kl")

    @property
    def clip(self) -> tuple[float, float]:
        """The ratio's bounds."""
        return 1 - self.epsilon, 1 + (self.epsilon_high or self.epsilon)

    def ratio(self, logp: Tensor, old: Tensor | None, fresh: Tensor) -> Tensor:
        """(B, T) probability of each token now, over its probability when the step began; or of its response, the same for all its tokens."""
        ratio = ratio_to(logp, old)
        return ratio if self.ratio_level == "token" else mean_per_row(ratio.log(), fresh).exp()[:, None].expand_as(ratio)

    @property
    def reads_during(self) -> Columns:
        return frozenset({"logp", "ref"} if self.beta else {"logp"})

    def advantage(self, batch: Batch) -> Tensor:
        """(B,) what each rollout deserves; 0 where no reward applies."""
        raise NotImplementedError

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        return Credit(self.advantage(batch), self.shared(batch, self.importance(batch, readout), self.share), readout.logp)

    def deserved(self, credit: Credit, directed: Sequence[float] = ()) -> Tensor:
        return credit.advantage

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        assert readout.logp is not None
        ratio = self.ratio(readout.logp, credit.old, batch.fresh)
        (low, high), advantage = self.clip, credit.advantage[:, None]
        per_token = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        stats = {"clip_ratio": (credit.share * clipped).sum()}
        if self.beta:
            assert readout.ref is not None
            kl = k3(readout.logp, readout.ref)
            per_token = per_token + self.beta * kl
            stats["kl"] = (credit.share * kl).sum().detach()
        return Loss((credit.share * per_token).sum(), stats)


class GRPO(Clipped):
    """Group Relative Policy Optimisation: the rewards' weighted sum, centred and scaled within the group."""

    name: Literal["grpo"] = "grpo"
    """Group Relative Policy Optimisation."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide the advantage by the standard deviation of its group, of the whole step, or not at all (Dr. GRPO)."""
    advantage_epsilon: float = Field(1e-4, gt=0)
    """Added to the standard deviation."""

    needs_contrast = True
    lab = (("GRPO", {}),)

    def advantage(self, batch: Batch) -> Tensor:
        total = weighted_total(batch.rewards, batch.weights)
        mean, std = group_moments(total, batch.group)
        centred = total - mean
        if self.scale_rewards == "batch":
            whole = torch.zeros_like(batch.group)
            std = group_moments(total, whole)[1]
        if self.scale_rewards != "none":
            centred = centred / (std + self.advantage_epsilon)
        return centred.nan_to_num(0.0)
