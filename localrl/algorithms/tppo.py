"""T-PPO: PPO that does not wait for the longest response. Each step lets every response grow by one window and learns from the new tokens.

Paper: Truncated Proximal Policy Optimization, arXiv 2506.15050. The policy learns from all fresh tokens, finished or not (EGAE), the critic
from finished responses only, with Monte-Carlo targets. Finished slots take new prompts: that is `rollout.window` and the buffer's work.
"""

from __future__ import annotations

from typing import Literal

from localrl.algorithms.ppo import PPO


class TPPO(PPO):
    """Truncated Proximal Policy Optimisation."""

    name: Literal["tppo"] = "tppo"  # type: ignore[assignment]
    """Truncated Proximal Policy Optimisation: PPO on windows."""
    epsilon_high: float | None = 0.28
    """How far above 1 the probability ratio may push."""
    dual_clip: float = 10.0
    """Bound of ratio * advantage for bad tokens that have become much likelier, times the advantage."""
    value_clip: float = 0.5
    """How far below its old value the critic may learn to go in one step."""
    value_clip_high: float = 0.6
    """How far above."""
    adaptive_lambda: float = 0.05
    """Alpha of the length-adaptive lambda, max(lam, 1 - 1 / (alpha * length)). 0: off."""
    lm_coef: float = 0.1
    """Weight of a language-model loss on finished responses with a positive reward."""
    critic_warmup: int = 10
    """First updates in which only the critic learns: before it knows anything, unfinished responses have no advantage at all."""
    advantage_clamp: float = 10.0
    """Whitened advantages are cut at plus and minus this."""
    ignore_tail: int = 8
    """Last tokens of a window that an unfinished response does not learn from."""

    needs_window = True
