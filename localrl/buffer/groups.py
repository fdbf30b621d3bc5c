"""On-policy: what a step samples is what it learns from, once.

With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) a group whose rewards are all alike is set aside, because every advantage in
it is zero, and prompts are sampled on until enough groups can teach something. DAPO samples without end; here `max_resamples` ends it, and
groups that were set aside fill the step up, so that it always has the size that the memory plan counted on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from localrl.batch import Request, Rollout
from localrl.buffer.base import numbered, side_by_side, totals
from localrl.buffer.prompts import PromptStream
from localrl.sections import RolloutSettings

Group = list[Rollout]


class GroupBuffer:
    """Hands out requests for whole groups and keeps their rollouts until they are drawn."""

    def __init__(self, stream: PromptStream, rollout: RolloutSettings, weights: Sequence[float], each_reward: bool = False) -> None:
        self.stream, self.rollout, self.weights, self.each_reward = stream, rollout, tuple(weights), each_reward
        self._metrics: dict[str, float] = {}
        self._start()

    def _start(self) -> None:
        """A step begins."""
        self._groups: list[Group] = []
        self._flat: list[Group] = []
        self._rounds = 0
        self._seen: Counter[int] = Counter()

    def requests(self, step: int) -> list[Request]:
        """`num_generations` of each prompt that is still missing, a prompt's side by side."""
        missing = 0 if self.ready else self.rollout.prompts_per_step - len(self._groups)
        self._rounds += missing > 0
        return numbered(self.stream.take(missing), self.rollout.num_generations, self._seen)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Scored rollouts, whole groups. A prompt that comes twice makes two, each judged by itself."""
        groups: dict[tuple[int, int], Group] = {}
        for r in rollouts:
            groups.setdefault((r.request.prompt.id, r.request.sample // self.rollout.num_generations), []).append(r)
        for group in groups.values():
            keep = not self.rollout.dynamic_sampling or has_signal(group, self.weights, self.each_reward)
            (self._groups if keep else self._flat).append(group)

    @property
    def ready(self) -> bool:
        """All groups are there, or no more rounds are allowed."""
        tired = self._rounds > self.rollout.max_resamples
        return len(self._groups) + (len(self._flat) if tired else 0) >= self.rollout.prompts_per_step

    def draw(self, step: int) -> list[Rollout]:
        """What the step learns from; it leaves the buffer, and so does what was set aside."""
        drawn = [*self._groups, *self._flat][: max(len(self._groups), self.rollout.prompts_per_step)]
        if self.rollout.dynamic_sampling:
            self._metrics = {
                "buffer/resamples": float(self._rounds - 1),
                "buffer/flat_groups": float(len(self._flat)),
                "buffer/flat_drawn": float(len(drawn) - len(self._groups)),
            }
        self._start()
        return side_by_side(r for group in drawn for r in group)

    def metrics(self) -> dict[str, float]:
        """With dynamic sampling: `buffer/resamples` (additional rounds), `buffer/flat_groups` (sampled without signal), `buffer/flat_drawn`
        (of those, learned from for want of better)."""
        return dict(self._metrics)

    def snapshot(self) -> object:
        """See `Buffer`."""
        return self.stream.position, list(self._groups), list(self._flat), self._rounds, Counter(self._seen)

    def rollback(self, snapshot: Any) -> None:
        """See `Buffer`."""
        self.stream.position, groups, flat, self._rounds, seen = snapshot
        self._groups, self._flat, self._seen = list(groups), list(flat), Counter(seen)

    def state(self) -> dict[str, Any]:
        """Between two steps nothing is waiting, so the position in the data is everything."""
        assert not self._groups and not self._flat, "a checkpoint is written between steps"
        return {"position": self.stream.position}

    def restore(self, state: dict[str, Any]) -> None:
        """The way back from `state`."""
        self._start()
        self.stream.position = int(state["position"])


def has_signal(group: Sequence[Rollout], weights: Sequence[float], each_reward: bool = False) -> bool:
    """Do the total rewards differ within the group? NaN is left out. `each_reward`: does any of the rewards that count?

    >>> from localrl.batch import Prompt
    >>> group = [Rollout(Request(Prompt(0, (1,), "")), (5,), "", True, 0, rewards=r) for r in ((1.0, 0.0), (0.0, 1.0))]
    >>> has_signal(group, (1.0, 1.0)), has_signal(group, (1.0, 0.5)), has_signal(group, (1.0, 1.0), each_reward=True)
    (False, True, True)
    """
    columns = [totals(group, weights)]
    if each_reward:
        columns += [[r.rewards[i] for r in group] for i, weight in enumerate(weights) if weight]
    spreads = [[x for x in column if x == x] for column in columns]
    return any(max(known) > min(known) for known in spreads if known)
