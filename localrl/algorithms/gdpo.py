"""GDPO: every reward is normalised by itself before they are combined, with fixed weights or with weights found from their gradients.

Decoupled normalisation: Group reward-Decoupled normalization Policy Optimization, arXiv 2601.05242. Semantics of TRL's `normalize_then_sum`:
a missing reward (NaN) is left out of the statistics, a rollout without any reward gets no credit. The last normalisation runs
over all rollouts of the step: per micro-batch it would destroy the magnitudes that decoupling keeps.
Conflict filter: GD2PO, arXiv 2606.16771. Directed weights: `localrl.algorithms.steering` on the rewards' gradients, which differ
in a rollout's coefficient only, so that one backward pass gives them all (docs/algorithms/gdpo.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import group_moments, k3, standardise, weighted_total
from localrl.algorithms.advantages import whiten
from localrl.algorithms.base import Picture, Steering
from localrl.algorithms.grpo import Clipped, Credit
from localrl.algorithms.steering import LARGEST, Control, Geometry, clip_masks, control, detect, geometry
from localrl.batch import Batch, Loss, Readout, Seed


class GDPO(Clipped):
    """GDPO with decoupled normalisation, on the clipped objective."""

    name: Literal["gdpo"] = "gdpo"
    """Group reward-Decoupled normalisation."""
    advantage_epsilon: float = Field(1e-4, gt=0)
    """Added to the standard deviations."""
    normalise: Literal["completions", "tokens"] = "completions"
    """The last normalisation counts every completion once (TRL), or every token, so that long answers weigh more (the verl fork)."""
    conflict_filter: Literal["none", "hard", "snr"] = "none"
    """Leave out rollouts whose rewards disagree in sign (GD2PO): all of them (hard; two or three rewards at most, hardly any is left with more),
    or those whose sum is small beside its parts (snr)."""
    conflict_threshold: float = Field(0.8, ge=0, le=1)
    """snr: a rollout in conflict is kept if |sum of advantages| is at least this share of the sum of their sizes."""
    weighting: Literal["fixed", "directed"] = "fixed"
    """fixed: the rewards' weights as given. directed: they are moved, as little as needed, so that no reward loses and none dominates."""
    dispersion: float = Field(0.7, gt=0, le=1)
    """directed: how evenly the rewards must profit from the update, from 1 / R (one takes all) to 1 (all alike)."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """directed: how far, as a cosine, the update may point against a reward."""
    coherence: float = Field(0.05, gt=0, lt=1)
    """directed: below this much agreement (length of the mean of the unit gradients) the region counts as unstable, and the step gets shorter."""
    weight_bounds: tuple[float, float] = (0.05, 20.0)
    """directed: least and most that a weight may become, as a multiple of the given one."""

    decouples_rewards = True
    needs_contrast = True
    lab = (("GDPO, decoupled", {}), ("GDPO, directed by gradients", {"weighting": "directed"}))
    reports: ClassVar[tuple[str, ...]] = (*Clipped.reports, "conflicting_rewards", "gdpo/kept")
    pictures: ClassVar[tuple[Picture, ...]] = (
        Picture(
            "Rewards that disagree",
            "Share of answers on which two rewards pull in opposite directions, and the share that the conflict filter kept.",
            ("conflicting_rewards", "gdpo/kept"),
        ),
        Picture(
            "Angles between the rewards' gradients",
            "Degrees, now: below 90 two rewards want similar changes, above 90 each harms the other.",
            ("steering/*/angle",),
            form="matrix",
        ),
        Picture(
            "Weights of the rewards",
            "How much each reward counts in the update, as it was steered.",
            ("steering/*/weight",),
        ),
        Picture(
            "What each reward gains",
            "Cosine of each reward's gradient with the update: below 0 the update harms that reward.",
            ("steering/*/cosine",),
        ),
        Picture(
            "Dispersion",
            "How evenly the rewards profit, from one takes all to 1; before and after steering, and what was asked for drawn across.",
            ("steering/dispersion", "steering/dispersion_before"),
            limits=("dispersion",),
        ),
        Picture(
            "Coherence",
            "Length of the mean unit gradient: below the line the gradients cancel, the region is unstable and steps get shorter.",
            ("steering/coherence", "steering/least_cosine"),
            limits=("coherence",),
        ),
        Picture(
            "Length of the step",
            "Factor on the learning rate (0: skipped, 0.5: after an alarm), and the alarms.",
            ("steering/rate", "steering/alarm"),
        ),
    )

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        advantage, single = self.advantages(batch)
        share = self.shared(batch, self.importance(batch, readout), self.share)
        return Credit(advantage, share, readout.logp, single[:, None] if self.weighting == "directed" else None)

    def advantage(self, batch: Batch) -> Tensor:
        return self.advantages(batch)[0]

    def advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) of all rewards together, and (B, R) of each by itself, with the sign of its weight, on the same scale."""
        single = self.decoupled(batch)
        kept, ratio = self.keep(single * batch.weights.sign(), batch)
        total = weighted_total(single, batch.weights) * ratio
        scale = self._spread(torch.where(kept, total, torch.nan), batch)
        return self._normalised(total, kept, batch), single.nan_to_num(0.0) * batch.weights.sign() * (kept * ratio / scale)[:, None]

    def decoupled(self, batch: Batch) -> Tensor:
        """(B, R) each reward centred and scaled within its group; NaN where it does not apply."""
        mean, std = group_moments(batch.rewards, batch.group)
        return (batch.rewards - mean) / (std + self.advantage_epsilon)

    def keep(self, single: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) bool: rollouts without conflict, and (B,) the share that their group kept (1 without a filter). `single` (B, R): advantages, turned where the
        weight is negative."""
        signed = single.nan_to_num(0.0)
        conflict = (signed > 1e-8).any(1) & (signed < -1e-8).any(1)
        if self.conflict_filter == "none":
            return torch.ones_like(conflict), torch.ones_like(signed[:, 0])
        if self.conflict_filter == "snr":
            conflict &= signed.sum(1).abs() / (signed.abs().sum(1) + 1e-8) < self.conflict_threshold
        return ~conflict, group_moments((~conflict).float(), batch.group)[0]

    def _normalised(self, total: Tensor, kept: Tensor, batch: Batch) -> Tensor:
        if self.normalise == "completions":
            return standardise(torch.where(kept, total, torch.nan), self.advantage_epsilon)
        wide = total.nan_to_num(0.0)[:, None].expand(batch.mask.shape)
        return whiten(wide, batch.fresh & (kept & ~total.isnan())[:, None])[:, 0]

    def _spread(self, total: Tensor, batch: Batch) -> Tensor:
        """() what the last normalisation divides by, so that directed weights which stay as given make the update of fixed ones (but for the mean
        that it subtracts, which is 0 unless rollouts are left out). Where rewards cancel, not less than a twentieth of what one alone would have."""
        spread = group_moments(total, torch.zeros_like(batch.group))[1].max()
        return torch.maximum(spread, batch.weights.norm() / 20) + self.advantage_epsilon

    def observe(self, batch: Batch, credit: Credit) -> dict[str, float]:
        """Share of rollouts on which two rewards disagree in sign: what decoupling is for."""
        single = self.decoupled(batch)
        single = single * batch.weights.sign()                                   # a penalty that falls agrees with a reward that rises
        metrics = {"conflicting_rewards": ((single > 0).any(1) & (single < 0).any(1)).float().mean().item()}
        if self.conflict_filter != "none":
            metrics["gdpo/kept"] = self.keep(single, batch)[0].float().mean().item()
        return metrics

    # -- directed weights ---------------------------------------------------------------------------------------------------

    def directions(self, weights: Sequence[float]) -> tuple[float, ...]:
        if self.weighting == "fixed" or len(weights) < 2:
            return ()
        return (*(abs(w) for w in weights), *([1.0] if self.beta else []))

    def deserved(self, credit: Credit, directed: Sequence[float] = ()) -> Tensor:
        if not directed:
            return credit.advantage
        assert credit.single is not None
        single = credit.single[:, 0]
        return single @ torch.tensor(directed[: single.shape[1]], dtype=single.dtype)

    def objection(self, window: int | None, rewards: int) -> str | None:
        if self.weighting == "directed" and self.normalise == "tokens":
            return "algorithm.weighting=directed keeps the scale that completions give, not tokens: set algorithm.normalise=completions"
        if self.weighting == "directed" and rewards > LARGEST:
            return f"algorithm.weighting=directed with {rewards} rewards: {LARGEST} at most, leave some out or join them in one function"
        return None

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        loss = super().loss(batch, readout, credit)
        return loss._replace(seeds=self._seeds(batch, readout, credit)) if self.weighting == "directed" else loss

    def _seeds(self, batch: Batch, readout: Readout, credit: Credit) -> tuple[Seed, ...]:
        """All rewards' gradients from at most two backward passes, for clipping looks at an advantage's sign only; KL is a direction of its own."""
        assert readout.logp is not None
        assert credit.single is not None
        single = credit.single[:, 0]
        ratio, none = self.ratio(readout.logp, credit.old, batch.fresh), single.new_zeros(len(single), int(self.beta > 0))
        if credit.old is None:                                                   # the ratio is 1: nothing is clipped
            seeds = [Seed(-(credit.share * ratio).sum(), torch.cat([single, none], 1))]
        else:
            up, down = clip_masks(ratio.detach(), *self.clip)
            seeds = [
                Seed(-(credit.share * ratio * mask).sum(), torch.cat([part, none], 1))
                for mask, part in ((up, single.clamp(min=0)), (down, single.clamp(max=0)))
            ]
        if self.beta:
            assert readout.ref is not None
            kl = self.beta * (credit.share * k3(readout.logp, readout.ref)).sum()
            seeds.append(Seed(kl, torch.cat([torch.zeros_like(single), none + 1], 1)))
        return tuple(seeds)

    def steer(self, gram: Tensor, weights: Sequence[float], past: Sequence[Mapping[str, float]]) -> Steering:
        count = len(weights)
        found = control(gram[:count, :count], [abs(w) for w in weights], self.dispersion, self.tolerance, self.coherence, self.weight_bounds)
        region = detect(found.stats(), past, self.coherence)
        stats = {**found.stats(), **region.stats(), "steering/rate": found.rate * region.rate, **by_reward(found, geometry(gram[:count, :count]))}
        return Steering((*found.weights, *[1.0] * (len(gram) - count)), found.rate * region.rate, stats)

    def alarms(self, first: Mapping[str, float], recent: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
        now = recent[-1]
        if now.get("steering/alarm", 0.0) > 0:
            yield "unstable", (f"the rewards' gradients have entered an unstable region (coherence {now['steering/coherence']:.2f}, "
                               f"{now['steering/conflicts']:.0f} of {now['steering/pairs']:.0f} pairs in conflict): "
                               "the learning rate is halved for ten steps, each time anew")
        skipped = sum(m.get("steering/rate", 1.0) == 0 for m in recent)
        if skipped >= 5:
            yield "skipped", (f"{skipped} of the last {len(recent)} updates were skipped because the rewards' gradients cancel: two rewards ask for opposites; "
                              "change their weights, or make one conditional (given = ...)")


def by_reward(found: Control, shape: Geometry) -> dict[str, float]:
    """Metrics of each reward (by its number) and each pair: `steering/<k>/weight`, `/norm` of its gradient, `/cosine` with the update,
    `steering/<i>-<j>/angle` (degrees) and `/wedge` (area that the two gradients span)."""
    profit = iter(found.after.p.tolist())
    stats: dict[str, float] = {}
    for k, (weight, active, norm) in enumerate(zip(found.weights, found.active, shape.norms.tolist(), strict=True)):
        stats |= {f"steering/{k}/weight": weight, f"steering/{k}/norm": norm, f"steering/{k}/cosine": next(profit) if active else 0.0}
    for i, j in combinations(range(len(found.weights)), 2):
        stats |= {f"steering/{i}-{j}/angle": shape.angle[i, j].item(), f"steering/{i}-{j}/wedge": shape.wedge[i, j].item()}
    return stats
