"""Talking to exported models: a conversation with one, and the same prompts put to several. Nothing is printed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from localrl.batch import Message, Prompt, Request, Rollout
from localrl.engines.llama_cpp import LlamaModel, Reply, Sampling
from localrl.settings import UserError

Scorer = Callable[[list[Rollout]], list[Rollout]]
"""Rollouts to the same rollouts with their rewards: `localrl.rewards.Rewards.score`."""


class Chat:
    """A conversation: what was said, and a way to say the next thing, to take it back, to begin again."""

    def __init__(self, model: LlamaModel, *, system: str | None = None, sampling: Sampling | None = None, seed: int = 0) -> None:
        """The same seed and the same words give the same conversation, `reset` or not."""
        self.model, self.sampling, self.seed = model, sampling or Sampling(temperature=0.7), seed
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._opening)
        """Everything said so far, the system prompt first."""
        self.last: Reply | None = None
        """The newest reply: its tokens, whether it ended by itself, its speed."""

    @property
    def turns(self) -> int:
        """How many questions have been answered."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def say(self, text: str) -> Iterator[str]:
        """Say something; the answer comes piece by piece. One that is broken off stays as far as it came, or is forgotten if nothing came.

        UserError if the conversation no longer fits the model's context.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        self.last = self.model.chat(asked, self.sampling, self.seed + self.turns)
        return self._stream(self.last, asked)

    def _stream(self, reply: Reply, asked: list[Message]) -> Iterator[str]:
        try:
            yield from reply
        finally:
            if reply.text or reply.done:
                self.messages = [*asked, {"role": "assistant", "content": reply.text}]

    def undo(self) -> str | None:
        """Take the last question and its answer back. -> the question, or None if there was none."""
        if not self.turns:
            return None
        *self.messages, question, _ = self.messages
        self.last = None
        return question["content"]

    def reset(self) -> None:
        """Begin again: only the system prompt stays."""
        self.messages, self.last = list(self._opening), None


@dataclass(frozen=True)
class Answer:
    """What one model said to one prompt."""

    text: str
    tokens: int
    done: bool
    """It ended by itself, not at the length limit."""
    seconds: float
    rewards: tuple[float, ...] = ()
    """In the run's order; NaN: does not apply. Empty: not scored."""


@dataclass(frozen=True)
class CompareRow:
    """One prompt and every model's answer."""

    prompt: Prompt
    answers: Mapping[str, Answer]

    def to_dict(self) -> dict[str, Any]:
        """As JSON would have it; NaN becomes None."""
        answers = {name: asdict(a) | {"rewards": [None if math.isnan(r) else r for r in a.rewards]} for name, a in self.answers.items()}
        return {"id": self.prompt.id, "prompt": self.prompt.content, "columns": dict(self.prompt.columns), "answers": answers}


@dataclass(frozen=True)
class Summary:
    """One model over all rows."""

    rewards: tuple[float, ...]
    """Mean of each reward over the rows it applies to; NaN if to none."""
    tokens: float
    """Mean length of an answer."""
    done: float
    """Share of answers that ended by themselves."""
    tokens_per_second: float


def compare(
    models: Mapping[str, LlamaModel | Callable[[], LlamaModel]],
    prompts: Sequence[Prompt],
    reward: Scorer | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[CompareRow]:
    """The same prompts with the same seeds to every model, one model after the other, and the rewards of all answers.

    A model may be given as a function that opens it: it is then closed before the next one is opened, for machines that cannot hold two.
    A prompt's own tokens are used, exactly as in training; one without tokens is rendered by each file's template. `progress`: answers so
    far, answers in all, the model's name.
    """
    if not models or not prompts:
        raise UserError(f"nothing to compare: {len(models)} models and {len(prompts)} prompts, at least one of each is needed")
    sampling = sampling or Sampling(temperature=0.0)
    found: dict[str, list[Rollout]] = {}
    speed: dict[str, list[float]] = {}
    for name, given in models.items():
        model = given if isinstance(given, LlamaModel) else given()
        try:
            replies = []
            for i, prompt in enumerate(prompts):
                replies.append(ask(model, prompt, sampling, seed + i).finish())
                if progress is not None:
                    progress(len(found) * len(prompts) + i + 1, len(models) * len(prompts), name)
        finally:
            if model is not given:
                model.close()
        rollouts = [Rollout(Request(p), tuple(r.tokens), r.text, r.done, 0) for p, r in zip(prompts, replies, strict=True)]
        found[name] = reward(rollouts) if reward is not None else rollouts
        speed[name] = [reply.seconds for reply in replies]
    answers = {name: [answer(r, s) for r, s in zip(found[name], speed[name], strict=True)] for name in found}
    return [CompareRow(prompt, {name: answers[name][i] for name in answers}) for i, prompt in enumerate(prompts)]


def ask(model: LlamaModel, prompt: Prompt, sampling: Sampling, seed: int) -> Reply:
    """A reply to one prompt, with nothing kept from the one before."""
    if prompt.tokens:
        return model.complete(prompt.tokens, sampling, seed)
    if isinstance(prompt.content, str):
        return model.complete(prompt.content, sampling, seed)
    return model.complete(model.tokenize(model.render(prompt.content), whole=False), sampling, seed)


def answer(rollout: Rollout, seconds: float) -> Answer:
    """A scored rollout as a row shows it."""
    return Answer(rollout.text, len(rollout.tokens), rollout.done, seconds, rollout.rewards)


def summarise(rows: Sequence[CompareRow]) -> dict[str, Summary]:
    """Means over the rows, by model.

    >>> from dataclasses import replace
    >>> row = CompareRow(Prompt(0, (1,), "hi"), {"base": Answer("x", 4, True, 0.5, (1.0, math.nan))})
    >>> summarise([row, replace(row, answers={"base": Answer("y", 2, False, 0.5, (0.0, math.nan))})])
    {'base': Summary(rewards=(0.5, nan), tokens=3.0, done=0.5, tokens_per_second=6.0)}
    """
    found: dict[str, Summary] = {}
    for name in rows[0].answers if rows else ():
        answers = [row.answers[name] for row in rows]
        columns = zip(*(a.rewards for a in answers), strict=True)
        tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
        rewards = tuple(mean([value for value in column if not math.isnan(value)]) for column in columns)
        done = mean([float(a.done) for a in answers])
        found[name] = Summary(rewards, tokens / len(answers), done, tokens / seconds if seconds else math.nan)
    return found


def mean(values: Sequence[float]) -> float:
    """NaN for nothing."""
    return sum(values) / len(values) if values else math.nan
