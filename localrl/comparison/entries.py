"""What is compared: names that a person gives, to files that llama.cpp loads. What is missing is exported on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from localrl.exports import Files, adapter_of, base_of, find
from localrl.folder import checkpoints
from localrl.settings import UserError

BASE, TRAINED, EVERY = "base", "trained", "checkpoints"


@dataclass(frozen=True)
class Entry:
    """One column of a comparison."""

    label: str
    files: Files
    own: bool = True
    """It is of the run whose prompts are asked, so that their tokens are its tokens."""


@dataclass(frozen=True)
class Wanted:
    """An entry before its file is known: the base, the adapter of a checkpoint on it, or files that lie elsewhere."""

    label: str
    checkpoint: Path | None = None
    files: Files | None = None
    own: bool = True


def wanted(folder: Path, newest: Path, names: Iterable[str]) -> list[Wanted]:
    """What the names stand for: "base", "trained" (`newest`), "checkpoint-N", "checkpoints" (all), a GGUF file, another run or checkpoint.

    UserError for a name that stands for nothing.
    """
    found: list[Wanted] = []
    for name in names:
        for one in _meant(folder, newest, name):
            if any((one.checkpoint, one.files) == (other.checkpoint, other.files) for other in found):
                continue
            if any(one.label == other.label for other in found):
                one = Wanted(f"{one.label} ({len(found) + 1})", one.checkpoint, one.files, one.own)
            found.append(one)
    return found


def _meant(folder: Path, newest: Path, name: str) -> list[Wanted]:
    known = checkpoints(folder)
    if name == BASE:
        return [Wanted(BASE)]
    if name == TRAINED:
        return [Wanted(TRAINED, newest)]
    if name == EVERY:
        return [Wanted(c.name, c) for c in known]
    if (number := re.fullmatch(r"(?:checkpoint-)?(\d+)", name)) is not None:
        for checkpoint in known:
            if checkpoint.name == f"checkpoint-{number[1]}":
                return [Wanted(checkpoint.name, checkpoint)]
        raise UserError(f"{folder} holds no checkpoint-{number[1]}: it has {', '.join(c.name for c in known)} (log.save_total_limit keeps more)")
    path = Path(name).expanduser()
    if not path.exists() and path.suffix not in (".gguf", ".failed"):
        raise UserError(f"nothing to compare is called '{name}': base, trained, checkpoint-N, checkpoints, a GGUF file, or another run's folder")
    files = find(path)                                               # says what is wrong with it
    label = "/".join(path.resolve().parts[-2:]) if re.fullmatch(r"checkpoint-\d+", path.name) else path.name if path.is_dir() else path.stem
    return [Wanted(label, None, files, path.resolve().is_relative_to(folder.resolve()))]


def missing(folder: Path, wanted: Sequence[Wanted]) -> tuple[bool, list[Path]]:
    """(the base has to be exported, checkpoints whose adapters have to be)."""
    ours = [w for w in wanted if w.files is None]
    return bool(ours) and base_of(folder) is None, [w.checkpoint for w in ours if w.checkpoint is not None and adapter_of(w.checkpoint) is None]


def entries(folder: Path, wanted: Sequence[Wanted]) -> list[Entry]:
    """With their files, all of which are there by now."""
    base = base_of(folder)
    found = []
    for one in wanted:
        files = one.files
        if files is None:
            assert base is not None
            files = Files(base, None if one.checkpoint is None else adapter_of(one.checkpoint))
        found.append(Entry(one.label, files, one.own))
    return found
