"""Which prompts come next."""

from __future__ import annotations

import random
from collections.abc import Sequence

from localrl.batch import Prompt


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
        """The next `count` prompts, the same whether they are taken at once or one by one. Past the end of an epoch one may come twice."""
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

    def by_id(self) -> dict[int, Prompt]:
        """Every prompt by its number."""
        return {prompt.id: prompt for prompt in self.prompts}
