"""GTPO: protect the tokens that good and bad completions share, and keep entropy in check, without a reference model.

Paper: Group-relative Trajectory-based Policy Optimization, arXiv 2508.03772. The published code differs from the text in the token
weight (up to 4), the divisor and the entropy threshold; `variant` selects either reading, docs/algorithms/gtpo.md lists the differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import group_moments, mean_per_row, ratio_to, weighted_total
from localrl.algorithms.base import Columns, Picture
from localrl.algorithms.on_policy import OnPolicy
from localrl.batch import Batch, Loss, Readout, lengths

UNREACHABLE = 1e3
"""Nats that no vocabulary's entropy can have: a filter that never filters."""


class Credit(NamedTuple):
    """What a completion and each of its tokens deserve, before its entropy is known."""

    advantage: Tensor
    """(B,) centred reward."""
    weight: Tensor
    """(B, T) the conflict weights lambda: 0, 1, 2 (or 4, official)."""
    share: Tensor
    """(B, T) normaliser, with the official divisor in it."""
    part: Tensor
    """(B,) each rollout's part of the step: 1 / B."""


class GTPO(OnPolicy):
    """Group-relative Trajectory-based Policy Optimisation."""

    name: Literal["gtpo"] = "gtpo"
    """Group-relative Trajectory-based Policy Optimisation."""
    variant: Literal["paper", "official"] = "paper"
    """paper: conflict weight 2, mean over the group. official (the authors' code): weights multiply to 4, each completion is divided by its
    longer conflict run, summed over the group."""
    gamma: float = Field(0.1, ge=0)
    """Entropy penalty: a completion's mean entropy (nats) times this is taken from its advantage."""
    threshold: float | Literal["auto", "paper"] = "auto"
    """Completions whose mean entropy (nats) exceeds this are left out. auto: ln 2 if the untrained model stays below it on average, else the
    95 % quantile of the untrained model's own completions. paper: ln 2, or no filter at all if the untrained model is above it. The authors' code
    has 0.7, and 1.02 for Qwen2.5-3B."""
    positive_weight: float = Field(2.0, ge=0)
    """Weight of a conflict token in a completion above its group's mean."""
    negative_weight: float = Field(0.0, ge=0)
    """Weight of a conflict token in a completion below its group's mean: 0 protects it."""
    scale_rewards: Literal["none", "group"] = "none"
    """Divide the advantage by its group's standard deviation? The paper does not."""

    reports: ClassVar[tuple[str, ...]] = (
        "gtpo/conflict_share", "gtpo/protected_share", "gtpo/boosted_share", "gtpo/mean_weight", "gtpo/filtered_share", "gtpo/completion_entropy"
    )  # fmt: skip
    pictures: ClassVar[tuple[Picture, ...]] = (
        Picture(
            "Tokens in conflict",
            "Share of tokens with which good and bad answers of a group begin or end alike: protected ones stand in a bad answer, boosted ones in a good one.",
            ("gtpo/conflict_share", "gtpo/protected_share", "gtpo/boosted_share"),
        ),
        Picture(
            "Weight of a token",
            "Mean of the conflict weights; 1 means that as much was added as was taken away.",
            ("gtpo/mean_weight",),
        ),
        Picture(
            "Entropy of whole completions",
            "Mean entropy (nats) of completions; those above the threshold, which is drawn across, are left out.",
            ("gtpo/completion_entropy",),
            limits=("threshold",),
        ),
        Picture(
            "Left out by the entropy filter",
            "Share of completions that are too uncertain to learn from; near 1 the policy is falling apart.",
            ("gtpo/filtered_share",),
        ),
    )

    @property
    def reads_during(self) -> Columns:
        return frozenset({"logp", "entropy"})

    @property
    def calibrates(self) -> Columns:
        return frozenset({"entropy"}) if isinstance(self.threshold, str) else frozenset()

    def calibrate(self, batch: Batch, readout: Readout) -> Self:
        """Fix the automatic threshold from the untrained policy's entropy (section 2.3 of docs/algorithms/gtpo.md)."""
        assert readout.entropy is not None
        entropy = mean_per_row(readout.entropy, batch.mask)
        beyond = UNREACHABLE if self.threshold == "paper" else entropy.quantile(0.95).item()
        threshold = math.log(2) if entropy.mean() <= math.log(2) else beyond
        return self.model_copy(update={"threshold": threshold})

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        total = weighted_total(batch.rewards, batch.weights)
        mean, std = group_moments(total, batch.group)
        advantage = total - mean
        if self.scale_rewards == "group":
            advantage = advantage / (std + 1e-4)
        advantage = advantage.nan_to_num(0.0)
        ahead, behind = conflict_runs(batch.tokens, batch.mask, advantage, batch.group)
        even, part = self.shared(batch, self.importance(batch, readout), "sequence_mean"), torch.full_like(advantage, 1 / len(batch))
        touched = torch.where(advantage > 0, self.positive_weight, self.negative_weight)[:, None]
        one = torch.ones((), device=touched.device)
        if self.variant == "paper":
            return Credit(advantage, torch.where(ahead | behind, touched, one) * batch.fresh, even, part)
        weight = torch.where(ahead, touched, one) * torch.where(behind, touched, one) * batch.fresh
        divisor = torch.maximum(ahead.sum(1), behind.sum(1)).clamp(min=1)[:, None]
        groups = int(batch.group.max()) + 1                     # summed over the completions of a group, averaged over groups
        return Credit(advantage, weight, even * (len(batch) / groups) / divisor, part)

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        assert readout.logp is not None
        assert readout.entropy is not None
        if isinstance(self.threshold, str):
            raise RuntimeError("GTPO's automatic threshold was never calibrated")
        entropy = mean_per_row(readout.entropy.detach(), batch.fresh)
        kept = entropy <= self.threshold
        shaped = (kept * (credit.advantage - self.gamma * entropy))[:, None]
        loss = -(credit.share * credit.weight * shaped * ratio_to(readout.logp, None)).sum()
        return Loss(loss, {"gtpo/filtered_share": (credit.part * ~kept).sum(), "gtpo/completion_entropy": (credit.part * entropy).sum()})

    def observe(self, batch: Batch, credit: Credit) -> dict[str, float]:
        tokens = batch.fresh.sum().clamp(min=1)
        protected, boosted = ((found & batch.fresh).sum().item() / tokens.item() for found in (credit.weight < 1, credit.weight > 1))
        return {
            "gtpo/conflict_share": protected + boosted, "gtpo/protected_share": protected, "gtpo/boosted_share": boosted,
            "gtpo/mean_weight": (credit.weight.sum() / tokens).item(),
        }  # fmt: skip

    def token_weights(self, credit: Credit) -> Tensor:
        return credit.weight

    def alarms(self, first: Mapping[str, float], recent: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
        if isinstance(self.threshold, str):
            return
        before, now = (m.get("gtpo/completion_entropy", 0.0) for m in (first, recent[-1]))
        if before <= self.threshold < now:
            yield "collapse", (f"completions' mean entropy has risen from {before:.2f} to {now:.2f} nats, above algorithm.threshold="
                               f"{self.threshold:.2f}: accuracy usually falls next; stop here, or resume an earlier checkpoint with a lower "
                               "optim.learning_rate or a larger algorithm.gamma")
        if len(recent) == 20 and all(m.get("gtpo/filtered_share", 0.0) > 0.5 for m in recent):
            yield "filtered", ("for 20 steps more than half of all completions have been left out for their entropy (algorithm.threshold="
                               f"{self.threshold:.2f}): hardly anything is learned; raise the threshold, or set algorithm.threshold=auto in a new run")


def conflict_runs(tokens: Tensor, mask: Tensor, advantage: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the shared opening, and of the shared ending, that a good AND a bad rollout of one group wrote.

    (B, T) int64, (B, T) bool, (B,), (B,) -> two (B, T) bool. A row's run goes on as long as each of its tokens has a twin of the
    opposite sign at its position (counted from the front, or from the row's end); the twin may be another row at every position.
    """
    length = lengths(mask)
    columns = torch.arange(mask.shape[1], device=mask.device)
    turned = (length[:, None] - 1 - columns).clamp(min=0)                       # its own inverse within a row's length
    inside = columns < length[:, None]
    behind = _run(tokens.gather(1, turned), mask.gather(1, turned) & inside, advantage, group)
    return _run(tokens, mask, advantage, group), behind.gather(1, turned) & mask


def _run(tokens: Tensor, mask: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
    """The unbroken run from column 0. The authors count over a (V * T) table, 1.2 GiB for a vocabulary of 152k; comparing the rows of one
    group needs G * G * T bits, and only one group's at a time."""
    conflict = torch.zeros_like(mask)
    for number in group.unique():
        rows = (group == number).nonzero().squeeze(1)
        sign, ids, own = advantage[rows].sign(), tokens[rows], mask[rows]
        opposite = (sign[:, None] * sign[None] < 0)[..., None]                   # (G, G, 1)
        same = (ids[:, None] == ids[None]) & own[:, None] & own[None]            # (G, G, T)
        conflict[rows] = (same & opposite).any(1)
    return conflict.cumprod(1).bool() & mask
