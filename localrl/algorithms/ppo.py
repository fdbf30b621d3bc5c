"""PPO: a critic says what to expect of every state, and each token is judged by what it made of it.

Papers: PPO, arXiv 1707.06347; GAE, arXiv 1506.02438. Additions of VAPO (arXiv 2504.05118) as settings: length-adaptive lambda, a
Monte-Carlo critic, asymmetric clip, a language-model loss on good responses. Responses may also be learned from window by window,
while they go on (`rollout.window`): then `localrl.algorithms.tppo` has the defaults. The critic is a second adapter and a scalar head on the same base.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from localrl.algebra import ShareName, ratio_to, sequence_mean, token_mean, weighted_total
from localrl.algorithms.advantages import adaptive_lambda, gae, whiten
from localrl.algorithms.base import Columns, Picture
from localrl.algorithms.on_policy import OnPolicy
from localrl.batch import Batch, Loss, Readout


class Credit(NamedTuple):
    """(B, T) each."""

    advantage: Tensor
    returns: Tensor
    """What the critic should have said."""
    value: Tensor
    """What it said."""
    share: Tensor
    """Weight of each token in the policy's mean: this window's tokens."""
    value_share: Tensor
    """Weight of each token in the critic's mean: all tokens of finished, scored responses."""
    good: Tensor
    """Weight of each token in the mean of the language-model loss: this window's tokens of finished responses with a positive reward."""
    old: Tensor | None
    """Log-probabilities when the step began; None: this is the only update on these rollouts."""


