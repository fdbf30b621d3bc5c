"""Pure tensor functions that more than one algorithm needs. Notation as in `localrl.batch`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ShareName = Literal["sequence_mean", "token_mean", "fixed_length"]


def sequence_mean(mask: Tensor) -> Tensor:
    """Every rollout weighs the same, and every token within it. (B, T) bool -> (B, T) float32, sums to 1.

    >>> sequence_mean(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool())
    tensor([[0.1250, 0.1250, 0.1250, 0.1250],
            [0.2500, 0.2500, 0.0000, 0.0000]])
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def token_mean(mask: Tensor) -> Tensor:
    """Every token of the step weighs the same. (B, T) bool -> (B, T) float32, sums to 1.

    >>> token_mean(torch.tensor([[1, 1, 1], [1, 0, 0]]).bool())
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.0000, 0.0000]])
    """
    return mask / mask.sum().clamp(min=1)


def fixed_length(mask: Tensor, length: int) -> Tensor:
    """Every token weighs 1 / (B * length) whatever its rollout's own length: no bias towards short or long ones
    (Dr. GRPO, arXiv 2503.20783, section 3.2). (B, T) bool -> (B, T) float32, sums to at most 1.

    >>> fixed_length(torch.tensor([[1, 1], [1, 0]]).bool(), 4)
    tensor([[0.1250, 0.1250],
            [0.1250, 0.0000]])
    """
    return mask / (len(mask) * length)


def share(mask: Tensor, kind: ShareName, length: int) -> Tensor:
    """The normalising tensor by name; `length` (max_completion_length) only matters to `fixed_length`. (B, T) bool -> (B, T)."""
    if kind == "fixed_length":
        return fixed_length(mask, length)
    return sequence_mean(mask) if kind == "sequence_mean" else token_mean(mask)


def mean_per_row(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over a row's masked tokens; 0 for a row without any. (B, T), (B, T) bool -> (B,)."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def group_moments(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each row's group, NaN rows left out. (B,) or (B, R), (B,) -> two of `values`' shape.

    The deviation of fewer than two values is 0. A group with nothing but NaN has mean 0.

    >>> group_moments(torch.tensor([0., 1., 5., float("nan")]), torch.tensor([0, 0, 1, 1]))
    (tensor([0.5000, 0.5000, 5.0000, 5.0000]), tensor([0.7071, 0.7071, 0.0000, 0.0000]))
    """
    flat = values.reshape(len(values), -1).double()
    same = (group[:, None] == group[None]).double()
    valid = ~flat.isnan()
    known = torch.where(valid, flat, 0.0)
    count = same @ valid.double()
    mean = same @ known / count.clamp(min=1)
    spread = torch.where(valid, flat - mean, 0.0) ** 2          # a row's own mean is its group's
    std = (same @ spread / (count - 1).clamp(min=1)).sqrt()
    return mean.reshape(values.shape).to(values.dtype), std.reshape(values.shape).to(values.dtype)


def weighted_total(rewards: Tensor, weights: Tensor) -> Tensor:
    """Sum over rewards, NaN left out; a row with nothing but NaN is NaN. (B, R), (R,) -> (B,).

    >>> weighted_total(torch.tensor([[1., float("nan")], [float("nan"), float("nan")]]), torch.tensor([2., 1.]))
    tensor([2., nan])
    """
    total = (rewards * weights).nansum(1)
    return torch.where(rewards.isnan().all(1), torch.nan, total)


def standardise(values: Tensor, epsilon: float) -> Tensor:
    """(values - mean) / (unbiased std + epsilon) over all rows that are not NaN; NaN becomes 0. (B,) -> (B,)."""
    mean, std = group_moments(values, torch.zeros(len(values), dtype=torch.int64, device=values.device))
    return ((values - mean) / (std + epsilon)).nan_to_num(0.0)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(pi || ref) at each token: e^d - d - 1, d = ref - logp. Never negative. Any shape."""
    d = ref - logp
    return d.exp() - d - 1


def ratio_to(logp: Tensor, old: Tensor | None) -> Tensor:
    """pi / pi_old at each token. Without `old` the policy is its own past: 1 in value, with the gradient of logp. Any shape."""
    return (logp - (logp.detach() if old is None else old)).exp()
