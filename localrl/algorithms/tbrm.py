"""TBRM: one rollout a prompt, no critic, no importance weights: the model's own logits are the value function.

Paper: Trajectory Bellman Residual Minimization, arXiv 2505.15311, equation 4. With logits as Q, V(s1) is the log-sum-exp of the logits that
predict the first response token, and over a whole response the Bellman residual telescopes to
    V(s1) + log pi(y) - log pi_ref(y) - r / beta,
whoever sampled y. Its square is the loss; at the optimum pi is proportional to pi_ref exp(r / beta).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import group_moments, weighted_total
from localrl.algorithms.base import Algorithm, Columns, Picture
from localrl.batch import Batch, Loss, Readout, lengths

DRIFT = 50.0
"""Nats that V(s1) may move before it is said."""


class Credit(NamedTuple):
    """(B,) each."""

    target: Tensor
    """log pi_ref(y) + r / beta."""
    value: Tensor
    """What stands for V(s1) beside the logits, or in their place: a constant for the gradient."""
    weight: Tensor
    """Of the row's squared residual in the loss; 0: no reward."""
    part: Tensor
    """Of the row in the metrics' means."""


class TBRM(Algorithm):
    """Trajectory Bellman Residual Minimisation."""

    name: Literal["tbrm"] = "tbrm"
    """Trajectory Bellman Residual Minimisation."""
    beta: float = Field(0.002, gt=0)
    """KL strength: the optimum is pi_ref exp(r / beta). The paper has 0.002; smaller is sharper."""
    value_mode: Literal["logit", "logit+bias", "vargrad"] = "logit"
    """V(s1): the first logits' log-sum-exp (paper); the same plus the constant that fits the step best; or the group's mean residual alone (TBA)."""
    scale: Literal["none", "beta2", "length"] = "beta2"
    """The squared residual as it is, times beta squared (in units of the reward; the same under Adam, but gradient clipping sees sane numbers),
    or divided by the response's length."""

    learns_from_old = True
    reports: ClassVar[tuple[str, ...]] = ("tbrm/value", "tbrm/residual", "tbrm/residual_mean", "tbrm/residual_square", "tbrm/reward_variance")
    pictures: ClassVar[tuple[Picture, ...]] = (
        Picture(
            "Bellman residual",
            "Mean size of what is still to be explained (nats), and its mean with sign; both should go towards 0.",
            ("tbrm/residual", "tbrm/residual_mean"),
        ),
        Picture(
            "Residual against reward",
            "Square of the residual beside the variance of the reward over beta: above it the policy explains less than nothing.",
            ("tbrm/residual_square", "tbrm/reward_variance"),
        ),
        Picture(
            "Value of the first state",
            "Log-sum-exp of the first logits (nats); if it runs away, the scale of the logits drifts.",
            ("tbrm/value",),
        ),
    )

    @property
    def group_size(self) -> int:
        return 2 if self.value_mode == "vargrad" else 1

    @property
    def reads_before(self) -> Columns:
        more = {"logit": (), "logit+bias": ("logp", "lse"), "vargrad": ("logp",)}
        return frozenset({"ref", *more[self.value_mode]})

    @property
    def reads_during(self) -> Columns:
        return frozenset({"logp"} if self.value_mode == "vargrad" else {"logp", "lse"})

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        assert readout.ref is not None
        total = weighted_total(batch.rewards, batch.weights)
        known = ~total.isnan()
        target = (readout.ref * batch.mask).sum(1) + total.nan_to_num(0.0) / self.beta
        part = known / known.sum().clamp(min=1)
        weight = part / lengths(batch.mask).clamp(min=1) if self.scale == "length" else part * (self.beta**2 if self.scale == "beta2" else 1.0)
        return Credit(target, self._constant(batch, readout, target, known), weight, part)

    def _constant(self, batch: Batch, readout: Readout, target: Tensor, known: Tensor) -> Tensor:
        """(B,) the least-squares constant of the step, of each group, or 0. No learning rate, no state: the loss is quadratic in it."""
        if self.value_mode == "logit":
            return torch.zeros_like(target)
        assert readout.logp is not None
        missing = torch.where(known, target - (readout.logp * batch.mask).sum(1), torch.nan)
        if self.value_mode == "vargrad":
            return group_moments(missing, batch.group)[0].nan_to_num(0.0)
        assert readout.lse is not None
        return group_moments(missing - readout.lse[:, 0], torch.zeros_like(batch.group))[0].nan_to_num(0.0)

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        assert readout.logp is not None
        value = credit.value
        if self.value_mode != "vargrad":
            assert readout.lse is not None
            value = value + readout.lse[:, 0]
        logp = (readout.logp * batch.mask).sum(1)
        residual = value + logp - credit.target
        seen = residual.detach()
        stats = {
            "tbrm/value": (credit.part * value.detach()).sum(), "tbrm/residual": (credit.part * seen.abs()).sum(),
            "tbrm/residual_mean": (credit.part * seen).sum(), "tbrm/residual_square": (credit.part * seen**2).sum(),
        }  # fmt: skip
        return Loss((credit.weight * residual**2).sum(), stats)

    def observe(self, batch: Batch, credit: Credit) -> dict[str, float]:
        total = weighted_total(batch.rewards, batch.weights)
        known = total[~total.isnan()]
        return {"tbrm/reward_variance": (known / self.beta).var(correction=0).item() if len(known) else 0.0}

    def alarms(self, first: Mapping[str, float], recent: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
        now = recent[-1]
        moved = now.get("tbrm/value", 0.0) - first.get("tbrm/value", 0.0)
        if abs(moved) > DRIFT and self.value_mode == "logit":
            yield "drift", (f"V(s1), the log-sum-exp of the first logits, has moved by {moved:.0f} nats (limit {DRIFT:.0f}): the logits' scale drifts; "
                            "take algorithm.value_mode=logit+bias or vargrad, or a larger algorithm.beta")
        variance = now.get("tbrm/residual_square", 0.0) - now.get("tbrm/residual_mean", 0.0) ** 2
        if len(recent) >= 5 and variance > max(1.0, now.get("tbrm/reward_variance", 0.0)) * 1.5:
            yield "residual", (f"the residual varies more (variance {variance:.0f}) than the reward over beta does ({now['tbrm/reward_variance']:.0f}): "
                               "the policy explains less than nothing; lower optim.learning_rate, or raise algorithm.beta")
