"""Advantages from values: GAE, and its form for responses that go on (EGAE). Columns as in `localrl.batch`."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, finished: Tensor, gamma: float, lam: Tensor) -> Tensor:
    """Generalised advantage estimates over each row's masked run of tokens. 0 outside it.

    (B, T), (B, T), (B, T) bool, (B,) bool, (B,) -> (B, T). A finished row ends with value 0. A row that goes on is taken to have the
    value of its last state next: V(s_l) := V(s_{l-1}), so that its last step counts (gamma - 1) V (T-PPO, arXiv 2506.15050, section 3.1).

    >>> values = torch.tensor([[.5, .25, .75, .5]] * 2)
    >>> rewards = torch.tensor([[0., 0., 0., 1.], [0., 0., 0., 0.]])
    >>> gae(rewards, values, torch.ones(2, 4).bool(), torch.tensor([True, False]), 1.0, torch.tensor([.5, .5])).tolist()
    [[0.0, 0.5, 0.0, 0.5], [-0.0625, 0.375, -0.25, 0.0]]
    """
    advantages = torch.zeros_like(values)
    ahead, next_value = torch.zeros_like(values[:, 0]), torch.where(finished, 0.0, torch.nan)
    for t in range(values.shape[1] - 1, -1, -1):
        inside, value = mask[:, t], values[:, t]
        delta = rewards[:, t] + gamma * torch.where(next_value.isnan(), value, next_value) - value
        ahead = torch.where(inside, delta + gamma * lam * ahead, ahead)
        next_value = torch.where(inside, value, next_value)
        advantages[:, t] = torch.where(inside, ahead, 0.0)
    return advantages


def adaptive_lambda(length: Tensor, lam: float, alpha: float) -> Tensor:
    """The longer a response, the closer to Monte Carlo: max(lam, 1 - 1 / (alpha * length)) (VAPO, arXiv 2504.05118). (B,) -> (B,).

    >>> adaptive_lambda(torch.tensor([10., 400., 402.]), 0.95, 0.05)
    tensor([0.9500, 0.9500, 0.9502])
    """
    return (1 - 1 / (alpha * length)).clamp(min=lam)


def whiten(values: Tensor, mask: Tensor, over: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(unbiased variance + epsilon) over all masked tokens of the step, 0 outside the mask.

    `over`: take mean and variance of these tokens alone. Fewer than two of them have no variance: nothing is changed.
    """
    chosen = (mask if over is None else over).to(values.dtype)
    count = chosen.sum()
    if count < 2:
        return values * mask
    mean = (values * chosen).sum() / count
    variance = ((values - mean) ** 2 * chosen).sum() / (count - 1)
    return (values - mean) * torch.rsqrt(variance + epsilon) * mask
