"""How runs stand, for somebody who looks at their folders from outside: a fact about a process, not a guess from a date."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from localrl.folder import checkpoints
from localrl.settings import UserError

Stands = Literal["running", "silent", "finished", "stopped", "failed", "crashed", "new"]
SILENT = 120.0
"""Seconds without a heartbeat after which a process that lives is called silent: a phase of a large model may take long."""
SKIPPED = {"completions", "export", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class Status:
    """One run as it stands now."""

    folder: Path
    stands: Stands
    """running: its process lives and writes. silent: it lives and has said nothing for a while. finished, stopped (Ctrl-C), failed: it said so itself.
    crashed: it said that it was running, and its process is gone. new: it has not begun its first step."""
    step: int = 0
    steps: int = 0
    message: str = ""
    """What it said at its end."""
    pid: int | None = None
    beat: float | None = None
    """When it last gave a sign of life, seconds since 1970."""
    saved: int | None = None
    """Step of the newest checkpoint; None: there is none."""

    @property
    def alive(self) -> bool:
        """Is there a process that writes to it?"""
        return self.stands in ("running", "silent")

    @property
    def resumable(self) -> bool:
        """Could `localrl resume` go on with it?"""
        return not self.alive and self.saved is not None


def look(folder: Path) -> Status:
    """How the run in this folder stands. UserError if it is no run folder."""
    if not (folder / "run.toml").is_file():
        raise UserError(f"{folder} is no run folder: it has no run.toml")
    said, held = _said(folder), _held(folder)
    kept = checkpoints(folder)
    saved = int(kept[-1].name.split("-")[1]) if kept else None
    if not said:
        return Status(folder, "running" if held else "crashed", saved=saved)
    pid, beat = int(_number(said, "pid")), _number(said, "time")
    state = said.get("state")
    stands: Stands
    if held and state != "running":                                  # it was resumed and loads its model again
        stands = "running"
    elif state == "running":
        stands = "crashed" if not held else "silent" if time.time() - beat > SILENT else "running"
    else:
        stands = state if state in ("finished", "stopped", "failed") else "failed"
    return Status(folder, stands, int(_number(said, "step")), int(_number(said, "steps")), str(said.get("message", "")), pid, beat, saved)


def run_folders(root: Path, depth: int = 3) -> Iterator[Path]:
    """Every run folder in there, hidden ones and runs within runs left out."""
    if (root / "run.toml").is_file():
        yield root
        return
    if depth == 0:
        return
    with suppress(OSError):
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and path.name not in SKIPPED:
                yield from run_folders(path, depth - 1)


def interrupt(folder: Path) -> None:
    """Ctrl-C from outside: it stops with a checkpoint. UserError if nobody is there to hear it."""
    _process(folder, "stop").send_signal(signal.SIGINT)


def end(folder: Path) -> None:
    """For one that hears nothing any more: its process is killed, checkpoints stay. UserError if there is none."""
    _process(folder, "end").kill()


def _process(folder: Path, what: str) -> psutil.Process:
    """The run's, if it is certain that it is: a number may be somebody else's by now."""
    status = look(folder)
    if not status.alive:
        raise UserError(f"{folder.name} is not running: there is nothing to {what}")
    try:
        process = psutil.Process(status.pid) if status.pid is not None else None
        if process is not None and status.beat is not None and process.create_time() <= status.beat:
            return process
    except psutil.NoSuchProcess:
        pass
    raise UserError(f"{folder.name} is still loading: {what} it in a moment")


def _said(folder: Path) -> dict[str, Any]:
    """state.json; empty if it is not there or cannot be read."""
    try:
        found = json.loads((folder / "state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(said: dict[str, Any], name: str) -> float:
    """0 where none stands."""
    value = said.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _held(folder: Path) -> bool:
    """Does a process hold the folder's lock? The kernel takes it from a process that dies, however it dies."""
    path = folder / "lock"
    if not path.exists():
        return False
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:                                                  # a folder that may only be read: nobody writes to it either
        return False
    lock.release()
    return False
