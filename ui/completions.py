"""What the model wrote: a step's completions, filtered, sorted and shown as text, each token tinted by its weight or its surprise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from .html import notice, text
from .tail import loads

FOLD = 1200
"""Characters of a text that are shown at once; the rest is folded."""
PAGE = 12
"""Answers, or prompts with their answers, on a page."""
TOTAL = "total"
WEIGHT, SURPRISE = "weight in learning", "surprise"
TINTS = (WEIGHT, SURPRISE)
"""What tokens can be tinted by."""
ORDERS = {"as sampled": None, "best first": True, "worst first": False, "longest first": True}


@dataclass(frozen=True)
class Wanted:
    """What the reader asked for."""

    reward: str = TOTAL
    """Name of a reward, or `TOTAL`: what range and order go by."""
    least: float | None = None
    most: float | None = None
    order: str = "as sampled"
    grouped: bool = True
    """By prompt, the groups in the order of their best (or worst) answer."""
    words: str = ""
    """Only answers, or prompts, with these in them."""
    page: int = 1
    tint: str = WEIGHT
    """One of `TINTS`; what a step does not tell gives way to the other."""


@dataclass(frozen=True)
class Span:
    """A stretch of an answer, and what its tokens have in common."""

    part: str
    number: float
    tint: str


@dataclass(frozen=True)
class Shown:
    """A page of answers."""

    html: str
    count: int
    """Answers that match."""
    pages: int


def steps(folder: Path) -> list[int]:
    """Steps whose completions there are, in order."""
    found = (path.stem.removeprefix("step-") for path in (folder / "completions").glob("step-*.jsonl"))
    return sorted(int(name) for name in found if name.isdigit())


def nearest(known: Sequence[int], step: float | None) -> int | None:
    """
    >>> nearest([1, 2, 8], 6), nearest([1, 2, 8], None), nearest([], 3)
    (8, 8, None)
    """
    return None if not known else known[-1] if step is None else min(known, key=lambda s: (abs(s - step), -s))


def read(folder: Path, step: int) -> list[dict[str, Any]]:
    """Rows of a step; damaged lines are passed over. Empty if they are gone."""
    try:
        lines = (folder / "completions" / f"step-{step:06d}.jsonl").read_bytes().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("completion"), str):
            rows.append(row)
    return rows


def reward_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In their order."""
    return [*dict.fromkeys(name for row in rows for name in _rewards(row))]


def show(rows: Sequence[dict[str, Any]], wanted: Wanted) -> Shown:
    """The page that was asked for, or the last there is."""
    kept = [row for row in rows if _fits(row, wanted)]
    ordered = _ordered(kept, wanted)
    groups = _grouped(ordered) if wanted.grouped else [[row] for row in ordered]
    pages = max(1, math.ceil(len(groups) / PAGE))
    page = min(max(1, wanted.page), pages)
    part = groups[(page - 1) * PAGE : page * PAGE]
    if not part:
        said = "No answer fits these filters: widen the range, or clear the words." if rows else "There are no completions of this step."
        return Shown(notice(said), 0, 1)
    tint = _told(rows, wanted.tint)
    body = "".join(_group(group, tint) for group in part) if wanted.grouped else "".join(_alone(group[0], tint) for group in part)
    return Shown(_legend(rows, tint) + body, len(kept), pages)


# -- choosing -------------------------------------------------------------------------------------------------------------------


def value(row: Mapping[str, Any], reward: str) -> float:
    """NaN where it does not apply."""
    found = row.get("reward") if reward == TOTAL else _rewards(row).get(reward)
    return float(found) if isinstance(found, int | float) else math.nan


def _fits(row: Mapping[str, Any], wanted: Wanted) -> bool:
    score = value(row, wanted.reward)
    if wanted.least is not None and not score >= wanted.least - 1e-9:
        return False
    if wanted.most is not None and not score <= wanted.most + 1e-9:
        return False
    words = wanted.words.strip().lower()
    return not words or words in row["completion"].lower() or words in _plain(row.get("prompt")).lower()


def _ordered(rows: list[dict[str, Any]], wanted: Wanted) -> list[dict[str, Any]]:
    down = ORDERS.get(wanted.order)
    if down is None:
        return rows
    scores = [len(row["completion"]) if wanted.order == "longest first" else value(row, wanted.reward) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (math.isnan(scores[i]), -scores[i] if down else scores[i]))
    return [rows[i] for i in order]


def _grouped(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row.get("prompt_id")), []).append(row)
    return [*found.values()]


def _rewards(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("rewards")
    return found if isinstance(found, dict) else {}


# -- showing --------------------------------------------------------------------------------------------------------------------


def _group(rows: Sequence[dict[str, Any]], tint: str) -> str:
    scores = [score for row in rows if not math.isnan(score := value(row, TOTAL))]
    told = f"reward {min(scores):.3g} to {max(scores):.3g}" if scores else "no reward"
    many = "answer" if len(rows) == 1 else "answers"
    head = f'<h3>Prompt {text(rows[0].get("prompt_id"))} <span class="quiet">{len(rows)} {many}, {told}</span></h3>'
    return f'<section class="group">{head}{_prompt(rows[0])}{"".join(_answer(row, tint) for row in rows)}</section>'


def _alone(row: Mapping[str, Any], tint: str) -> str:
    return f'<section class="group"><h3>Prompt {text(row.get("prompt_id"))}</h3>{_prompt(row)}{_answer(row, tint)}</section>'


def _prompt(row: Mapping[str, Any]) -> str:
    return f'<div class="asked">{folded(_plain(row.get("prompt")))}</div>'


def _plain(prompt: object) -> str:
    """Messages as lines `role: text`; a prompt that is text as it is."""
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in prompt)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _answer(row: Mapping[str, Any], tint: str) -> str:
    chips = [f'<span class="chip main">reward <b>{_score(value(row, TOTAL))}</b></span>']
    chips += [f'<span class="chip">{text(name)} <b>{_score(value(row, name))}</b></span>' for name in _rewards(row)]
    ended = "" if row.get("done", True) else ', <span class="bad">cut at the limit</span>'
    about = f'<span class="quiet">sample {text(row.get("sample", ""))}, {text(row.get("tokens", "?"))} tokens{ended}</span>'
    return f'<article class="answer"><div class="chips">{"".join(chips)}{about}</div>{_written(row, tint)}</article>'


