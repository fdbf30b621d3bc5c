"""Which GGUF files a person means who names a run, a checkpoint or a file: what lies in `export/`, and what belongs together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localrl.engines.files import facts, require_gguf
from localrl.folder import checkpoints, read_run
from localrl.settings import UserError

Kind = Literal["merged", "base", "adapter"]


@dataclass(frozen=True)
class Exported:
    """One file of `export/`."""

    path: Path
    kind: Kind
    checkpoint: str
    """checkpoint-N, or empty if the file does not say."""
    written: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Files:
    """What llama.cpp is to load: a model, and maybe an adapter on top."""

    model: Path
    adapter: Path | None = None
    note: str = ""
    """What a person should know about the choice."""
    system: str | None = None
    """The system prompt of the run's data, under which it was trained."""

    @property
    def label(self) -> str:
        """
        >>> Files(Path("runs/a/export/a-base-f16.gguf"), Path("runs/a/export/a-adapter-f16.gguf")).label
        'a-base-f16 + a-adapter-f16'
        """
        return self.model.stem + (f" + {self.adapter.stem}" if self.adapter else "")


def exported(folder: Path) -> list[Exported]:
    """All that lies in a run folder's `export/`, oldest first; of a file in parts its first part. UserError for a damaged header."""
    found = []
    for path in sorted((folder / "export").rglob("*.gguf")):
        part = re.search(r"-(\d{5})-of-\d{5}$", path.stem)
        if (part and int(part[1]) > 1) or path.parent.suffix == ".parts":  # what a killed export left behind
            continue
        said = facts(path)
        kind: Kind = "adapter" if said.get("general.type") == "adapter" else "base" if _is_base(path) else "merged"
        found.append(Exported(path, kind, str(said.get("localrl.checkpoint", "")), path.stat().st_mtime))
    return sorted(found, key=lambda e: e.written)


def _is_base(path: Path) -> bool:
    """By its name, the exporter's `<run>-base-<type>`.

    >>> _is_base(Path("qwen-base-f16.gguf")), _is_base(Path("qwen-base-rl-merged-f16.gguf"))
    (True, False)
    """
    return re.search(r"-base-[^-]+(-\d{5}-of-\d{5})?$", path.stem) is not None


def base_of(folder: Path) -> Path | None:
    """A run's newest base file. (The base never changes.)"""
    return next((e.path for e in reversed(exported(folder)) if e.kind == "base"), None)


def adapter_of(checkpoint: Path) -> Path | None:
    """The newest adapter file of this checkpoint, if it was not written before it."""
    written = checkpoint.stat().st_mtime
    files = [e for e in exported(checkpoint.parent) if e.kind == "adapter" and e.checkpoint == checkpoint.name and e.written >= written]
    return files[-1].path if files else None


def find(path: Path, adapter: Path | None = None) -> Files:
    """The files of a run folder (its newest export), of one of its checkpoints, or beside an adapter; or the file itself.

    UserError with the command that makes them if there are none.
    """
    if path.is_dir():
        if adapter is not None:
            raise UserError(f"--adapter goes on a base GGUF file, {path} is a folder: name the file in {path / 'export'}")
        return _of_folder(path)
    require_gguf(path)
    if adapter is not None or facts(path).get("general.type") != "adapter":
        return Files(path, adapter)
    for place in (path.parent, path.parent.parent):                  # export/checkpoint-N/ has its base in export/
        bases = sorted((p for p in place.glob("*.gguf") if _is_base(p)), key=lambda p: p.stat().st_mtime)
        if bases:
            return Files(bases[-1], path)
    raise UserError(f"{path} is an adapter and no base lies beside it: name the base GGUF it was exported with, and this one with --adapter")


def _of_folder(path: Path) -> Files:
    one = re.fullmatch(r"checkpoint-\d+", path.resolve().name) is not None
    folder = path.resolve().parent if one else path
    if one and not (folder / "run.toml").exists():
        raise UserError(f"{path} is a checkpoint outside of its run folder: move it back, its exports lie there")
    files = [e for e in exported(folder) if not one or (e.checkpoint == path.resolve().name and e.written >= path.stat().st_mtime)]
    merged = [e for e in files if e.kind == "merged"]
    adapters = sorted((e for e in files if e.kind == "adapter"), key=lambda e: (_number(e.checkpoint), e.written))
    base = base_of(folder)
    if merged or (adapters and base is not None):
        model, adapter = (merged[-1].path, None) if merged or base is None else (base, adapters[-1].path)
        system = read_run(folder).data.system_prompt if (folder / "run.toml").exists() else None
        return Files(model, adapter, "" if one else _outdated(folder, (merged or adapters)[-1]), system)
    if not one and not (folder / "run.toml").exists():
        raise UserError(f"{path} is neither a run folder (it has no run.toml) nor a GGUF file")
    raise UserError(f"{path} holds no exported model: run `localrl export {path}` first")


def _outdated(folder: Path, file: Exported) -> str:
    """A sentence if the run has gone on since."""
    known = checkpoints(folder)
    if not known or not file.checkpoint or (file.checkpoint == known[-1].name and file.written >= known[-1].stat().st_mtime):
        return ""
    return f"{file.path.name} is of {file.checkpoint}, the run has gone on to {known[-1].name}: `localrl export {folder}` exports it"


def _number(checkpoint: str) -> int:
    found = re.search(r"\d+$", checkpoint)
    return int(found[0]) if found else -1
