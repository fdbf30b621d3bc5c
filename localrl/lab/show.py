"""A trial in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from localrl.evaluate import total
from localrl.lab.numbers import advantages, correlations, probed, signal, summaries, warnings
from localrl.lab.trial import Trial

BARS = " ▁▂▃▄▅▆▇█"
SHOWN = 60
WIDE = 10
"""Characters of a name's line above a column of numbers."""


def figure(value: float) -> str:
    """
    >>> figure(0.5), figure(math.nan)
    ('0.5', '-')
    """
    return "-" if math.isnan(value) else f"{value:.3g}"


def spark(counts: Sequence[int]) -> str:
    """
    >>> spark([0, 2, 4])
    ' ▄█'
    """
    return "".join(BARS[math.ceil(8 * count / max(counts))] for count in counts)


def tables(trial: Trial, rows: int = 16) -> Iterator[Table]:
    """Rewards, their agreement, probes, completions with advantages."""
    yield _rewards(trial)
    if len(trial.names) > 1:
        table = Table("correlation", *map(escape, trial.names), box=SIMPLE_HEAD)
        for name, row in zip(trial.names, correlations(trial), strict=True):
            table.add_row(escape(name), *("-" if r is None else f"{r:.2f}" for r in row))
        yield table
    if fakes := probed(trial, trial.weights):
        table = Table("probe", *map(escape, trial.names), "total", "", box=SIMPLE_HEAD)
        for probe in fakes:
            table.add_row(probe.kind, *map(figure, probe.rewards), figure(probe.total), "[bold red]beats real answers[/bold red]" if probe.beats else "")
        yield table
    yield from _completions(trial, rows)


def _rewards(trial: Trial) -> Table:
    found = summaries(trial)
    troubled = any(reward.trouble for reward in found)               # a column for it only then: a terminal is 80 wide
    table = Table("reward", "weight", "mean", "std", "all alike", "missing", "ms a call", "histogram", *["trouble"] * troubled,
                  title=escape(trial.source), box=SIMPLE_HEAD)  # fmt: skip
    for reward, weight in zip(found, trial.weights, strict=True):
        bars = spark([count for _, _, count in reward.histogram()]) if reward.values else ""
        table.add_row(escape(reward.name), figure(weight), figure(reward.mean), figure(reward.std), f"{reward.flat:.0%}", str(reward.missing),
                      f"{1000 * reward.seconds:.0f}", bars, *[escape(reward.trouble)] * troubled)  # fmt: skip
    for column, width in (("reward", 10), ("histogram", 8)):
        chosen = next(c for c in table.columns if c.header == column)
        chosen.min_width, chosen.overflow, chosen.no_wrap = width, "fold", column == "histogram"
    return table


def _completions(trial: Trial, rows: int) -> Iterator[Table]:
    """A table a prompt."""
    every = advantages(trial, trial.weights)
    found, notes = [each for each in every if each.values], [f"{each.label}: {each.note}" for each in every if each.note]
    shown = list(enumerate(trial.rollouts[:rows]))
    for _, group in groupby(shown, lambda pair: pair[1].request.prompt.id):
        answers = list(group)
        content = answers[0][1].request.prompt.content
        table = Table(title=escape(_short(content if isinstance(content, str) else content[-1]["content"])), title_justify="left", box=SIMPLE_HEAD, expand=True,
                      padding=(0, 1, 0, 0))  # fmt: skip
        table.add_column("completion", no_wrap=True, overflow="ellipsis", ratio=1, min_width=14)
        for name in (*trial.names, "total", *(each.label for each in found)):
            table.add_column(escape(name), justify="right", width=max(6, min(WIDE, max(map(len, name.split())))), overflow="fold")
        for at, rollout in answers:
            table.add_row(
                escape(_short(rollout.text)), *map(figure, rollout.rewards), figure(total(rollout.rewards, trial.weights)),
                *(f"{each.values[at]:+.2f}" for each in found),
            )  # fmt: skip
        table.caption = escape("; ".join(notes)) if answers[-1] == shown[-1] else None
        yield table


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def as_dict(trial: Trial) -> dict[str, Any]:
    """Everything that is shown, for other programs."""
    names = trial.names
    return {
        "source": trial.source, "signal": signal(trial, trial.weights), "warnings": warnings(trial, trial.weights), "troubles": dict(trial.troubles),
        "rewards": {s.name: {"mean": s.mean, "std": s.std, "all_alike": s.flat, "missing": s.missing, "seconds": s.seconds} for s in summaries(trial)},
        "correlations": correlations(trial),
        "probes": [
            {"kind": p.kind, "rewards": dict(zip(names, p.rewards, strict=True)), "total": p.total, "beats": p.beats} for p in probed(trial, trial.weights)
        ],
        "advantages": [{"of": a.label, "values": list(a.values), "weights": list(a.weights), "note": a.note} for a in advantages(trial, trial.weights)],
        "completions": [
            {"prompt": r.request.prompt.content, "completion": r.text, "rewards": dict(zip(names, r.rewards, strict=True)),
             "reward": total(r.rewards, trial.weights)} for r in trial.rollouts
        ],
    }  # fmt: skip
