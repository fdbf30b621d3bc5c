"""A comparison in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from localrl.comparison.rows import Answer, Comparison

BESIDE = 3
"""Models that fit beside each other in a terminal."""


def comparison_table(found: Comparison) -> Table:
    """The rewards below each answer: a row a prompt and a column a model, or with more than a few models a row for each answer."""
    table = Table(show_lines=True, title="the same prompts and seed, through llama.cpp")
    beside = len(found.models) <= BESIDE
    for heading in ("prompt", *found.models) if beside else ("prompt", "model", "answer"):
        table.add_column(escape(heading), overflow="fold", ratio=1 if heading in ("prompt", "model") else 2)
    for row in found.rows:
        cells = {model: _answer(found.names, answer) for model, answer in row.answers.items()}
        if beside:
            table.add_row(escape(row.question), *cells.values())
        for number, (model, cell) in enumerate([] if beside else cells.items()):
            table.add_row("" if number else escape(row.question), escape(model), cell)
    return table


def _answer(names: Sequence[str], answer: Answer) -> str:
    return f"{escape(answer.text.strip())}\n[dim]{_rewards(names, answer.rewards)}{'' if answer.done else '  (cut)'}[/dim]"


def summary_table(found: Comparison) -> Table:
    """A row a model: mean of each reward and of their weighted sum, with twice the standard error; the gain over the first; lengths; speed."""
    scored = bool(found.names)
    several = len(found.names) > 1 or found.weights != (1.0,)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"means of {len(found.rows)} prompts" + (", ±: twice the standard error" if scored else ""))
    table.add_column("model", overflow="fold")
    gain = scored and len(found.models) > 1
    cut = any(not answer.done for row in found.rows for answer in row.answers.values())
    headings = [*found.names, *(["reward"] if scored and several else []), *([f"over {found.models[0]}"] if gain else [])]
    headings += ["tokens", *(["ended"] if cut else []), "tok/s"]
    for heading in headings:
        table.add_column(escape(heading), justify="right", overflow="fold", min_width=max(map(len, heading.split())))
    for model in found.models:
        mean = found.summary(model)
        cells = [*map(str, mean.rewards), *([str(mean.total)] if scored and several else [])]
        cells += ["" if model == found.models[0] else signed(str(mean.gain))] if gain else []
        cells += [f"{mean.tokens:.0f}", *([f"{mean.done:.0%}"] if cut else []), f"{mean.tokens_per_second:,.0f}"]
        table.add_row(escape(model), *cells)
    return table


def signed(text: str) -> str:
    """
    >>> signed("0.25 ± 0.10"), signed("-0.25"), signed("-")
    ('+0.25 ± 0.10', '-0.25', '-')
    """
    return text if text.startswith("-") else f"+{text}"


def _rewards(names: Sequence[str], rewards: Sequence[float]) -> str:
    return "  ".join(f"{escape(name)} {'-' if math.isnan(value) else f'{value:.2f}'}" for name, value in zip(names, rewards, strict=False))
