"""Why is it not learning? Each step's numbers are looked at, and what is wrong is said once, with the reason and a way out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

PATIENCE = 5
"""Steps in a row before a standing condition is reported: one bad batch is no diagnosis."""


class Health:
    """Remembers the last steps and speaks up when a run cannot learn."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._recent: deque[dict[str, float]] = deque(maxlen=PATIENCE)
        self._said: set[str] = set()
        self._entropy_at_start: float | None = None

    def look(self, metrics: dict[str, float]) -> list[str]:
        """New findings after one more step, each a sentence; a finding is reported once a run."""
        self._recent.append(metrics)
        entropy = metrics.get("entropy", math.nan)
        if self._entropy_at_start is None and not math.isnan(entropy):
            self._entropy_at_start = entropy
        return [text for key, text in self._findings(metrics, entropy) if not (key in self._said or self._said.add(key))]  # type: ignore[func-returns-value]

    def _findings(self, now: dict[str, float], entropy: float) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if not math.isfinite(now.get("grad_norm", 0.0)):
            found.append(("nan", f"step {now['step']:.0f}: the gradient is not finite, the update was skipped; lower optim.learning_rate if it happens again"))
        if now.get("completions/clipped_ratio", 0) == 1:
            found.append(("cut", "every completion was cut at rollout.max_completion_length: the model never ends by itself; raise the limit, or check the end token and chat template"))
        if now.get("frac_unscored", 0) == 1:
            found.append(("unscored", "no completion got any reward this step (every reward returned None or failed): nothing can be learned until one does"))
        if len(self._recent) < PATIENCE:
            return found

        def always(name: str, least: float) -> bool:
            return all(m.get(name, 0) >= least for m in self._recent)

        if always("frac_reward_cancelling", 0.5):
            found.append(("cancel", f"for {PATIENCE} steps single rewards varied while their weighted sum stayed equal within groups: they cancel, so the advantage is 0; "
                                    "change the weights, or use algorithm.name=gdpo, which normalises each reward by itself"))
        elif always("frac_reward_zero_std", 1.0):
            means = ", ".join(f"{n} {now.get(f'rewards/{n}/mean', math.nan):.2f}" for n in self.names)
            found.append(("flat", f"for {PATIENCE} steps all rollouts of every prompt got the same reward ({means}): nothing can be learned; if they are all wrong, the task is "
                                  "too hard for the base (train it to do it sometimes, ease the prompts, or give partial credit), if all right, it is learned"))
        if self._entropy_at_start and self._entropy_at_start > 0.05 and all(m.get("entropy", 1) < 0.1 * self._entropy_at_start for m in self._recent):
            found.append(("entropy", f"entropy collapsed from {self._entropy_at_start:.3f} to {entropy:.3f} nats: rollouts repeat each other and exploration ends; "
                                     "lower optim.learning_rate, or stop here if the reward is as high as it can be"))
        return found
