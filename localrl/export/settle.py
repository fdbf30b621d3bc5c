"""A file on its way to its name: written beside it, told what its check found, then renamed with its report, or put aside as failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from localrl.export.beside import write_beside
from localrl.export.check import sha256
from localrl.export.report import CheckReport
from localrl.folder import write_whole
from localrl.interrupt import Interrupts
from localrl.settings import UserError

CHECKS = "localrl.checks"
"""The key under which a file carries what its own check found."""
ROOM = 4096
"""Bytes that are kept for it: they are filled in when everything else is on the disk and has been read back."""


@dataclass(frozen=True)
class Export:
    """A file that passed."""

    path: Path
    report: CheckReport
    report_path: Path
    base: Path | None = None
    """For an adapter: the base model's GGUF that it was checked with."""


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """`path`.tmp, which is gone afterwards however this ends, unless it has been renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def fill(path: Path, text: str) -> None:
    """Write what the check found into the room that was kept for it; JSON does not mind the spaces that are left. No other byte changes."""
    reader = GGUFReader(path, "r+")
    field = reader.fields[CHECKS]
    room, raw = field.parts[field.data[0]], text.encode()
    if len(raw) > len(room):
        raise ValueError(f"what the check found takes {len(raw)} bytes, only {len(room)} were kept")
    room[:] = ord(" ")
    room[: len(raw)] = np.frombuffer(raw, np.uint8)
    reader.data.flush()


def settle(temporary: Path, path: Path, report: CheckReport, base: Path | None = None) -> Export:
    """A file that passed gets its name, another is put aside under `.failed`; what lies beside it is written with it. UserError for what failed."""
    final = path if report.passed else path.with_name(path.name + ".failed")
    if report.passed or any(row.name == "loads" and row.passed for row in report.checks):
        fill(temporary, report.short())
        report = replace(report, sha256=sha256(temporary))
    report = replace(report, file=final.name)
    beside = final.with_name(final.name + ".check.json")
    with Interrupts() as interrupts:  # a file has its report, or is not there
        interrupts.hold()
        write_whole(beside, report.to_json())
        temporary.replace(final)
        if report.passed:
            path.with_name(path.name + ".failed").unlink(missing_ok=True)
            for old in (f"{path.name}.failed.check.json", f"{path.name}.failed.check.md"):
                path.with_name(old).unlink(missing_ok=True)
            write_beside(path, base)
        else:
            write_whole(final.with_name(final.name + ".check.md"), f"# {final.name}\n\n{report.to_markdown()}")
        interrupts.release()
    if not report.passed:
        raise UserError(f"{final.name} does not say what the trained model says ({report.failures()}): do not use it, the report is {beside}")
    return Export(path, report, beside, base)
