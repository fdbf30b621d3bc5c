"""What every buffer does, and what more than one of them needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from localrl.algebra import weighted_total
from localrl.batch import Prompt, Request, Rollout
from localrl.settings import UserError


class Buffer(Protocol):
    """Decides what is sampled next and what is learned from. A step: `requests` and `add` until it is `ready`, then `draw`.

    Nobody assumes that what is added answers the last requests: an engine that samples elsewhere may answer earlier ones.
    """

    def requests(self, step: int) -> list[Request]:
        """What the engine should be asked now; may be empty."""

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Scored rollouts, whole groups unless responses grow window by window."""

    @property
    def ready(self) -> bool:
        """There is enough for `draw`."""

    def draw(self, step: int) -> list[Rollout]:
        """What this step learns from, the rollouts of a prompt side by side."""

    def metrics(self) -> dict[str, float]:
        """Figures of the last draw, `buffer/...`."""

    def snapshot(self) -> object:
        """For `rollback`: cheap, nothing is copied but references."""

    def rollback(self, snapshot: Any) -> None:
        """As it was when `snapshot` was taken, the place in the data included."""

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, between two steps, as `json` can write it."""

    def restore(self, state: dict[str, Any]) -> None:
        """The way back from `state`. Raises UserError if it speaks of prompts that are not there."""


def totals(rollouts: Sequence[Rollout], weights: Sequence[float]) -> list[float]:
    """Each rollout's weighted sum of the rewards that apply; NaN if none does."""
    rewards = torch.tensor([r.rewards for r in rollouts], dtype=torch.float64).reshape(len(rollouts), len(weights))
    return [float(x) for x in weighted_total(rewards, torch.tensor(list(weights), dtype=torch.float64))]


def side_by_side(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """The same rollouts, those of a prompt together, prompts in the order of their first one."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.request.prompt.id, []).append(rollout)
    return [rollout for group in groups.values() for rollout in group]


def numbered(prompts: Iterable[Prompt], count: int, seen: Counter[int]) -> list[Request]:
    """`count` requests of each prompt. One that comes again is numbered on, because the numbers name the random streams.

    >>> p = Prompt(7, (1,), "hi")
    >>> [(r.prompt.id, r.sample) for r in numbered([p, p], 2, Counter())]
    [(7, 0), (7, 1), (7, 2), (7, 3)]
    """
    requests = []
    for prompt in prompts:
        requests += [Request(prompt, seen[prompt.id] + sample) for sample in range(count)]
        seen[prompt.id] += count
    return requests


def to_row(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain values; its prompt by number."""
    return {
        "prompt": rollout.request.prompt.id,
        "sample": rollout.request.sample,
        "so_far": len(rollout.request.so_far),
        "tokens": list(rollout.tokens),
        "text": rollout.text,
        "done": rollout.done,
        "version": rollout.version,
        "logp": None if rollout.logp is None else list(rollout.logp),
        "rewards": list(rollout.rewards),
        "more": rollout.more,
        "ref": None if rollout.ref is None else list(rollout.ref),
    }


def from_row(row: Mapping[str, Any], prompts: Mapping[int, Prompt]) -> Rollout:
    """The way back, prompts found by their numbers.

    >>> p = Prompt(7, (1,), "hi")
    >>> r = Rollout(Request(p, 1, (5,)), (5, 6), "yo", False, 3, (-0.5, -0.1), (1.0,), more=True)
    >>> from_row(to_row(r), {7: p}) == r
    True
    """
    tokens = tuple(row["tokens"])
    logp, ref = (None if row[name] is None else tuple(row[name]) for name in ("logp", "ref"))
    request = Request(known(row["prompt"], prompts), row["sample"], tokens[: row["so_far"]])
    return Rollout(request, tokens, row["text"], row["done"], row["version"], logp, tuple(row["rewards"]), row["more"], ref)


def known(prompt: int, prompts: Mapping[int, Prompt]) -> Prompt:
    """The prompt of that number. Raises UserError if there is none."""
    if prompt not in prompts:
        raise UserError(f"the checkpoint keeps responses to prompt {prompt}, which the data lacks ({len(prompts)} prompts): "
                        "resume with the data that the run began with")
    return prompts[prompt]
