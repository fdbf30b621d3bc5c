"""A file on its way to its name: written beside it, told what its check found, then renamed with its report, or put aside as failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Of a model in parts the first."""
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


def settle(files: Mapping[Path, Path], report: CheckReport, base: Path | None = None) -> Export:
    """A model that passed gets its names, another is put aside under `.failed`; what lies beside it is written with it. UserError for what failed.

    `files`: where each part is -> what it is to be called; a file that is whole is one part.
    """
    path, first = next((to, at) for at, to in files.items())
    aside = "" if report.passed else ".failed"
    loaded = [row.passed for row in report.checks if row.name.split(",")[0] == "loads"]
    if loaded and all(loaded):
        fill(first, report.short())
    files = {at: to for at, to in files.items() if at.exists()}  # a part may have gone, which is why it failed
    hashes = {to.name + aside: sha256(at) for at, to in files.items()}
    final = path.with_name(path.name + aside)
    report = replace(report, file=final.name, sha256=hashes.get(final.name, ""), bytes=sum(at.stat().st_size for at in files))
    report = replace(report, parts=hashes if len(files) > 1 else {})
    beside = final.with_name(final.name + ".check.json")
    with Interrupts() as interrupts:  # a file has its report, or is not there
        interrupts.hold()
        write_whole(beside, report.to_json())
        for at, to in reversed(list(files.items())):  # the first last: without it there is no model
            at.replace(to.with_name(to.name + aside))
        if report.passed:
            for to in files.values():
                for old in (".failed", ".failed.check.json", ".failed.check.md"):
                    to.with_name(to.name + old).unlink(missing_ok=True)
            write_beside(path, base)
        else:
            write_whole(final.with_name(final.name + ".check.md"), f"# {final.name}\n\n{report.to_markdown()}")
        interrupts.release()
    if not report.passed:
        raise UserError(f"{final.name} does not say what the trained model says ({report.failures()}): do not use it, the report is {beside}")
    return Export(path, report, beside, base)
