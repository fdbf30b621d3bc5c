"""What the self-check found: rows for people, figures for programs, and what became of the rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    name: str
    passed: bool
    value: str
    """What was found."""
    limit: str
    """What was asked for."""
    detail: str = ""
    """Where it differs, or what a reader should know."""
    warns: bool = False
    """It passed, but a reader should look at it."""

    @property
    def verdict(self) -> str:
        """In a word."""
        return "FAILED" if not self.passed else "warning" if self.warns else "ok"


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with twice its standard error."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True)
class RewardChange:
    """One reward, or their weighted sum, on the same prompts with the same random numbers."""

    before: Interval
    """Of the live model's answers."""
    after: Interval
    """Of the file's answers, through llama.cpp."""
    change: Interval
    """After minus before, prompt by prompt."""


@dataclass(frozen=True)
class CheckReport:
    """What the self-check of one file found."""

    file: str
    what: str
    """merged, adapter or base."""
    dtype: str
    bytes: int
    sha256: str
    types: Mapping[str, int]
    """How many tensors of each GGUF type."""
    seconds: float
    checks: tuple[Row, ...]
    figures: Mapping[str, float]
    """The logits' distances, unrounded."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose width does not allow the type that was asked for, and what they are instead."""
    source: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every weight as the trained model holds it, in fp32 and in the file's order of rows."""
    rewards: Mapping[str, RewardChange] = field(default_factory=dict)
    """By name; `reward` is the weighted sum. Empty: they were not compared."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each part by its name; empty: one file."""
    notes: tuple[str, ...] = ()
    """How this file came to be, as far as a reader should know."""

    @property
    def passed(self) -> bool:
        """Whether everything was as it must be."""
        return all(row.passed for row in self.checks)

    @property
    def verdict(self) -> str:
        """In a few words."""
        looks = [row.name for row in self.checks if row.warns]
        return "failed" if not self.passed else f"passed, but look at: {', '.join(looks)}" if looks else "passed"

    def failures(self) -> str:
        """What differs, in one line."""
        return "; ".join(f"{row.name}: {row.value}, asked: {row.limit}, {row.detail}".removesuffix(", ") for row in self.checks if not row.passed)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name, found, limit, detail) for a table; what failed, or deserves a look, says so."""
        marks = {"ok": "", "warning": "warning: ", "FAILED": "FAILED "}
        return [(marks[row.verdict] + row.name, row.value, row.limit, row.detail) for row in self.checks]

    def to_json(self) -> str:
        """The report as a JSON document."""
        return json.dumps(asdict(self) | {"passed": self.passed}, indent=1, ensure_ascii=False)

    def short(self) -> str:
        """The report on one line of JSON, as the file carries it within."""
        verdicts = {row.name: row.verdict for row in self.checks}
        figures = {name: float(f"{value:.3g}") for name, value in self.figures.items()}
        rewards = {n: {"before": [c.before.mean, c.before.half], "after": [c.after.mean, c.after.half]} for n, c in self.rewards.items()}
        rounded = json.loads(json.dumps(rewards), parse_float=lambda text: round(float(text), 5))
        return json.dumps({"passed": self.passed, "checks": verdicts, "figures": figures, "rewards": rounded}, separators=(",", ":"))

    def to_markdown(self) -> str:
        """The report for people: a table of the checks, then what else a reader should know."""
        lines = [
            f"{'Passed' if self.passed else '**Failed**: do not use it'}. {self.bytes / 2**20:,.1f} MiB, sha256 `{self.sha256}`.",
            "",
            "| check | found | asked for | |",
            "|---|---|---|---|",
            *(f"| {' | '.join(map(cell, row))} |" for row in self.rows()),
            "",
            "Tensors: " + ", ".join(f"{count} {kind}" for kind, count in self.types.items()) + ".",
        ]
        if self.fallbacks:
            some = ", ".join(f"`{name}` {kind}" for name, kind in list(self.fallbacks.items())[:3])
            lines[-1] += f" {len(self.fallbacks)} of them are larger than asked, because their width is no multiple of the type's block: {some}, ..."
        if self.parts:
            lines += ["", f"In {len(self.parts)} parts, which stay in one folder under these names; programs are given the first:", ""]
            lines += [f"- `{name}` sha256 `{digest}`" for name, digest in self.parts.items()]
        return "\n\n".join(["\n".join(lines), *self.notes]) + "\n"


def cell(text: str) -> str:
    """Text that does not break a Markdown table.

    >>> cell("a|b\\nc")
    'a\\\\|b c'
    """
    return " ".join(text.replace("|", "\\|").split("\n"))
