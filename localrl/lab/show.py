"""A trial in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from localrl.evaluate import total
from localrl.lab.numbers import advantages, correlations, probed, signal, summaries, warnings
from localrl.lab.trial import Trial

BARS = " ▁▂▃▄▅▆▇█"
SHOWN = 60


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
    table = Table("reward", "weight", "mean", "std", "all alike", "missing", "ms a call", "histogram", "trouble", title=escape(trial.source))
    for found, weight in zip(summaries(trial), trial.weights, strict=True):
        bars = spark([count for _, _, count in found.histogram()]) if found.values else ""
        table.add_row(found.name, figure(weight), figure(found.mean), figure(found.std), f"{found.flat:.0%}", str(found.missing),
                      f"{1000 * found.seconds:.0f}", bars, escape(found.trouble))
    yield table
    if len(trial.names) > 1:
        table = Table("correlation", *trial.names)
        for name, row in zip(trial.names, correlations(trial), strict=True):
            table.add_row(name, *("-" if r is None else f"{r:.2f}" for r in row))
        yield table
    if fakes := probed(trial, trial.weights):
        table = Table("probe", *trial.names, "total", "")
        for probe in fakes:
            table.add_row(probe.kind, *map(figure, probe.rewards), figure(probe.total), "[bold red]beats real answers[/bold red]" if probe.beats else "")
        yield table
    yield _completions(trial, rows)


def _completions(trial: Trial, rows: int) -> Table:
    found = advantages(trial, trial.weights)
    table = Table()
    for name in ("prompt", "completion"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=12)
    for name in (*trial.names, "total", *(each.label for each in found)):
        table.add_column(escape(name), justify="right")
    for at, rollout in enumerate(trial.rollouts[:rows]):
        content = rollout.request.prompt.content
        asked = content if isinstance(content, str) else content[-1]["content"]
        table.add_row(
            escape(_short(asked)), escape(_short(rollout.text)), *map(figure, rollout.rewards), figure(total(rollout.rewards, trial.weights)),
            *(f"{each.values[at]:+.2f}" if each.values else "-" for each in found),
        )  # fmt: skip
    return table


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
