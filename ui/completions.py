"""What the model wrote: a step's completions, filtered, sorted and shown as text, each token tinted by its weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    body = "".join(_group(group) for group in part) if wanted.grouped else "".join(_alone(group[0]) for group in part)
    weighted = any("token_weights" in row for row in rows)
    return Shown((_legend(rows) if weighted else "") + body, len(kept), pages)


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


def _group(rows: Sequence[dict[str, Any]]) -> str:
    scores = [score for row in rows if not math.isnan(score := value(row, TOTAL))]
    told = f"reward {min(scores):.3g} to {max(scores):.3g}" if scores else "no reward"
    many = "answer" if len(rows) == 1 else "answers"
    head = f'<h3>Prompt {text(rows[0].get("prompt_id"))} <span class="quiet">{len(rows)} {many}, {told}</span></h3>'
    return f'<section class="group">{head}{_prompt(rows[0])}{"".join(_answer(row) for row in rows)}</section>'


def _alone(row: Mapping[str, Any]) -> str:
    return f'<section class="group"><h3>Prompt {text(row.get("prompt_id"))}</h3>{_prompt(row)}{_answer(row)}</section>'


def _prompt(row: Mapping[str, Any]) -> str:
    return f'<div class="asked">{folded(_plain(row.get("prompt")))}</div>'


def _plain(prompt: object) -> str:
    """Messages as lines `role: text`; a prompt that is text as it is."""
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in prompt)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _answer(row: Mapping[str, Any]) -> str:
    chips = [f'<span class="chip main">reward <b>{_score(value(row, TOTAL))}</b></span>']
    chips += [f'<span class="chip">{text(name)} <b>{_score(value(row, name))}</b></span>' for name in _rewards(row)]
    ended = "" if row.get("done", True) else ', <span class="bad">cut at the limit</span>'
    about = f'<span class="quiet">sample {text(row.get("sample", ""))}, {text(row.get("tokens", "?"))} tokens{ended}</span>'
    return f'<article class="answer"><div class="chips">{"".join(chips)}{about}</div>{_written(row)}</article>'


def _score(score: float) -> str:
    return "none" if math.isnan(score) else f"{score:.3g}"


def _written(row: Mapping[str, Any]) -> str:
    """The completion, tinted where it is known which characters each token wrote."""
    spans = tinted(row)
    return folded(row["completion"]) if spans is None else _folded([*spans])


def tinted(row: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    """(text, weight) of stretches that weigh the same; None: the row does not tell.

    >>> tinted({"completion": "ab c", "token_weights": [1.0, 1.0, 2.0], "token_lengths": [1, 1, 2]})
    [('ab', 1.0), (' c', 2.0)]
    """
    weights, lengths = row.get("token_weights"), row.get("token_lengths")
    if not isinstance(weights, list) or not isinstance(lengths, list) or len(weights) != len(lengths) or sum(lengths) != len(row["completion"]):
        return None
    found, at = [], 0
    for weight, group in groupby(zip(weights, lengths, strict=True), lambda pair: pair[0]):
        end = at + sum(length for _, length in group)
        if end > at:
            found.append((row["completion"][at:end], float(weight if weight is not None else 1.0)))
        at = end
    return found


def folded(whole: str) -> str:
    """Text as it is; what is beyond `FOLD` characters behind a click."""
    return _folded([(whole, 1.0)])


def _folded(spans: Sequence[tuple[str, float]]) -> str:
    length = sum(len(part) for part, _ in spans)
    if length <= 1.2 * FOLD:
        return f'<pre class="text">{"".join(_span(*span) for span in spans)}</pre>'
    first, rest = _cut(spans)
    told = f"the other {length - FOLD:,} of {length:,} characters"
    return (f'<pre class="text">{"".join(_span(*span) for span in first)}</pre><details class="rest"><summary>{told}</summary>'
            f'<pre class="text">{"".join(_span(*span) for span in rest)}</pre></details>')


def _cut(spans: Sequence[tuple[str, float]]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    first: list[tuple[str, float]] = []
    rest: list[tuple[str, float]] = []
    left = FOLD
    for part, weight in spans:
        if head := part[:left]:
            first.append((head, weight))
        if tail := part[left:]:
            rest.append((tail, weight))
        left -= len(head)
    return first, rest


def _span(part: str, weight: float) -> str:
    """Blue and underlined: counts more. Red and dotted: counts less. The stronger, the further from 1."""
    if weight == 1.0:
        return text(part)
    strength = min(0.45, 0.12 + 0.25 * abs(weight - 1))
    kind, colour = ("more", "37,99,235") if weight > 1 else ("less", "220,38,38")
    return f'<span class="{kind}" style="background:rgba({colour},{strength:.2f})" title="weight {weight:.3g}">{text(part)}</span>'


def _legend(rows: Sequence[Mapping[str, Any]]) -> str:
    weights = [w for row in rows for w in row.get("token_weights") or () if isinstance(w, int | float)]
    if weights and all("token_lengths" not in row for row in rows):
        return notice("These completions were written by an earlier version, which did not keep where each token ends: token weights are not shown.")
    reach = f", here from {min(weights):.3g} to {max(weights):.3g}" if weights else ""
    return f'<p class="legend">Tokens that count {_span("more", 2.0)} or {_span("less", 0.0)} than usual{reach}; point at one to read its weight.</p>'


def numbered(known: Sequence[int]) -> str:
    """What steps there are, in words."""
    return f"Steps {known[0]:,} to {known[-1]:,}" if known else "No completions yet"

