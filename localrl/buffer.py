"""Which prompts come next, and which rollouts are learned from.

On-policy training is the degenerate buffer: what a step adds is what it draws, once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from localrl.batch import Prompt, Request, Rollout


class PromptStream:
    """Endless prompts: every epoch is a fresh permutation that depends on the seed and the epoch only, so a position says it all.

    >>> stream = PromptStream([Prompt(i, (i,), "") for i in range(3)], seed=0)
    >>> sorted(p.id for p in stream.take(3)), stream.position
    ([0, 1, 2], 3)
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        self.prompts, self.seed, self.shuffle = list(prompts), seed, shuffle
        self.position = 0
        """Prompts handed out since the start of the run."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; within one call no prompt comes twice unless there are too few."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, place = divmod(self.position, len(self.prompts))
            order = list(range(len(self.prompts)))
            if self.shuffle:
                random.Random(f"{self.seed}-{epoch}").shuffle(order)
            more = order[place : place + count - len(taken)]
            taken.extend(self.prompts[i] for i in more)
            self.position += len(more)
        return taken


class RolloutBuffer:
    """Hands out requests for whole groups and keeps their rollouts until they are drawn."""

    def __init__(self, prompts: PromptStream, prompts_per_step: int, num_generations: int) -> None:
        self.prompts, self.prompts_per_step, self.num_generations = prompts, prompts_per_step, num_generations
        self._waiting: list[Rollout] = []

    def requests(self) -> list[Request]:
        """The next step's: `num_generations` of each of the next `prompts_per_step` prompts, a prompt's side by side.

        A prompt that comes twice (a small data file) makes one larger group, whose samples are numbered on.
        """
        seen: Counter[int] = Counter()
        requests = []
        for prompt in self.prompts.take(self.prompts_per_step):
            requests += [Request(prompt, seen[prompt.id] + sample) for sample in range(self.num_generations)]
            seen[prompt.id] += self.num_generations
        return requests

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Scored rollouts, whole groups."""
        self._waiting.extend(rollouts)

    def draw(self) -> list[Rollout]:
        """What the step learns from; they leave the buffer."""
        drawn, self._waiting = self._waiting, []
        return drawn

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs. Between two steps nothing is waiting, so the position in the data is everything."""
        assert not self._waiting, "a checkpoint is written between steps"
        return {"position": self.prompts.position}

    def restore(self, state: dict[str, Any]) -> None:
        """The way back from `state`."""
        self.prompts.position = int(state["position"])
