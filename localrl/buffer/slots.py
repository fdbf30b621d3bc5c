"""Windows: responses grow by a limited number of tokens a step, and all slots learn at every step (T-PPO, arXiv 2506.15050, section 3).

A fixed number of slots is always busy. An unfinished response goes on in its slot, a finished one makes room for the next sample of the
prompt in turn, so that no step waits for its longest response. With a window as long as the longest response this is `GroupBuffer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, filterfalse, islice
from typing import Any

from localrl.batch import Request, Rollout
from localrl.buffer.base import from_row, known, side_by_side, to_row
from localrl.buffer.prompts import PromptStream
from localrl.sections import RolloutSettings

Key = tuple[int, int]
"""Prompt and sample: no two live rollouts share both."""


class SlotBuffer:
    """`prompts_per_step * num_generations` slots."""

    def __init__(self, stream: PromptStream, rollout: RolloutSettings) -> None:
        self.stream, self.rollout = stream, rollout
        self.slots = rollout.prompts_per_step * rollout.num_generations
        self._live: dict[Key, Rollout] = {}
        self._queue: list[Request] = []
        """Samples of the prompt in turn that found no free slot."""
        self._asked: list[Request] = []
        self._arrived: dict[Key, Rollout] = {}
        self._metrics: dict[str, float] = {}

    def requests(self, step: int) -> list[Request]:
        """This step's windows, as far as they are not there: first what goes on, then what starts."""
        if not self._asked:
            self._asked = [Request(r.request.prompt, r.request.sample, r.tokens) for r in self._live.values()]
            while len(self._asked) < self.slots:
                if not self._queue:
                    self._next_prompt()
                self._asked.append(self._queue.pop(0))
        return [request for request in self._asked if key(request) not in self._arrived]

    def _next_prompt(self) -> None:
        """Its samples get the lowest numbers that no live one of the same prompt has."""
        prompt = self.stream.take(1)[0]
        taken = {request.sample for request in self._asked if request.prompt.id == prompt.id}
        self._queue = [Request(prompt, sample) for sample in islice(filterfalse(taken.__contains__, count()), self.rollout.num_generations)]

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """This step's windows. What the sampler said of earlier windows' tokens is filled in: the engine knows only those it sampled."""
        for rollout in rollouts:
            self._arrived[key(rollout.request)] = self._whole(rollout)

    def _whole(self, rollout: Rollout) -> Rollout:
        earlier = self._live.get(key(rollout.request))
        if earlier is None:
            return rollout
        assert rollout.request.so_far == earlier.tokens, "a window goes on where the last one ended"
        if rollout.logp is None or earlier.logp is None:
            return replace(rollout, logp=None)
        return replace(rollout, logp=(*earlier.logp, *rollout.logp[len(earlier.logp) :]))

    @property
    def ready(self) -> bool:
        """Every slot's window is there."""
        return bool(self._asked) and len(self._arrived) == len(self._asked)

    def draw(self, step: int) -> list[Rollout]:
        """The windows of all slots, finished or not; the unfinished ones stay live."""
        drawn = side_by_side(self._arrived[key(request)] for request in self._asked)
        continued = sum(bool(r.request.so_far) for r in drawn)
        self._live = {key(r.request): r for r in drawn if r.more}
        self._metrics = {
            "buffer/continued": float(continued),
            "buffer/unfinished": float(len(self._live)),
            "buffer/longest_unfinished": float(max((len(r.tokens) for r in self._live.values()), default=0)),
        }
        self._asked, self._arrived = [], {}
        return drawn

    def metrics(self) -> dict[str, float]:
        """Slots: `buffer/continued` (went on in this step), `buffer/unfinished` (will in the next); `buffer/longest_unfinished`, tokens."""
        return dict(self._metrics)

    def snapshot(self) -> object:
        """See `Buffer`."""
        return self.stream.position, dict(self._live), list(self._queue), list(self._asked), dict(self._arrived)

    def rollback(self, snapshot: Any) -> None:
        """See `Buffer`."""
        self.stream.position, live, queue, asked, arrived = snapshot
        self._live, self._queue, self._asked, self._arrived = dict(live), list(queue), list(asked), dict(arrived)

    def state(self) -> dict[str, Any]:
        """See `Buffer`."""
        assert not self._asked, "a checkpoint is written between steps"
        live = [to_row(r) for r in self._live.values()]
        return {"position": self.stream.position, "live": live, "queue": [list(key(request)) for request in self._queue]}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Buffer`."""
        prompts = self.stream.by_id()
        live = [from_row(row, prompts) for row in state["live"]]
        self._live = {key(r.request): r for r in live}
        self._queue = [Request(known(prompt, prompts), sample) for prompt, sample in state["queue"]]
        self._asked, self._arrived = [], {}
        self.stream.position = int(state["position"])


def key(request: Request) -> Key:
    """What names a live rollout."""
    return request.prompt.id, request.sample
