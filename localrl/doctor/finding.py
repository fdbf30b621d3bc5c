"""What a look at the machine brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    verdict: Verdict
    meaning: str
    """What follows from it, for somebody who has never heard of it. May be empty where all is well."""


def first_line(error: Exception) -> str:
    """Of what went wrong, no longer than a table can show."""
    return (str(error).strip().splitlines() or [""])[0][:160]
