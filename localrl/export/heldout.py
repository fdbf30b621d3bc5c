"""The run's own rewards through a file: the same prompts and the same random numbers as the live model, scored by the same functions.

With common random numbers a file that says what the model says gives the same answers, so that what is left of the difference is the file's
doing and its interval is narrow. llama.cpp answers in a child process, with its own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localrl.batch import Rollout
from localrl.evaluate import total
from localrl.export.check import ask_child, threads_for
from localrl.export.report import Interval, RewardChange, Row
from localrl.settings import UserError

WORKER = Path(__file__).with_name("answer_worker.py")
ANSWERING = 300.0
"""Seconds after which no further wave of answers is begun: a large file on few cores answers some of the prompts."""
ROWS = 32
"""Most answers that are written at a time."""
CACHE = 2**30
"""Bytes of keys and values at a time."""
LOSS = 0.05
"""Share of the reward's scale by which a file may certainly be worse than the model."""

PerPrompt = Mapping[int, float]
"""Prompt id -> the mean over its answers."""


@dataclass(frozen=True)
class HeldOut:
    """What the live model answered, and all that it takes to ask a file the same."""

    rollouts: Sequence[Rollout]
    """Scored; those of one prompt side by side."""
    uniforms: NDArray[np.float64]
    """(tokens, answers): the random number behind each token."""
    temperature: float
    stop: Sequence[str]
    names: Sequence[str]
    """Of the rewards; empty: only endings are compared."""
    weights: Sequence[float]
    score: Callable[[list[Rollout]], list[Rollout]]
    decode: Callable[[Sequence[Sequence[int]]], list[str]]
    """Token ids -> texts without special tokens, as the rewards see them."""
    progress: Callable[[str], None]
    """Hears what is being done."""

    def __post_init__(self) -> None:
        if len({r.request.prompt.id for r in self.rollouts}) < 2:
            raise UserError("rewards are compared over prompts, and there are fewer than 2: hold some out (data.holdout) or set export.prompts=0")


@dataclass(frozen=True)
class Graded:
    """A file's answers beside the model's."""

    rows: tuple[Row, ...]
    rewards: Mapping[str, RewardChange]
    totals: PerPrompt
    """The file's weighted rewards; empty where nothing scores."""


def grade(file: Path, adapter: Path | None, held: HeldOut, cache_bytes: int) -> Graded:
    """Let the file answer, score what it says. `cache_bytes`: keys and values of one token, in F16."""
    held.progress(f"{(adapter or file).name.removesuffix('.tmp')} answers held-out prompts")
    answers, words = answer(file, adapter, held, cache_bytes)
    if answers is None:
        return Graded((Row("held-out answers", False, "llama.cpp gave none", "answers", words),), {}, {})
    before = [r for r, a in zip(held.rollouts, answers, strict=True) if a is not None]
    given = [a for a in answers if a is not None]
    texts = held.decode([a["tokens"] for a in given])
    fresh = [replace(r, tokens=tuple(a["tokens"]), text=t, done=a["done"], logp=None, rewards=())
             for r, a, t in zip(before, given, texts, strict=True)]  # fmt: skip
    after = held.score(fresh) if held.names else fresh
    ended = change_of(before, after, lambda r: float(r.done))
    same = sum(a.tokens == b.tokens for a, b in zip(before, after, strict=True))
    asked = f"{len(given)} answers to {len({r.request.prompt.id for r in before})} prompts"
    cut = "" if len(given) == len(answers) else f"of {len(answers)}, for lack of time; "
    rows = [Row("held-out answers", True, asked, "answers", f"{cut}{same} word for word the model's")]
    if ended is not None:
        rows.append(ending(ended))
    rewards: dict[str, RewardChange] = {}
    for name, value in measures(held):
        change = change_of(before, after, value)
        if change is not None:
            rewards[name] = change
            rows.append(verdict(name, change, spread(means(before, value)), decides=name == "reward"))
    totals = means(after, lambda r: total(r.rewards, held.weights)) if held.names else {}
    return Graded(tuple(rows), rewards, totals)


