"""The run folder: the one interface between the process that trains and everybody who looks on.

    run.toml            the resolved settings          metrics.jsonl       one line a step
    plan.json           the memory plan                evaluations.jsonl   one line an evaluation
    state.json          pid, state, step, heartbeat    completions/        step-000001.jsonl, ...
    checkpoint-N/       the state after N steps        export/             GGUF files and their reports

Whole files are written beside their place and renamed; lines are appended and flushed. A reader never meets half a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from localrl.config import Run, build
from localrl.settings import UserError

State = Literal["running", "finished", "stopped", "failed"]
MANIFEST = "manifest.json"


class RunFolder:
    """One run's folder, held open by the one process that writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "lock", timeout=1.0)                # onlookers take it for a moment: `localrl.status`

    # -- opening ------------------------------------------------------------------------------------------------------------

    @classmethod
    def refuse_if_used(cls, path: Path) -> None:
        """UserError if the folder already holds something."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"the output folder {path} is in use: choose another with log.dir=..., or go on with `localrl resume {path}`")

    @classmethod
    def create(cls, path: Path, run: Run) -> RunFolder:
        """A new folder with the resolved settings in it. Raises UserError if the folder holds something already."""
        cls.refuse_if_used(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder._acquire()
        write_whole(path / "run.toml", run.dump())
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """An existing run, to go on with. Raises UserError if it is none, or if another process is writing to it."""
        if not (path / "run.toml").exists():
            raise UserError(f"{path} is no run folder: it has no run.toml")
        folder = cls(path)
        folder._acquire()
        for stale in path.glob(".checkpoint-*.part"):
            shutil.rmtree(stale)
        return folder

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(f"another process is writing to {self.path}: wait for it, or stop it first") from None

    def close(self) -> None:
        """Let others write to it again."""
        self._lock.release()

    def run(self) -> Run:
        """The resolved settings it was started with."""
        return read_run(self.path)

    # -- what is appended ---------------------------------------------------------------------------------------------------

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One line of JSON at the end of `name`; numbers that JSON lacks (NaN, infinities) become null."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean(row), ensure_ascii=False) + "\n")

    def write_completions(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """All completions of one step, one a line."""
        folder = self.path / "completions"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step-{step:06d}.jsonl", "".join(json.dumps(clean(row), ensure_ascii=False) + "\n" for row in rows))

    def rewind(self, step: int) -> None:
        """Forget lines and completions of steps after `step`: they will be made again."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = self.path / name
            if path.exists():
                rows = [row for row in read_lines(path) if row["step"] <= step]
                write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for path in (self.path / "completions").glob("step-*.jsonl"):
            if int(path.stem.split("-")[1]) > step:
                path.unlink()

    def heartbeat(self, state: State, step: int, steps: int, message: str = "") -> None:
        """Who writes here, how far it is, and when it last said so (seconds since 1970)."""
        row = {"pid": os.getpid(), "state": state, "step": step, "steps": steps, "time": time.time(), "message": message}
        write_whole(self.path / "state.json", json.dumps(row))

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    @contextmanager
    def checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """A folder to fill; it appears as `checkpoint-<step>` when it is complete and on disk. Older ones beyond `keep` are removed then."""
        part, final = self.path / f".checkpoint-{step}.part", self.path / f"checkpoint-{step}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        hashes = {str(file.relative_to(part)): _sha256(file) for file in sorted(part.rglob("*")) if file.is_file()}
        (part / MANIFEST).write_text(json.dumps(hashes, indent=1))
        for file in part.rglob("*"):
            _sync(file)
        _sync(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(self.path)
        for old in checkpoints(self.path)[:-keep]:
            shutil.rmtree(old)


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [p for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(path: Path) -> Path:
    """The newest one, or a UserError."""
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint-N folder yet: nothing was saved before it stopped")
    return found[-1]


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint) from either of the two."""
    path = path.resolve()
    if not path.exists():
        raise UserError(f"no such folder: {path}")
    return (path.parent, path) if path.name.startswith("checkpoint-") else (path, latest_checkpoint(path))


def verify_checkpoint(path: Path) -> None:
    """UserError if a file of the checkpoint is missing or differs from what was written."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is no complete checkpoint (no readable {MANIFEST}): resume from another one") from None
    for name, digest in hashes.items():
        if not (path / name).exists() or _sha256(path / name) != digest:
            raise UserError(f"{path / name} is missing or damaged: resume from another checkpoint of {path.parent}")


def read_run(path: Path) -> Run:
    """A run folder's resolved settings. Raises UserError if there are none."""
    import tomllib

    try:
        return build(tomllib.loads((path / "run.toml").read_text("utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} is no run folder: it has no run.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path / 'run.toml'} is damaged: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that a killed process left unfinished is passed over."""
    rows = []
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    return rows


def write_whole(path: Path, text: str) -> None:
    """Beside its place, on disk, then renamed: there is never half a file."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    part.rename(path)


def clean(value: Any) -> Any:
    """JSON has no NaN: null instead.

    >>> clean({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    return [clean(v) for v in value] if isinstance(value, list | tuple) else value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
