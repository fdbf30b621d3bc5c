"""What methods share that take rollouts for their own: the correction where somebody else sampled them.

Token-level truncated importance weights (TIS): w = min(pi / pi_sampler, cap), with pi the policy when the step began. Masking ("IcePop")
leaves tokens outside [1 / cap, cap] out instead, of the mean's denominator too. Sequence-level weights collapse as length * KL grows.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import ShareName, share
from localrl.algorithms.base import Algorithm, Columns
from localrl.batch import Batch, Readout


class OnPolicy(Algorithm):
    """Base of the policy-gradient methods."""

    correction: Literal["auto", "none", "truncate", "mask"] = "auto"
    """Where an older policy or another engine sampled: weigh each token by how much likelier it is now, at most correction_cap (truncate); leave
    out tokens beyond the cap, either way (mask); or take all for the policy's own (none). auto: truncate where it is needed, none where it is not."""
    correction_cap: float = Field(2.0, gt=1)
    """The largest importance weight."""

    @property
    def corrects(self) -> bool:
        return True                                             # "none" in the settings is a person's decision

    def for_sampler(self, exact: bool) -> Self:
        if self.correction != "auto":
            return self
        return self.model_copy(update={"correction": "none" if exact else "truncate"})

    @property
    def reads_before(self) -> Columns:
        return frozenset({"logp"}) if self.correction in ("truncate", "mask") else frozenset()

    def importance(self, batch: Batch, readout: Readout) -> Tensor | None:
        """(B, T) weight of each token, 0 where it is left out; None: all count alike."""
        if self.correction not in ("truncate", "mask"):
            return None
        if batch.sampler is None:
            raise RuntimeError("these rollouts came without the sampler's log-probabilities: nothing can be corrected")
        assert readout.logp is not None
        weight = ((readout.logp - batch.sampler) * batch.fresh).exp()
        if self.correction == "truncate":
            return weight.clamp(max=self.correction_cap)
        return torch.where((weight <= self.correction_cap) & (weight >= 1 / self.correction_cap), weight, 0.0)

    def shared(self, batch: Batch, importance: Tensor | None, kind: ShareName, mask: Tensor | None = None) -> Tensor:
        """(B, T) normaliser with the correction in it. `mask`: other tokens than the fresh ones."""
        mask = batch.fresh if mask is None else mask
        if importance is None:
            return share(mask, kind, batch.limit)
        kept = mask & (importance > 0) if self.correction == "mask" else mask
        return share(kept, kind, batch.limit) * importance
