"""Rewards on completions, in their worker processes: what cannot be used costs its own values and a sentence, never those of the others. And probes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from localrl.batch import Request, Rollout
from localrl.lab.samples import Samples, Tokenizer, tokens_of
from localrl.rewards import Health, Rewards, RewardSettings, RewardSpec
from localrl.settings import UserError

PROBED = 8
"""Prompts at most that probes are made for."""


@dataclass(frozen=True)
class Scored:
    """What the rewards said."""

    rollouts: tuple[Rollout, ...]
    """With `rewards`, one for each that was asked for; NaN: does not apply, or could not be had."""
    health: dict[str, Health]
    troubles: dict[str, str]
    """Reward -> the sentence that a person should read."""
    messages: tuple[str, ...]
    """What else there is to say."""

    @property
    def failed(self) -> set[str]:
        """Rewards that are better not asked again."""
        return {name for name, h in self.health.items() if h.timeouts or h.deaths or h.errors} | self.troubles.keys()


def score(rollouts: Sequence[Rollout], columns: Iterable[str], settings: RewardSettings, base: Path, log: Path | None) -> Scored:
    """Every reward on every completion. UserError only if there is no reward at all."""
    if not settings.functions:
        raise UserError("there are no rewards yet: add a built-in one, or write your own")
    labels = settings.names
    usable, troubles = _usable(settings, set(columns), base, log)
    nothing = [[math.nan] * len(labels) for _ in rollouts]
    if not usable:
        return Scored(_with(rollouts, nothing), {}, troubles, ())
    with Rewards(settings.model_copy(update={"functions": usable}), base, log) as rewards:
        scored = rewards.score(rollouts)
        report = rewards.report()
    places = [labels.index(name) for name in rewards.names]
    for row, rollout in zip(nothing, scored, strict=True):
        for at, value in zip(places, rollout.rewards, strict=True):
            row[at] = value
    told = {name: next((m for m in report.messages if m.startswith(f"reward '{name}' ")), "") for name in rewards.names}
    troubles |= {name: sentence.split("; the values are missing")[0] for name, sentence in told.items() if sentence}
    others = tuple(m for m in report.messages if m not in told.values())
    return Scored(_with(rollouts, nothing), dict(report.rewards), troubles, others)


def _with(rollouts: Sequence[Rollout], values: Sequence[Sequence[float]]) -> tuple[Rollout, ...]:
    return tuple(replace(rollout, rewards=tuple(row)) for rollout, row in zip(rollouts, values, strict=True))


def _usable(settings: RewardSettings, columns: set[str], base: Path, log: Path | None) -> tuple[tuple[RewardSpec, ...], dict[str, str]]:
    """The rewards that can be called, and for the others why not. One by one only if all together fail."""
    if not (why := _refused(settings, columns, base, log)):
        return settings.functions, {}
    if len(settings.functions) == 1:
        return (), {settings.functions[0].label: why}
    troubles: dict[str, str] = {}
    for spec in settings.functions:
        alone = settings.model_copy(update={"functions": (spec.model_copy(update={"given": None}),)})
        if said := _refused(alone, columns, base, log):
            troubles[spec.label] = said
    return _without(settings.functions, troubles)


def _without(functions: tuple[RewardSpec, ...], troubles: dict[str, str]) -> tuple[tuple[RewardSpec, ...], dict[str, str]]:
    """Those that are left; a reward whose condition cannot be had cannot be had either."""
    troubles = dict(troubles)
    while lost := [spec for spec in functions if spec.label not in troubles and spec.given in troubles]:
        troubles |= {spec.label: f"reward '{spec.label}' counts only given '{spec.given}', which cannot be had" for spec in lost}
    return tuple(spec for spec in functions if spec.label not in troubles), troubles


def _refused(settings: RewardSettings, columns: set[str], base: Path, log: Path | None) -> str:
    try:
        with Rewards(settings, base, log) as rewards:
            rewards.check_columns(columns)
    except UserError as error:
        return str(error)
    return ""


def score_probes(
    samples: Samples, scored: Scored, settings: RewardSettings, base: Path, log: Path | None, tokenizer: Tokenizer
) -> dict[str, tuple[Rollout, ...]]:
    """Kind of probe -> its rollouts, scored by the rewards that did not fail on real completions."""
    made = probes(samples, tokenizer)
    labels = settings.names
    kept, _ = _without(settings.functions, dict.fromkeys(scored.failed, ""))
    if not kept or not made:
        return {}
    flat = [rollout for rollouts in made.values() for rollout in rollouts]
    done = score(flat, samples.columns, settings.model_copy(update={"functions": kept}), base, log)
    names = [spec.label for spec in kept]
    whole = _with(flat, [[r.rewards[names.index(label)] if label in names else math.nan for label in labels] for r in done.rollouts])
    rest = iter(whole)
    return {kind: tuple(next(rest) for _ in rollouts) for kind, rollouts in made.items()}


def probes(samples: Samples, tokenizer: Tokenizer) -> dict[str, list[Rollout]]:
    """Answers that deserve nothing, one of each kind for each of the first prompts."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in samples.rollouts:
        groups.setdefault(rollout.request.prompt.id, []).append(rollout)
    made: dict[str, list[Rollout]] = {}
    for group in list(groups.values())[:PROBED]:
        for kind, text in _texts(group, samples.limit).items():
            tokens = tokens_of(text, tokenizer)[: samples.limit]
            made.setdefault(kind, []).append(Rollout(Request(group[0].request.prompt, -1), tokens, text, len(tokens) < samples.limit, 0))
    return made


def _texts(group: Sequence[Rollout], limit: int) -> dict[str, str]:
    content = group[0].request.prompt.content
    asked = content if isinstance(content, str) else content[-1]["content"]
    filled = max((r.text for r in group), key=lambda text: text.count("<"))
    return {
        "nothing at all": "", "echo of the prompt": asked, "one answer, eight times": "\n".join([group[0].text] * 8),
        "very long": "well " * min(limit, 4096), "the form without content": hollow(filled),
    }  # fmt: skip


def hollow(text: str) -> str:
    """Tags and marks as they are, every word an x.

    >>> hollow("<think>2 + 2 is 4</think><answer>4</answer>")
    '<think>x + x x x</think><answer>x</answer>'
    """
    return "".join(part if part.startswith("<") else re.sub(r"\w+", "x", part) for part in re.split(r"(</?\w+>)", text))


def health_of(values: dict[str, float]) -> Health:
    """The way back from `dataclasses.asdict`."""
    return Health(**{key: type(asdict(Health())[key])(value) for key, value in values.items()})
