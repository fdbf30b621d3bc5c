"""Why is it not learning? Each step's numbers are looked at, and what is wrong is said once, with the reason and a way out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm

GIB = 2**30
DECOUPLED = [f"algorithm.name={name}" for name, kind in ALGORITHMS.items() if kind.decouples_rewards]
MEMORY = 20
"""Steps that an algorithm's own alarms may look back."""
PATIENCE = 5
"""Steps in a row before a standing condition is reported: one bad batch is no diagnosis."""
DRIFT = {"allocated": 1.05, "resident": 1.25}
"""Measured over planned memory that is worth a word: of a GPU's allocator, and of a whole process, which is known but roughly."""
LEAK_STEPS, LEAK = 10, {"allocated": 1.02, "resident": 1.10}
"""Memory that has risen with each of so many steps, by that factor in all."""
OTHERS = GIB // 2
"""Bytes that others may take unremarked: less can be our own kernels, which are loaded when they are first used."""


GAP, DIVERGENCE = 0.1, 0.01
"""Between a sampler and the policy it samples for: mean difference of log-probabilities, and KL divergence (k3), in nats, that are worth a word."""


class Health:
    """Remembers the last steps and speaks up when a run cannot learn."""

    def __init__(self, names: Sequence[str], algorithm: Algorithm, past: Sequence[dict[str, float]] = ()) -> None:
        """`past`: metrics of the steps before, of a run that is resumed."""
        self.names, self.algorithm = list(names), algorithm
        self._first: dict[str, float] = past[0] if past else {}
        self._history: deque[dict[str, float]] = deque(past, maxlen=MEMORY)
        self._recent: deque[dict[str, float]] = deque(maxlen=PATIENCE)
        self._said: set[str] = set()
        self._entropy_at_start: float | None = None

    @property
    def _compares(self) -> bool:
        """The algorithm learns from differences within a group alone."""
        return self.algorithm.needs_contrast or (self.algorithm.group_size > 1 and not self.algorithm.learns_from_old)

    def look(self, metrics: dict[str, float]) -> list[str]:
        """New findings after one more step, each a sentence; a finding is reported once a run."""
        return [text for _, text in self.news(metrics)]

    def standing(self) -> list[tuple[str, str]]:
        """(key, sentence) of all that is the matter after the step that was looked at last, told before or not."""
        return self._findings(self._recent[-1], self._recent[-1].get("entropy", math.nan)) if self._recent else []

    def news(self, metrics: dict[str, float]) -> list[tuple[str, str]]:
        """As `look`, with the key of each finding."""
        self._recent.append(metrics)
        self._history.append(metrics)
        self._first = self._first or metrics
        entropy = metrics.get("entropy", math.nan)
        if self._entropy_at_start is None and not math.isnan(entropy):
            self._entropy_at_start = entropy
        new = [(key, text) for key, text in self._findings(metrics, entropy) if key not in self._said]
        self._said |= {key for key, _ in new}
        return new

    def _findings(self, now: dict[str, float], entropy: float) -> list[tuple[str, str]]:
        own = self.algorithm.alarms(self._first, list(self._history))
        return [*self._of_this_step(now), *self._of_memory(now), *own, *(self._of_the_last_steps(now, entropy) if len(self._recent) == PATIENCE else ())]

    def _of_this_step(self, now: dict[str, float]) -> Iterator[tuple[str, str]]:
        if not math.isfinite(now.get("grad_norm", 0.0)):
            yield "nan", f"step {now['step']:.0f}: the gradient is not finite, the update was skipped; lower optim.learning_rate if it happens again"
        if now.get("completions/clipped_ratio", 0) == 1:
            yield "cut", ("every completion was cut at rollout.max_completion_length: the model never ends by itself; "
                          "raise the limit, or check the end token and the chat template")
        difference, kl = now.get("sampler/mean_difference", 0.0), now.get("sampler/kl", 0.0)
        if now.get("sampler/age", 1.0) == 0 and (difference > GAP or kl > DIVERGENCE):
            yield "gap", (f"the sampler is not quite the policy: log-probabilities differ by {difference:.2g} nats on average ({GAP:g} goes unremarked), "
                          f"KL {kl:.2g} ({DIVERGENCE:g}), effective sample size {now.get('sampler/ess', math.nan):.0%}; what is learned is corrected for it "
                          "and noisier: take rollout.gguf=q8_0 or rollout.engine=torch, and leave top_p and top_k alone")
        if now.get("frac_unscored", 0) == 1:
            yield "unscored", "no completion got any reward this step (every reward returned None or failed): nothing can be learned so"

    def _of_memory(self, now: dict[str, float]) -> Iterator[tuple[str, str]]:
        for name, ratio in now.items():
            if not (name.startswith("memory/") and name.endswith("_ratio")):
                continue
            phase = name.removeprefix("memory/").removesuffix("_ratio")
            kind = "allocated" if f"memory/{phase}_reserved" in now else "resident"
            held, planned = now[f"memory/{phase}"] / GIB, now[f"memory/{phase}_planned"] / GIB
            if ratio > DRIFT[kind]:
                yield f"drift {phase}", (f"{phase} took {held:.2f} GiB where the plan had {planned:.2f} GiB ({ratio:.2f} times; {DRIFT[kind]:.2f} is normal): "
                                         "the next plan will count on it; if memory runs out, lower memory.micro_batch_tokens or rollout.concurrent")
            past = [step.get(f"memory/{phase}", math.nan) for step in self._history][-LEAK_STEPS - 1 :]
            if len(past) > LEAK_STEPS and all(a < b for a, b in pairwise(past)) and past[-1] > LEAK[kind] * past[0]:
                yield f"leak {phase}", (f"memory of {phase} has risen with each of the last {LEAK_STEPS} steps, from {past[0] / GIB:.2f} to {held:.2f} GiB "
                                        f"(planned {planned:.2f} GiB): if responses have not grown as well, something is never freed; "
                                        "stop and go on with `localrl resume`, which starts afresh")
        if (others := now.get("memory/others", 0.0)) > OTHERS:
            yield "others", (f"another program took {others / GIB:.1f} GiB of the card since the start ({OTHERS / GIB:.1f} GiB go unremarked): "
                             "close it, or the run will have to make do with smaller passes; `localrl doctor` lists who is there")

    def _of_the_last_steps(self, now: dict[str, float], entropy: float) -> Iterator[tuple[str, str]]:
        if self._always("completions/unfinished", 0.95):
            yield "endless", (f"for {PATIENCE} steps nearly every response has gone on beyond its window: hardly one is scored, and nobody learns that it "
                              "should end; resume an earlier checkpoint with a lower optim.learning_rate, or take a larger rollout.window")
        if self._always("frac_reward_cancelling", 0.5):
            yield "cancel", (f"for {PATIENCE} steps single rewards varied while their weighted sum stayed equal within groups: they cancel, so the "
                             f"advantage is 0; change the weights, or take an algorithm that normalises each reward by itself ({', '.join(DECOUPLED)})")
        elif self._compares and self._always("frac_reward_zero_std", 1.0):
            means = ", ".join(f"{n} {now.get(f'rewards/{n}/mean', math.nan):.2f}" for n in self.names)
            yield "flat", (f"for {PATIENCE} steps all rollouts of every prompt got the same reward ({means}): nothing can be learned; if they are all wrong, "
                           "it is too hard for the base (ease the prompts, or give partial credit), if all right, it is learned")
        start = self._entropy_at_start
        if start and start > 0.05 and all(m.get("entropy", 1.0) < 0.1 * start for m in self._recent):
            yield "entropy", (f"entropy collapsed from {start:.3f} to {entropy:.3f} nats: rollouts repeat each other and exploration ends; "
                              "lower optim.learning_rate, or stop here if the reward is as high as it can be")

    def _always(self, name: str, least: float) -> bool:
        return all(m.get(name, 0) >= least for m in self._recent)