def _score(score: float) -> str:
    return "none" if math.isnan(score) else f"{score:.3g}"


def _written(row: Mapping[str, Any], tint: str) -> str:
    """The completion, tinted where it is known which characters each token wrote."""
    spans = tinted(row, tint)
    return folded(row["completion"]) if spans is None else _folded(spans)


def _numbers(row: Mapping[str, Any], tint: str) -> list[float] | None:
    """One a token; None: the row does not tell."""
    found = row.get("token_weights" if tint == WEIGHT else "token_logps")
    if not isinstance(found, list):
        return None
    plain, sign = (1.0, 1.0) if tint == WEIGHT else (0.0, -1.0)
    return [sign * float(number) if isinstance(number, int | float) else plain for number in found]


def _told(rows: Sequence[Mapping[str, Any]], tint: str) -> str:
    """What was asked for, or the other where only that is known; "": neither is."""
    order = (tint, *(other for other in TINTS if other != tint))
    return next((kind for kind in order if any(_numbers(row, kind) is not None for row in rows)), "")


def tinted(row: Mapping[str, Any], tint: str = WEIGHT) -> list[Span] | None:
    """Stretches of tokens that are alike; None: the row does not tell.

    >>> [(span.part, span.number) for span in tinted({"completion": "ab c", "token_weights": [1.0, 1.0, 2.0], "token_lengths": [1, 1, 2]})]
    [('ab', 1.0), (' c', 2.0)]
    """
    numbers, lengths = _numbers(row, tint), row.get("token_lengths")
    if numbers is None or not isinstance(lengths, list) or len(numbers) != len(lengths) or sum(lengths) != len(row["completion"]):
        return None
    found, at = [], 0
    for number, group in groupby(zip(numbers, lengths, strict=True), lambda pair: pair[0]):
        end = at + sum(length for _, length in group)
        if end > at:
            found.append(Span(row["completion"][at:end], number, tint))
        at = end
    return found


def folded(whole: str) -> str:
    """Text as it is; what is beyond `FOLD` characters behind a click."""
    return _folded([Span(whole, 1.0, WEIGHT)])


def _folded(spans: Sequence[Span]) -> str:
    length = sum(len(span.part) for span in spans)
    if length <= 1.2 * FOLD:
        return f'<pre class="text">{"".join(map(_span, spans))}</pre>'
    first, rest = _cut(spans)
    told = f"the other {length - FOLD:,} of {length:,} characters"
    return (f'<pre class="text">{"".join(map(_span, first))}</pre><details class="rest"><summary>{told}</summary>'
            f'<pre class="text">{"".join(map(_span, rest))}</pre></details>')


def _cut(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    first: list[Span] = []
    rest: list[Span] = []
    left = FOLD
    for span in spans:
        if head := span.part[:left]:
            first.append(replace(span, part=head))
        if tail := span.part[left:]:
            rest.append(replace(span, part=tail))
        left -= len(head)
    return first, rest


def _span(span: Span) -> str:
    """Weights: blue and underlined counts more, red and dotted less; the stronger, the further from 1. Surprise: the darker, the less likely."""
    number = span.number
    if span.tint == SURPRISE:
        strength = min(0.55, 0.14 * number)
        told = f"probability {math.exp(-number):.2g}, surprise {number:.2f} nats"
        return f'<span style="background:rgba(234,140,0,{max(0.0, strength):.2f})" title="{told}">{text(span.part)}</span>'
    if number == 1.0:
        return text(span.part)
    strength = min(0.45, 0.12 + 0.25 * abs(number - 1))
    kind, colour = ("more", "37,99,235") if number > 1 else ("less", "220,38,38")
    return f'<span class="{kind}" style="background:rgba({colour},{strength:.2f})" title="weight {number:.3g}">{text(span.part)}</span>'


def _legend(rows: Sequence[Mapping[str, Any]], tint: str) -> str:
    if not tint:
        return ""
    numbers = [number for row in rows for number in _numbers(row, tint) or ()]
    if numbers and all("token_lengths" not in row for row in rows):
        return notice("These completions were written by an earlier version, which did not keep where each token ends: token weights are not shown.")
    reach = f", here from {min(numbers):.3g} to {max(numbers):.3g}" if numbers else ""
    if tint == SURPRISE:
        return (f'<p class="legend">Tokens {_span(Span("likely", 0.05, tint))} to {_span(Span("surprising", 4.0, tint))} when they were sampled: '
                f"minus the log-probability, in nats{reach}; point at one to read it.</p>")
    return (f'<p class="legend">Tokens that count {_span(Span("more", 2.0, tint))} or {_span(Span("less", 0.0, tint))} than usual{reach}; '
            "point at one to read its weight.</p>")


def numbered(known: Sequence[int]) -> str:
    """What steps there are, in words."""
    return f"Steps {known[0]:,} to {known[-1]:,}" if known else "No completions yet"

