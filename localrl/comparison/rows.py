"""What every model said to every prompt, what it was worth, and what that is on average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from localrl.batch import Prompt, Request, Rollout
from localrl.comparison.entries import Entry
from localrl.engines.llama_cpp import LlamaModel, Reply, Sampling, TooLong
from localrl.evaluate import total
from localrl.settings import UserError

Scorer = Callable[[list[Rollout]], list[Rollout]]
"""Rollouts to the same rollouts with their rewards: `localrl.rewards.Rewards.score`."""
SPACE = 4096
"""Tokens of context, unless a prompt and its answer need more."""


@dataclass(frozen=True)
class Answer:
    """What one model said to one prompt."""

    text: str
    tokens: int
    done: bool
    """It ended by itself, not at a limit."""
    seconds: float
    rewards: tuple[float, ...] = ()
    """In the run's order; NaN: does not apply. Empty: not scored."""


@dataclass(frozen=True)
class Row:
    """One prompt and every model's answer."""

    prompt: Prompt
    answers: Mapping[str, Answer]

    @property
    def question(self) -> str:
        """The prompt's text; of a conversation what was said last."""
        return self.prompt.content if isinstance(self.prompt.content, str) else self.prompt.content[-1]["content"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON would have it; NaN becomes None."""
        answers = {name: asdict(a) | {"rewards": [None if math.isnan(r) else r for r in a.rewards]} for name, a in self.answers.items()}
        return {"id": self.prompt.id, "prompt": self.prompt.content, "columns": dict(self.prompt.columns), "answers": answers}


@dataclass(frozen=True)
class Mean:
    """A mean over prompts."""

    value: float
    """NaN if there was nothing."""
    error: float
    """Its standard error; NaN for fewer than two."""
    count: int

    def __str__(self) -> str:
        """With twice the standard error.

        >>> str(mean([1.0, 0.0, 1.0])), str(mean([1.0])), str(mean([]))
        ('0.67 ± 0.67', '1.00', '-')
        """
        if math.isnan(self.value):
            return "-"
        return f"{self.value:.2f}" + ("" if math.isnan(self.error) else f" ± {2 * self.error:.2f}")


def mean(values: Sequence[float]) -> Mean:
    """Of those that are not NaN.

    >>> mean([1.0, float("nan"), 3.0])
    Mean(value=2.0, error=1.0, count=2)
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    middle = sum(known) / len(known)
    spread = sum((value - middle) ** 2 for value in known)
    return Mean(middle, math.sqrt(spread / (len(known) - 1) / len(known)) if len(known) > 1 else math.nan, len(known))


@dataclass(frozen=True)
class Summary:
    """One model over all prompts."""

    rewards: tuple[Mean, ...]
    total: Mean
    """Of the weighted sum of the rewards."""
    gain: Mean
    """Of the total above the first model's on the same prompt: its interval is narrower than those of the two totals."""
    tokens: float
    """Mean length of an answer."""
    done: float
    """Share of answers that ended by themselves."""
    tokens_per_second: float
    """Reading the prompts included."""


@dataclass(frozen=True)
class Comparison:
    """Everything that was said, and what it was worth."""

    rows: tuple[Row, ...]
    names: tuple[str, ...] = ()
    """Of the rewards; none: not scored."""
    weights: tuple[float, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """How it came about, for a reader: sampling, seed, files."""

    @property
    def models(self) -> list[str]:
        """Their labels, in the order they were asked for."""
        return list(self.rows[0].answers)

    def totals(self, model: str) -> list[float]:
        """The weighted sum of each answer's rewards; NaN where none applies."""
        return [total(row.answers[model].rewards, self.weights) if self.names else math.nan for row in self.rows]

    def summary(self, model: str) -> Summary:
        """Means over the rows."""
        answers = [row.answers[model] for row in self.rows]
        tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
        totals, first = self.totals(model), self.totals(self.models[0])
        return Summary(
            rewards=tuple(mean([a.rewards[i] for a in answers]) for i in range(len(self.names))),
            total=mean(totals), gain=mean([mine - other for mine, other in zip(totals, first, strict=True)]),
            tokens=tokens / len(answers), done=sum(a.done for a in answers) / len(answers),
            tokens_per_second=tokens / seconds if seconds else math.nan,
        )  # fmt: skip


def compare(
    entries: Sequence[Entry],
    prompts: Sequence[Prompt],
    reward: Scorer | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    threads: int | None = None,
) -> tuple[Row, ...]:
    """The same prompts with the same seeds to every model, and the rewards of all answers; a row a prompt.

    A base is loaded once for all its adapters, and closed before the next model is opened, for machines that cannot hold two. A prompt's
    own tokens are used, exactly as in training, where the file is the run's own; others render it by their own template. `progress`:
    answers so far, answers in all, the model's label.
    """
    if not entries or not prompts:
        raise UserError(f"nothing to compare: {len(entries)} models and {len(prompts)} prompts, at least one of each is needed")
    sampling = sampling or Sampling(temperature=0.0)
    space = max(SPACE, max(len(p.tokens) for p in prompts) + sampling.max_tokens)
    found: dict[str, list[Reply]] = {}
    for path, group in by_model(entries).items():
        with LlamaModel(path, others=[e.files.adapter for e in group if e.files.adapter], n_ctx=space, threads=threads) as model:
            for entry in group:
                model.attach(entry.files.adapter)
                found[entry.label] = []
                for number, prompt in enumerate(prompts):
                    found[entry.label].append(ask(model, prompt if entry.own else _untokenised(prompt), sampling, seed + number))
                    if progress is not None:
                        progress(sum(map(len, found.values())), len(entries) * len(prompts), entry.label)
    answers = {entry.label: _scored(prompts, found[entry.label], reward) for entry in entries}
    return tuple(Row(prompt, {label: answers[label][i] for label in answers}) for i, prompt in enumerate(prompts))


def by_model(entries: Sequence[Entry]) -> dict[Path, list[Entry]]:
    """Those that share a file, together."""
    groups: dict[Path, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.files.model.resolve(), []).append(entry)
    return groups


def ask(model: LlamaModel, prompt: Prompt, sampling: Sampling, seed: int) -> Reply:
    """A finished reply to one prompt, with nothing kept from the one before."""
    try:
        if prompt.tokens:
            return model.complete(prompt.tokens, sampling, seed).finish()
        if isinstance(prompt.content, str):
            return model.complete(prompt.content, sampling, seed).finish()
        return model.complete(model.tokenize(model.render(prompt.content), whole=False), sampling, seed).finish()
    except TooLong as error:
        raise TooLong(f"{model.path.name}, prompt {prompt.id}: {error}") from None


def _untokenised(prompt: Prompt) -> Prompt:
    return Prompt(prompt.id, (), prompt.content, prompt.columns)


def _scored(prompts: Sequence[Prompt], replies: Sequence[Reply], reward: Scorer | None) -> list[Answer]:
    rollouts = [Rollout(Request(p), tuple(r.tokens), r.text, r.done, 0) for p, r in zip(prompts, replies, strict=True)]
    judged = rollouts if reward is None else reward(rollouts)
    return [Answer(r.text, len(r.tokens), r.done, reply.seconds, r.rewards) for r, reply in zip(judged, replies, strict=True)]
