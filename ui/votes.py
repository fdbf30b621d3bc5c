"""Which answer somebody liked better, not knowing whose it was; kept line by line, counted, and written out as preferences.

    .localrl/votes/<run>.jsonl      a line a vote
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from localrl.folder import clean

from .place import Place

PREFERRED = "preferred"
"""Name of the reward that a vote is, in a log: 1 for the better answer, 0 for a worse one, 1/2 for each of a tie."""
Z = 1.959963984540054
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Answer:
    """What one column said."""

    model: str
    response: str
    done: bool = True
    rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Vote:
    """Answers to one prompt, and which of them was liked best; None: a tie."""

    prompt: str | list[dict[str, str]]
    answers: tuple[Answer, ...]
    best: int | None
    about: Mapping[str, Any] = field(default_factory=dict)
    """Seed, sampling, time, and whatever else is known."""


@dataclass(frozen=True)
class Pair:
    """Two models, by name in order. A tie counts half for each."""

    first: str
    second: str
    wins: int
    losses: int
    ties: int

    @property
    def share(self) -> float:
        """Of the first."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the first one's share."""
        return wilson(self.share, self.wins + self.losses + self.ties)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval for a share of `count` votes; everything is possible without any."""
    if count == 0:
        return 0.0, 1.0
    scale = 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(votes: Iterable[Vote]) -> list[Pair]:
    """Per pair of models. The best one beats each other answer; between two that were not best nothing is known, and nothing counted."""
    counts: dict[tuple[str, str], list[int]] = {}
    for vote in votes:
        for one, other in combinations(range(len(vote.answers)), 2):
            if vote.best not in (None, one, other):
                continue
            if (a := vote.answers[one].model) == (b := vote.answers[other].model):
                continue                                             # a model beside itself tells nothing
            if a > b:
                a, b, one, other = b, a, other, one
            counts.setdefault((a, b), [0, 0, 0])[2 if vote.best is None else int(vote.best == other)] += 1
    return [Pair(*names, *found) for names, found in sorted(counts.items())]


def preferences(votes: Iterable[Vote]) -> list[dict[str, Any]]:
    """A row an answer, as `localrl train --from-log` reads them. A worse answer's row also has `chosen` and `rejected`: each pair stands there once."""
    rows = []
    for vote in votes:
        for at, answer in enumerate(vote.answers):
            liked = 0.5 if vote.best is None else float(at == vote.best)
            worse = vote.best is not None and at != vote.best
            rows.append({
                "prompt": vote.prompt, "response": answer.response, "done": answer.done, "rewards": {PREFERRED: liked},
                "chosen": vote.answers[vote.best].response if worse and vote.best is not None else None, "rejected": answer.response if worse else None,
                "model": answer.model, "run_rewards": dict(answer.rewards), "about": dict(vote.about),
            })  # fmt: skip
    return [clean(row) for row in rows]


def file_of(place: Place, run: Path) -> Path:
    """Where the votes on a run are kept: its path in the workspace, each part escaped, so that no two runs share one."""
    from urllib.parse import quote

    return place.own("votes") / f"{quote(place.shown(run), safe='')}.jsonl"


def keep(file: Path, vote: Vote) -> None:
    """One more line, in a single write: tabs may vote at once."""
    line = json.dumps(clean(asdict(vote)), ensure_ascii=True) + "\n"
    with file.open("ab", buffering=0) as out:
        out.write(line.encode())


def read(file: Path) -> tuple[list[Vote], int]:
    """The votes, and how many lines are none."""
    try:
        lines: Sequence[str] = file.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return [], 0
    votes = []
    for line in lines:
        try:
            votes.append(_vote(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            continue
    return votes, len(lines) - len(votes)


def _vote(found: dict[str, Any]) -> Vote:
    vote = Vote(found["prompt"], tuple(Answer(**answer) for answer in found["answers"]), found["best"], found["about"])
    if vote.best is not None and vote.best not in range(len(vote.answers)):
        raise ValueError("the best answer is none of them")
    return vote
