"""TBA: trajectory balance on rollouts of any age and origin, kept in a buffer and found by searchers that run beside the trainer.

Paper: Trajectory Balance with Asynchrony, arXiv 2503.18929. For K rollouts of one prompt (equations of section 3.1, VarGrad):
    log Z = mean_j [ log pi_ref(y_j) - log pi(y_j) + r_j / beta ]      (no gradient)
    loss  = mean_i ( log Z + log pi(y_i) - log pi_ref(y_i) - r_i / beta )^2
whose gradient is that of REINFORCE with advantage (r - mean r) - beta (KL - mean KL). No importance weight: zero loss means pi_ref exp(r / beta),
whoever sampled. The buffer, the sync period and the searchers are `replay` and `search` in the settings.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from localrl.algebra import group_moments, weighted_total
from localrl.algorithms.base import Algorithm, Columns, Picture
from localrl.batch import Batch, Loss, Readout


class Credit(NamedTuple):
    """(B,) each."""

    target: Tensor
    """log pi_ref(y) + r / beta - log Z: what log pi(y) should be."""
    weight: Tensor
    """Of the row's squared residual in the loss."""
    part: Tensor
    """Of the row in the metrics' means."""


class TBA(Algorithm):
    """Trajectory Balance with Asynchrony."""

    name: Literal["tba"] = "tba"
    """Trajectory Balance with Asynchrony."""
    beta: float = Field(0.012, gt=0)
    """KL strength at the first update: the optimum is pi_ref exp(r / beta)."""
    beta_final: float | None = Field(None, gt=0)
    """Its value after beta_steps updates, reached linearly; the authors go from 0.012 to 0.004 in 500. Unset: constant."""
    beta_steps: int = Field(500, ge=1)
    """Updates until beta_final holds."""
    scale: Literal["reinforce", "none"] = "reinforce"
    """reinforce: the squared residual times beta / 2, so that gradients have REINFORCE's size whatever beta is. none: as it is."""

    learns_from_old = True
    reports: ClassVar[tuple[str, ...]] = ("tba/residual", "tba/beta", "tba/age")
    pictures: ClassVar[tuple[Picture, ...]] = (
        Picture(
            "Trajectory-balance residual",
            "Mean size of what is still to be explained (nats); 0 is the optimum for this beta.",
            ("tba/residual",),
        ),
        Picture(
            "Strength of the KL",
            "beta: the optimum is the reference times exp(reward / beta), so smaller is sharper.",
            ("tba/beta",),
        ),
        Picture(
            "How old the answers are",
            "Updates of the policy since an answer was sampled: of those learned from, and of all that are kept.",
            ("tba/age", "buffer/staleness/mean", "buffer/staleness/max", "rollout/staleness_mean"),
        ),
        Picture(
            "The buffer",
            "Answers and prompts that are kept.",
            ("buffer/size", "buffer/prompts"),
        ),
    )

    @property
    def reads_before(self) -> Columns:
        return frozenset({"logp", "ref"})

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        assert readout.logp is not None
        assert readout.ref is not None
        beta, total = self.beta_at(batch.step + 1), weighted_total(batch.rewards, batch.weights)
        goal = (readout.ref * batch.mask).sum(1) + total / beta
        log_z = group_moments(goal - (readout.logp * batch.mask).sum(1), batch.group)[0]
        known = ~total.isnan()
        part = known / known.sum().clamp(min=1)
        return Credit((goal - log_z).nan_to_num(0.0), part * (beta / 2 if self.scale == "reinforce" else 1.0), part)

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        assert readout.logp is not None
        residual = (readout.logp * batch.mask).sum(1) - credit.target
        return Loss((credit.weight * residual**2).sum(), {"tba/residual": (credit.part * residual.detach().abs()).sum()})

    def observe(self, batch: Batch, credit: Credit) -> dict[str, float]:
        return {"tba/beta": self.beta_at(batch.step + 1), "tba/age": batch.age.float().mean().item()}

    def beta_at(self, update: int) -> float:
        """Of an update, counted from 1.

        >>> TBA(beta=1.0, beta_final=0.5, beta_steps=10).beta_at(6)
        0.75
        """
        if self.beta_final is None:
            return self.beta
        return anneal(update, self.beta, self.beta_final, self.beta_steps, self.beta_steps)


def anneal(update: int, start: float, final: float, stop: int, target: int) -> float:
    """Linearly towards `final` at update `target`, and `final` from update `stop` on.

    The authors' summarisation run has stop 32 and target 128, so that beta jumps from 0.78 to 0.05: intended or not, here the two are one.
    """
    done = (update - 1) / target
    return final * done + start * (1 - done) if update < stop else final
