"""What a look at the machine brings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
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


def short(path: Path) -> str:
    """From the environment or from home on: what doctor says goes into bug reports."""
    full = path.absolute()
    for root, name in ((Path(sys.prefix), "(environment)"), (Path.home(), "~")):
        if full.is_relative_to(root):
            return str(name / full.relative_to(root))
    return str(full)


def first_line(error: Exception) -> str:
    """Of what went wrong, no longer than a table can show."""
    return (str(error).strip().splitlines() or [""])[0][:160]
