"""What a person sees of a run in the terminal: one live line, and sentences above it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from localrl.export import Export
from localrl.metrics import most_memory

QUIET_SECONDS = 20.0
"""Without a terminal (a log file) a line is printed at most this often."""
PART_SECONDS = 3.0
"""The same, of how far a phase is."""


class Progress:
    """A bar over the steps with ETA, reward, entropy, tokens/s and memory; in a log file, a line now and then. (`localrl.record.Display`.)"""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Bar(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=console, transient=False, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=None, numbers="")
        self._printed = 0.0
        self._phase = "starting"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A sentence, above the bar."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def phase(self, name: str) -> None:
        """What is going on now."""
        self._phase = name
        self._bar.update(self._task, description=name)

    def part(self, done: int, total: int) -> None:
        """How far the phase is."""
        self._bar.update(self._task, description=f"{self._phase} {done}/{total}")

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """One more step is done."""
        numbers = summary(metrics)
        self._bar.update(self._task, completed=step, total=steps, numbers=numbers)
        if not self.console.is_terminal and (time.time() - self._printed > QUIET_SECONDS or step == steps):
            self._printed = time.time()
            self.say(f"step {step}/{steps}  {numbers}")


class Work(Progress):
    """A bar over the parts of each phase, for what has phases and no steps. In a log file, a line for each phase."""

    def phase(self, name: str) -> None:
        """What is going on now; how far it will get is not known yet."""
        if name != self._phase and not self.console.is_terminal:
            self.say(f"{name} ...")
        super().phase(name)
        self._bar.reset(self._task, total=None, completed=0)

    def part(self, done: int, total: int) -> None:
        """How far the phase is; in a log file a line now and then."""
        self._bar.update(self._task, completed=done, total=total)
        if not self.console.is_terminal and total > 0 and time.time() - self._printed > PART_SECONDS:
            self._printed = time.time()
            self.say(f"{self._phase} {done / total:.0%}")


def export_table(files: Sequence[Export]) -> Table:
    """One exported file with everything that was checked; of several a row each, with what a person chooses by."""
    if len(files) == 1:
        report = files[0].report
        table = Table("check", "found", "asked for", "", title=f"self-check of {files[0].path.name}: {report.verdict}")
        for row in report.rows():
            table.add_row(*map(escape, row))
        return table
    table = Table("file", "MiB", "KL, nats", "reward of the policy", "of the file", "difference", "self-check")
    for file in files:
        report, reward = file.report, file.report.rewards.get("reward")
        rewards = (str(reward.before), str(reward.after), str(reward.change)) if reward else ("", "", "")
        size = f"{report.bytes / 2**20:,.1f}"
        table.add_row(file.path.name, size, f"{report.figures['kl_mean']:.1e}", *rewards, report.verdict)
    return table


def summary(metrics: dict[str, float]) -> str:
    """The few numbers that a person watches.

    >>> summary({"reward": 0.5, "entropy": 0.3, "tokens_per_second/rollout": 1234.0, "time/step": 2.0}).split("  ")[:3]
    ['reward 0.500', 'entropy 0.30', '1,234 tok/s']
    """
    reward = metrics.get("reward", math.nan)
    parts = [
        f"reward {reward:.3f}" if not math.isnan(reward) else "no reward",
        f"entropy {metrics.get('entropy', math.nan):.2f}",
        *([f"{metrics['tokens_per_second/rollout']:,.0f} tok/s"] if "tokens_per_second/rollout" in metrics else []),
        f"{memory_now(metrics):.1f} GiB",
    ]
    return "  ".join(parts)


def memory_now(metrics: dict[str, float]) -> float:
    """GiB: the step's peak on the GPU, or this process's resident memory."""
    peak = most_memory(metrics)
    return (psutil.Process().memory_info().rss if peak is None else peak) / 2**30
