"""Held-out rewards: the same questions, the same random numbers, before, during and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from localrl.batch import Prompt, Request, Rollout
from localrl.rewards import Scores
from localrl.sections import EvalSettings, RolloutSettings

EVAL_VERSION = 2**31 - 1
"""Stands for the step in the random stream, so that every evaluation of a run draws the same numbers and none of training's."""


class Samples(Protocol):
    """What evaluation needs of an engine."""

    def generate(self, requests: list[Request], version: int, *, settings: RolloutSettings | None = None) -> list[Rollout]: ...


@dataclass(frozen=True)
class Evaluation:
    """One pass over the held-out prompts."""

    metrics: dict[str, float]
    rollouts: tuple[Rollout, ...]


def evaluate(engine: Samples, rewards: Scores, prompts: Sequence[Prompt], settings: EvalSettings, rollout: RolloutSettings) -> Evaluation:
    """Sample `num_generations` responses to each held-out prompt and score them.

    Metrics: `eval/reward`, `eval/rewards/<name>/mean`, `eval/rewards/<name>/best@k` (the mean over prompts of the best of k: pass@k for a
    reward of 0 or 1), each with its standard error `.../stderr` over prompts, `eval/completions/mean_length`, `eval/completions/done`.
    """
    count = 1 if settings.temperature == 0 else settings.num_generations
    sampling = rollout.model_copy(update={"temperature": settings.temperature, "top_p": 1.0, "top_k": 0, "window": None})
    requests = [Request(prompt, sample) for prompt in prompts[: settings.limit] for sample in range(count)]
    rollouts = rewards.score(engine.generate(requests, EVAL_VERSION, settings=sampling))
    metrics: dict[str, float] = {}
    totals = [total(r.rewards, rewards.weights) for r in rollouts]
    _summarise(metrics, "eval/reward", totals, count)
    for index, name in enumerate(rewards.names):
        _summarise(metrics, f"eval/rewards/{name}", [r.rewards[index] for r in rollouts], count)
    metrics["eval/completions/mean_length"] = sum(len(r.tokens) for r in rollouts) / len(rollouts)
    metrics["eval/completions/done"] = sum(r.done for r in rollouts) / len(rollouts)
    return Evaluation(metrics, tuple(rollouts))


def total(rewards: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted sum of the rewards that apply; NaN if none does.

    >>> total((1.0, float("nan")), (0.5, 1.0))
    0.5
    """
    known = [w * r for r, w in zip(rewards, weights, strict=True) if not math.isnan(r)]
    return sum(known) if known else math.nan


def completion_rows(
    rollouts: Sequence[Rollout], names: Sequence[str], weights: Sequence[float], token_weights: Tensor | None = None,
    decode: Callable[[list[list[int]]], list[str]] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rollouts as plain rows, for the completions files. `token_weights` (B, T): how much each token counted. With `decode` (many token rows -> many
    texts) also each token's id, how many characters of the completion it wrote, and its log-probability (nats) as it was sampled."""
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": r.request.prompt.id,
            "sample": r.request.sample,
            "prompt": r.request.prompt.content,
            "completion": r.text,
            "tokens": len(r.tokens),
            "done": r.done,
            "rewards": dict(zip(names, r.rewards, strict=True)),
            "reward": total(r.rewards, weights),
        }
        for r in rollouts
    ]
    for row, rollout, own in zip(rows, rollouts, token_weights.tolist() if token_weights is not None else (), strict=False):
        row["token_weights"] = [round(w, 4) for w in own[: len(rollout.tokens)]]
    if decode is None:
        return rows
    ids = sorted({token for rollout in rollouts for token in rollout.tokens})
    alone = dict(zip(ids, decode([[token] for token in ids]), strict=True))
    for row, rollout in zip(rows, rollouts, strict=True):
        row |= {"token_ids": rollout.tokens, "token_lengths": token_lengths(rollout.text, [alone[token] for token in rollout.tokens])}
        if rollout.logp is not None:
            row["token_logps"] = [round(logp, 3) for logp in rollout.logp]
    return rows


def token_lengths(text: str, alone: Sequence[str]) -> list[int]:
    """How many characters of `text` each token wrote, given what each says by itself; they sum to the text's length.

    A token by itself may lack the space before it, or be a part of a character: its share is found by where the next one stands.

    >>> token_lengths("I see 7.", ["I", "see", "", "7", ".", ""])
    [1, 4, 0, 2, 1, 0]
    >>> token_lengths("né.", ["n", "\ufffd", "\ufffd", "."])
    [1, 0, 1, 1]
    """
    lengths, at, unknown = [0] * len(alone), 0, 0
    for number, piece in enumerate(alone):
        if not piece:
            continue
        if "\ufffd" in piece:
            unknown += 1
            continue
        start = text.find(piece, at, at + len(piece) + 1 + 4 * unknown)
        if start < 0:
            unknown += 1
            continue
        if unknown and start > at:                                   # what lies between belongs to those that were passed over
            lengths[number - 1] += start - at
            at = start
        lengths[number] = start + len(piece) - at
        at, unknown = start + len(piece), 0
    if at < len(text) and lengths:
        lengths[-1] += len(text) - at
    return lengths


def _summarise(metrics: dict[str, float], name: str, values: Sequence[float], count: int) -> None:
    """Mean over prompts (each prompt's own mean first), its standard error, and the best of each prompt's samples."""
    per_prompt = [[v for v in values[i : i + count] if not math.isnan(v)] for i in range(0, len(values), count)]
    means = [sum(group) / len(group) for group in per_prompt if group]
    if not means:
        metrics[name if name == "eval/reward" else f"{name}/mean"] = math.nan
        return
    mean = sum(means) / len(means)
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1) / len(means))
    metrics[name if name == "eval/reward" else f"{name}/mean"] = mean
    metrics[f"{name}/stderr"] = spread
    if count > 1:
        metrics[f"{name}/best@{count}"] = sum(max(group) for group in per_prompt if group) / len(means)