def measures(held: HeldOut) -> list[tuple[str, Callable[[Rollout], float]]]:
    """What is compared: the weighted sum, and each reward if there are several."""
    if not held.names:
        return []
    each = [(f"reward {name}", lambda r, i=i: float(r.rewards[i])) for i, name in enumerate(held.names)]
    return [("reward", lambda r: total(r.rewards, held.weights)), *(each if len(each) > 1 else [])]


def answer(file: Path, adapter: Path | None, held: HeldOut, cache_bytes: int) -> tuple[list[dict[str, Any] | None] | None, str]:
    """The child's answers (None for prompts that it did not come to), or None and what it said before it died."""
    width = max(len(r.request.prompt.tokens) for r in held.rollouts) + len(held.uniforms)
    job = {
        "model": str(file),
        "adapter": str(adapter) if adapter else None,
        "threads": threads_for(file),
        "rows": max(1, min(ROWS, CACHE // (cache_bytes * width))),
        "prompts": [list(r.request.prompt.tokens) for r in held.rollouts],
        "limit": len(held.uniforms),
        "temperature": held.temperature,
        "stop": [stop for stop in held.stop if stop],
        "seconds": ANSWERING,
    }
    found, words = ask_child(WORKER, job, held.uniforms)
    return (None if found is None else found["answers"]), words


def means(rollouts: Sequence[Rollout], value: Callable[[Rollout], float]) -> dict[int, float]:
    """Each prompt's mean over the answers to which the value applies."""
    found: dict[int, list[float]] = {}
    for rollout in rollouts:
        if not math.isnan(worth := value(rollout)):
            found.setdefault(rollout.request.prompt.id, []).append(worth)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def change_of(before: Sequence[Rollout], after: Sequence[Rollout], value: Callable[[Rollout], float]) -> RewardChange | None:
    """Before, after and their difference over the prompts that have both; None for fewer than two."""
    first, second = means(before, value), means(after, value)
    both = sorted(first.keys() & second.keys())
    if len(both) < 2:
        return None
    return RewardChange(*(interval(v) for v in ([first[i] for i in both], [second[i] for i in both], [second[i] - first[i] for i in both])))


def interval(values: Sequence[float]) -> Interval:
    """Mean and twice its standard error; at least two values.

    >>> interval([0.0, 1.0, 0.0, 1.0])
    Interval(mean=0.5, half=0.5773502691896257)
    """
    return Interval(sum(values) / len(values), 2 * spread(values) / math.sqrt(len(values)))


def spread(values: Mapping[int, float] | Sequence[float]) -> float:
    """Standard deviation; 0 for fewer than two."""
    found = list(values.values()) if isinstance(values, Mapping) else list(values)
    mean = sum(found) / max(1, len(found))
    return math.sqrt(sum((v - mean) ** 2 for v in found) / max(1, len(found) - 1))


def verdict(name: str, change: RewardChange, deviation: float, *, decides: bool) -> Row:
    """Worse for certain is a warning, and a failure beyond LOSS of the reward's scale (if this reward `decides`): its mean or its deviation."""
    best, scale = change.change.mean + change.change.half, max(abs(change.before.mean), deviation)
    worse = best < -1e-9
    return Row(
        name, not decides or best >= -LOSS * scale, f"{change.before} -> {change.after}", "not certainly worse", f"change {change.change}", warns=worse
    )  # fmt: skip


def ending(ended: RewardChange) -> Row:
    """Do replies stop as the model's do."""
    best = ended.change.mean + ended.change.half
    never = ended.before.mean == 0
    detail = "the model's own never end within the limit" if never else f"the model's: {ended.before.mean:.1%}"
    return Row("replies end", best >= -LOSS, f"{ended.after.mean:.1%} by themselves", "as the model's do", detail, warns=never)


def compare_totals(first: PerPrompt, second: PerPrompt) -> Interval | None:
    """How much better the second file is than the first, over the prompts that both answered; None for fewer than two."""
    both = sorted(first.keys() & second.keys())
    return interval([second[i] - first[i] for i in both]) if len(both) > 1 else None