class PPO(OnPolicy):
    """Proximal Policy Optimisation with a critic."""

    name: Literal["ppo"] = "ppo"
    """Proximal Policy Optimisation with a critic."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of the policy's advantages."""
    adaptive_lambda: float = Field(0.0, ge=0)
    """Alpha of the length-adaptive lambda, max(lam, 1 - 1 / (alpha * length)); VAPO has 0.05. 0: off."""
    critic_lambda: float = Field(1.0, ge=0, le=1)
    """Lambda of the critic's targets; 1: what the response really got (Monte Carlo)."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the probability ratio may push."""
    epsilon_high: float | None = Field(None, gt=0)
    """How far above 1 it may push. Unset: the same as epsilon."""
    dual_clip: float = Field(0.0, ge=0)
    """Bound of ratio * advantage for bad tokens that have become much likelier, times the advantage (3 to 10 are usual). 0: none."""
    value_clip: float = Field(0.2, ge=0)
    """How far below its old value the critic may learn to go in one step. 0: no value clipping."""
    value_clip_high: float = Field(0.0, ge=0)
    """How far above. 0: the same as value_clip."""
    value_coef: float = Field(0.5, gt=0)
    """Weight of the critic's loss."""
    kl_coef: float = Field(0.0, ge=0)
    """KL to the reference (k1), taken from the reward of every token. 0: no reference pass."""
    lm_coef: float = Field(0.0, ge=0)
    """Weight of a language-model loss on finished responses with a positive reward; VAPO has 0.1."""
    critic_warmup: int = Field(0, ge=0)
    """First updates in which only the critic learns."""
    advantage_clamp: float = Field(0.0, ge=0)
    """Whitened advantages are cut at plus and minus this. 0: not at all."""
    ignore_tail: int = Field(0, ge=0)
    """Last tokens of a window that an unfinished response does not learn from: their advantages hang on one guess of the critic."""
    share: ShareName = "token_mean"
    """How tokens are weighed: token_mean, sequence_mean, fixed_length."""

    learns_from_unfinished = True
    reports: ClassVar[tuple[str, ...]] = (
        "clip_ratio", "value_loss", "value_clip_ratio", "lm_loss", "value/explained_variance", "value/mean", "value/error"
    )  # fmt: skip
    pictures: ClassVar[tuple[Picture, ...]] = (
        Picture(
            "What the critic explains",
            "Share of the returns' variance that the critic foresees: 1 all, 0 nothing, below 0 it misleads.",
            ("value/explained_variance",),
        ),
        Picture(
            "The critic's error",
            "Mean distance of its values from the returns, and its mean value, in units of the reward.",
            ("value/error", "value/mean"),
        ),
        Picture(
            "The critic's loss",
            "Should fall; the share of its updates that were cut beside it.",
            ("value_loss", "value_clip_ratio"),
        ),
        Picture(
            "Seats that stood empty",
            "Share of the sampler's work that went to rows which were already done: waiting for the longest answer.",
            ("rollout/idle_share",),
        ),
        Picture(
            "Answers under way",
            "Answers that go on in the next step.",
            ("buffer/unfinished", "buffer/continued"),
        ),
    )

    @property
    def group_size(self) -> int:
        return 1

    @property
    def reads_before(self) -> Columns:
        return super().reads_before | {"value"} | ({"logp", "ref"} if self.kl_coef else frozenset())

    @property
    def reads_during(self) -> Columns:
        return frozenset({"logp", "value"})

    @property
    def readings(self) -> tuple[Columns, ...]:
        return frozenset({"logp"}), frozenset({"value"})

    def objection(self, window: int | None, rewards: int) -> str | None:
        if window is not None and self.ignore_tail >= window:
            return f"algorithm.ignore_tail={self.ignore_tail} leaves nothing of rollout.window={window} to learn from: it must be smaller"
        return None

    def credit(self, batch: Batch, readout: Readout) -> Credit:
        assert readout.value is not None
        value, fresh, finished = readout.value, batch.fresh, batch.finished
        total = weighted_total(batch.rewards, batch.weights)
        scored = finished & ~total.isnan()
        rewards = at_the_end(total.nan_to_num(0.0) * scored, batch.mask)
        if self.kl_coef:
            assert readout.logp is not None
            assert readout.ref is not None
            rewards = rewards - self.kl_coef * (readout.logp - readout.ref) * fresh
        learns = fresh & (scored | ~finished)[:, None] & ~self._tail(batch)
        raw = gae(rewards, value, fresh, finished, self.gamma, self._lambda(batch))
        told = fresh & (raw != 0).any(1, keepdim=True)          # a row without any signal must not get one by subtracting a mean
        advantage = whiten(raw, learns & told)
        if self.advantage_clamp:
            advantage = advantage.clamp(-self.advantage_clamp, self.advantage_clamp)
        critic = torch.full_like(total, self.critic_lambda)
        judged = batch.mask & scored[:, None]
        returns = (gae(rewards, value, batch.mask, finished, self.gamma, critic) + value) * judged
        good = token_mean(learns & (scored & (total > 0))[:, None])
        share = self.shared(batch, self.importance(batch, readout), self.share, learns)
        rows = scored.sum().clamp(min=1) / len(batch)           # the mean runs over scored rows alone
        return Credit(advantage, returns, value, share, sequence_mean(judged) / rows, good, readout.logp)

    def loss(self, batch: Batch, readout: Readout, credit: Credit) -> Loss:
        """Of the columns that are there: the policy's part, the critic's, or both."""
        stats: dict[str, Tensor] = {}
        loss = credit.share.new_zeros(())
        if readout.value is not None:
            value_loss, stats["value_clip_ratio"] = self.value_loss(readout, credit)
            stats["value_loss"], loss = value_loss.detach(), self.value_coef * value_loss
        if readout.logp is not None and batch.step >= self.critic_warmup:
            policy_loss, stats["clip_ratio"] = self.policy_loss(readout, credit)
            loss = loss + policy_loss
            if self.lm_coef:
                lm = -(credit.good * readout.logp).sum()
                stats["lm_loss"], loss = lm.detach(), loss + self.lm_coef * lm
        return Loss(loss, stats)

    def policy_loss(self, readout: Readout, credit: Credit) -> tuple[Tensor, Tensor]:
        """The clipped objective, dual where asked. -> loss, share of clipped tokens."""
        assert readout.logp is not None
        ratio, advantage = ratio_to(readout.logp, credit.old), credit.advantage
        low, high = 1 - self.epsilon, 1 + (self.epsilon_high or self.epsilon)
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        if self.dual_clip:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual_clip * advantage), gain)
        clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        return -(credit.share * gain).sum(), (credit.share * clipped).sum()

    def value_loss(self, readout: Readout, credit: Credit) -> tuple[Tensor, Tensor]:
        """Half the squared error, with the value's own step clipped. -> loss, share of clipped tokens."""
        assert readout.value is not None
        error = (readout.value - credit.returns) ** 2
        worst = error
        if self.value_clip:
            high = self.value_clip_high or self.value_clip
            near = credit.value + (readout.value - credit.value).clamp(-self.value_clip, high)
            worst = torch.maximum(error, (near - credit.returns) ** 2)
        return 0.5 * (credit.value_share * worst).sum(), (credit.value_share * (worst > error)).sum().detach()

    def observe(self, batch: Batch, credit: Credit) -> dict[str, float]:
        judged = credit.value_share > 0
        if not judged.any():
            return {}
        returns, value = credit.returns[judged], credit.value[judged]
        spread = returns.var(correction=0).item()
        explained = 1 - (returns - value).var(correction=0).item() / spread if spread > 1e-12 else 0.0
        return {"value/explained_variance": explained, "value/mean": value.mean().item(), "value/error": (returns - value).abs().mean().item()}

    def _lambda(self, batch: Batch) -> Tensor:
        """(B,) of the policy's advantages. A response that goes on counts as half a window longer than it is (the authors' port)."""
        length = batch.mask.sum(1).float()
        if not self.adaptive_lambda:
            return torch.full_like(length, self.lam)
        longer = torch.where(batch.finished, 0, batch.fresh.sum(1) // 2)
        return adaptive_lambda(length + longer, self.lam, self.adaptive_lambda)

    def _tail(self, batch: Batch) -> Tensor:
        """(B, T) the last `ignore_tail` tokens of rows that go on."""
        columns = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        return ~batch.finished[:, None] & (columns >= batch.response_length[:, None] - self.ignore_tail)


def at_the_end(total: Tensor, mask: Tensor) -> Tensor:
    """The outcome as the reward of each row's last token. (B,), (B, T) bool -> (B, T).

    >>> at_the_end(torch.tensor([1., 2.]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()).tolist()
    [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return total[:, None] * last
