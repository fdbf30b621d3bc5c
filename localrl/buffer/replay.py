"""Replay: rollouts of each prompt are kept and learned from again (Trajectory Balance with Asynchrony, arXiv 2503.18929, section 4).

Details that matter:
- A prompt keeps its newest different responses. A response that is sampled again counts as new.
- A group is drawn either from what came since the sampler last got the policy's weights, all alike, or from all that the prompt keeps, by
  reward. Prompts take turns in both cases.
- A prompt with one response only teaches nothing where rollouts are compared: it waits until there are two, unless no prompt has.
- A rollout without any reward, or that a filter refuses, is not kept.
- Every draw has a random stream of its own, named by seed and step, so that a resumed run draws the same.
- Sampled and learned rollouts stay in proportion: between two times that the sampler gets new weights, as many are sampled as are drawn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from localrl.batch import Request, Rollout
from localrl.buffer.base import from_row, side_by_side, to_row, totals
from localrl.buffer.keep import Kept, merge, pick, take_turn
from localrl.buffer.prompts import PromptStream
from localrl.sections import ReplaySettings, RolloutSettings
from localrl.settings import UserError

PATIENCE = 20
"""Steps' worth of rollouts in a row of which none could be kept, while there is not enough to learn from, until the run gives up."""


class ReplayBuffer:
    """What was sampled, by prompt. `filters`: (index of a reward, least value); `least`: different responses that make a group worth drawing;
    `asynchronous`: samples are asked for at every step, because they are made elsewhere meanwhile."""

    def __init__(
        self, stream: PromptStream, rollout: RolloutSettings, replay: ReplaySettings, weights: Sequence[float],
        filters: Sequence[tuple[int, float]], least: int, asynchronous: bool,
    ) -> None:  # fmt: skip
        self.stream, self.rollout, self.replay, self.weights = stream, rollout, replay, tuple(weights)
        self.filters, self.least, self.asynchronous = tuple(filters), least, asynchronous
        self.heat = replay.inverse_temperature if replay.draw == "reward" else 0.0
        self._kept: dict[int, tuple[Kept, ...]] = {}
        self._step = self._latest = self._welcome = self._refused_in_a_row = 0
        self._used: set[int] = set()
        self._used_recent: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._metrics: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------------------ sampling

    def requests(self, step: int) -> list[Request]:
        """A step's worth where others sample meanwhile. Else what all steps until the next new weights will draw, or nothing if that is there.

        A prompt's samples are numbered on from epoch to epoch: asked again at the same weights, it must not say the same.
        """
        self._step = step
        self._expire(step)
        if not self.asynchronous and step % self.replay.sync_every and self.ready:
            return []
        steps = 1 if self.asynchronous else self.replay.sync_every
        start, size, group = self.stream.position, len(self.stream.prompts), self.rollout.num_generations
        prompts = self.stream.take(self.rollout.prompts_per_step * steps)
        return [Request(p, (start + i) // size * group + sample) for i, p in enumerate(prompts) for sample in range(group)]

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Scored rollouts, in any order and number. Raises UserError where `PATIENCE` ends."""
        scored = list(zip(rollouts, totals(rollouts, self.weights), strict=True))
        self._counts["buffer/unscored"] += sum(total != total for _, total in scored)
        new: dict[int, list[Kept]] = {}
        for rollout, total in scored:
            if total == total and self._passes(rollout):
                new.setdefault(rollout.request.prompt.id, []).append(Kept(rollout, total, self._step))
        for prompt, items in new.items():
            before = self._kept.get(prompt, ())
            self._kept[prompt] = merge(before, items, self.replay.capacity)
            self._counts["buffer/duplicates"] += len(before) + len(items) - len({item.rollout.tokens for item in (*before, *items)})
            self._used_recent.discard(prompt)
        welcome = sum(map(len, new.values()))
        if welcome:
            self._latest, self._welcome, self._refused_in_a_row = self._step, self._welcome + welcome, 0
        else:
            self._refused_in_a_row += len(rollouts)
        if not self.ready and self._refused_in_a_row > PATIENCE * self.rollout.prompts_per_step * self.rollout.num_generations:
            raise UserError(f"none of the last {self._refused_in_a_row} rollouts had a reward and passed replay.filters, so there is not enough "
                            "to learn from: lower at_least, or look at what the rewards say of the completions")

    def _passes(self, rollout: Rollout) -> bool:
        passes = all(rollout.rewards[index] >= least for index, least in self.filters)            # False for NaN
        self._counts["buffer/refused"] += not passes
        return passes

    @property
    def ready(self) -> bool:
        """There is something to draw, and before the first update `prefill` rollouts came that could be kept."""
        return bool(self._kept) and self._welcome >= self.replay.prefill

    # ------------------------------------------------------------------------------------------------------------- drawing

    def draw(self, step: int) -> list[Rollout]:
        """`prompts_per_step` groups of `num_generations`. They stay in the buffer; one with few responses may hold some twice."""
        self._expire(step)
        chance = random.Random(f"{self.stream.seed}-draw-{step}")
        everything = {prompt: items for prompt, items in self._kept.items() if len(items) >= self.least} or self._kept
        recent = {prompt: items for prompt, items in self._recent(step).items() if len(items) >= self.least}
        taken: set[int] = set()
        groups, recents = [], 0
        for _ in range(self.rollout.prompts_per_step):
            if chance.random() < self.replay.recent and not recent.keys() <= taken:
                items, heat = recent[take_turn(recent, self._used_recent, taken, chance)], 0.0
                recents += 1
            else:
                items, heat = everything[take_turn(everything, self._used, taken, chance)], self.heat
            groups.append(pick(items, self.rollout.num_generations, heat, chance))
        drawn = [rollout for group in groups for rollout in group]
        self._report(step, drawn, recents / len(groups))
        return side_by_side(drawn)

    def _recent(self, step: int) -> dict[int, tuple[Kept, ...]]:
        """What came since the sampler last got weights; of slow samplers, what came last."""
        since = min(step - self.replay.sync_every + 1, self._latest)
        found = {prompt: tuple(item for item in items if item.arrived >= since) for prompt, items in self._kept.items()}
        return {prompt: items for prompt, items in found.items() if items}

    def _expire(self, step: int) -> None:
        if self.replay.max_staleness is None:
            return
        for prompt, items in list(self._kept.items()):
            young = tuple(item for item in items if step - item.rollout.version <= self.replay.max_staleness)
            self._counts["buffer/expired"] += len(items) - len(young)
            if young:
                self._kept[prompt] = young
            else:
                del self._kept[prompt]

    def _report(self, step: int, drawn: Sequence[Rollout], recent: float) -> None:
        ages = [step - rollout.version for rollout in drawn]
        self._metrics = {
            "buffer/staleness/mean": sum(ages) / len(ages),
            "buffer/staleness/max": float(max(ages)),
            "buffer/size": float(sum(map(len, self._kept.values()))),
            "buffer/prompts": float(len(self._kept)),
            "buffer/recent": recent,
            "buffer/repeats": 1 - len({(r.request.prompt.id, r.tokens) for r in drawn}) / len(drawn),
            **{name: float(self._counts[name]) for name in ("buffer/duplicates", "buffer/refused", "buffer/unscored", "buffer/expired")},
        }
        self._counts = Counter()

    def metrics(self) -> dict[str, float]:
        """Of what was drawn: `buffer/staleness/mean` and `/max` (updates since it was sampled), `buffer/recent` (share of groups),
        `buffer/repeats` (share of rollouts that the draw holds already). Of what is kept: `buffer/size` (rollouts), `buffer/prompts`. Since
        the last draw: `buffer/duplicates` (said before), `buffer/refused` (by filters), `buffer/unscored`, `buffer/expired` (too old)."""
        return dict(self._metrics)

    # -------------------------------------------------------------------------------------------------------- stop and go

    def snapshot(self) -> object:
        """See `Buffer`."""
        numbers = (self._step, self._latest, self._welcome, self._refused_in_a_row)
        return self.stream.position, dict(self._kept), set(self._used), set(self._used_recent), Counter(self._counts), numbers

    def rollback(self, snapshot: Any) -> None:
        """See `Buffer`."""
        self.stream.position, kept, used, used_recent, counts, numbers = snapshot
        self._kept, self._used, self._used_recent, self._counts = dict(kept), set(used), set(used_recent), Counter(counts)
        self._step, self._latest, self._welcome, self._refused_in_a_row = numbers

    def state(self) -> dict[str, Any]:
        """See `Buffer`. Grows with what is kept."""
        rows = [to_row(item.rollout) | {"arrived": item.arrived} for items in self._kept.values() for item in items]
        return {
            "position": self.stream.position, "kept": rows, "used": sorted(self._used), "used_recent": sorted(self._used_recent),
            "latest": self._latest, "welcome": self._welcome,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """See `Buffer`."""
        rollouts, arrived = _rollouts(state["kept"], self.stream)
        self._kept = {}
        for rollout, total, came in zip(rollouts, totals(rollouts, self.weights), arrived, strict=True):
            prompt = rollout.request.prompt.id
            self._kept[prompt] = (*self._kept.get(prompt, ()), Kept(rollout, total, came))
        self._used, self._used_recent = set(state["used"]), set(state["used_recent"])
        self._latest, self._welcome = int(state["latest"]), int(state["welcome"])
        self.stream.position = int(state["position"])


def _rollouts(rows: Iterable[Mapping[str, Any]], stream: PromptStream) -> tuple[list[Rollout], list[int]]:
    prompts = stream.by_id()
    rows = list(rows)
    return [from_row(row, prompts) for row in rows], [row["arrived"] for row in rows]
