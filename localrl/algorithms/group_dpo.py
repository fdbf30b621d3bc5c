"""Group DPO: preferences between the rollouts of one prompt, with fixed reward weights. The baseline of gradient-directed weights.

DPO, arXiv 2305.18290, applied to a group: with u(y) = beta (log pi(y) - log pi_ref(y)), better rollouts should have the larger u. The loss couples
the whole group, so its derivative c_i by each u_i is taken first (from a reading without gradient), and the surrogate sum_i c_i u_i is
differentiated row by row: the first-order gradient is the same, memory does not grow with the group (GroupDPO, arXiv 2604.15602).
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from localrl.algebra import group_moments, token_mean, weighted_total
from localrl.algorithms.base import Algorithm, Columns, Picture
from localrl.batch import Batch, Loss, Readout


class Credit(NamedTuple):
    """What a rollout's probability should do."""

    slope: Tensor
    """(B,) derivative of the step's loss by u."""
    good: Tensor
    """(B, T) weight of each token in the mean of the language-model loss: rollouts above their group's mean."""


class GroupDPO(Algorithm):
    """Group-wise direct preference optimisation with fixed reward weights."""

    name: Literal["group_dpo"] = "group_dpo"
    """Group-wise direct preference optimisation."""
    beta: float = Field(0.1, gt=0)
    """How sharply log-probability ratios count as preference."""
    pairs: Literal["pairwise", "softmax"] = "pairwise"
    """pairwise: every pair of a group whose scores differ. softmax: those above the group's mean against all."""
    margin: float = Field(0.0, ge=0)
    """Score difference (standard deviations, weighted sum) from which a pair counts."""
    lm_coef: float = Field(0.0, ge=0)
    """Weight of a language-model loss on rollouts above their group's mean."""

    learns_from_old = True
    decouples_rewards = True
    needs_contrast = True
    reports: ClassVar[tuple[str, ...]] = ("group_dpo/slope", "lm_loss")
    pictures: ClassVar[tuple[Picture, ...]] = (
        Picture(
            "Slope of the preference",
            "How strongly the group still pulls: towards 0 once good answers are far likelier than bad ones.",
            ("group_dpo/slope",),
        ),
        Picture(
            "Language-model loss",
            "Of the answers that are imitated, in nats; 0 where none is.",
            ("lm_loss",),
        ),
    )

    @property
    def reads_before(self) -> Columns:
        return frozenset({"logp", "ref"})

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        assert readout.logp is not None
        assert readout.ref is not None
        mean, std = group_moments(batch.rewards, batch.group)
        score = weighted_total((batch.rewards - mean) / (std + 1e-4), batch.weights)
        u = self.beta * ((readout.logp - readout.ref) * batch.mask).sum(1)
        loss = pairwise if self.pairs == "pairwise" else softmax
        groups = batch.group.unique()
        slope = torch.zeros_like(u)
        for number in groups:
            rows = ((batch.group == number) & ~score.isnan()).nonzero().squeeze(1)
            with torch.enable_grad():
                part = u[rows].detach().requires_grad_(True)
                value = loss(part, score[rows], self.margin)
            if value is not None:
                slope[rows] = torch.autograd.grad(value, part)[0] / len(groups)
        return Credit(slope, token_mean(batch.mask & (score > 0)[:, None]))

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        assert readout.logp is not None
        value = (credit.slope * self.beta * (readout.logp * batch.mask).sum(1)).sum()
        stats = {"group_dpo/slope": credit.slope.abs().sum()}
        if self.lm_coef:
            lm = -(credit.good * readout.logp).sum()
            stats["lm_loss"], value = lm.detach(), value + self.lm_coef * lm
        return Loss(value, stats)


def pairwise(u: Tensor, score: Tensor, margin: float) -> Tensor | None:
    """Mean of -log sigmoid(u_i - u_j) over pairs with score_i > score_j + margin; None: no such pair. (n,), (n,) -> ()."""
    better = score[:, None] > score[None] + margin
    return -F.logsigmoid(u[:, None] - u[None])[better].mean() if better.any() else None


def softmax(u: Tensor, score: Tensor, margin: float) -> Tensor | None:
    """-log of the share that rollouts with a positive score have in the sum of e^u; None: all or none are positive. (n,), (n,) -> ()."""
    good = score > margin
    return u.logsumexp(0) - u[good].logsumexp(0) if good.any() and not good.all() else None
