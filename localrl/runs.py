"""All runs of a folder at a glance, each from a few kilobytes of its files, however long it is."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from localrl.folder import checkpoints, read_run
from localrl.settings import UserError
from localrl.status import SKIPPED, Status, look, run_folders

POINTS = 48
"""Of a curve in miniature."""
WHOLE = 256 * 2**10
"""Bytes of a metrics file that is read whole; from a longer one lines are picked here and there."""
LINE = 32 * 2**10
"""Bytes at one place in which a whole line is looked for."""
RECENT = 20
"""Steps that the time left is reckoned from."""


@dataclass(frozen=True)
class Summary:
    """One row of the list."""

    folder: Path
    status: Status | None
    """None: that cannot be told, see `wrong`."""
    algorithm: str = ""
    model: str = ""
    steps: int = 0
    rewards: tuple[float, ...] = ()
    """The total reward over the run, in some `POINTS` places."""
    seconds_left: float | None = None
    """Reckoned from the last steps; None: it does not run, or nobody knows yet."""
    begun: float = 0.0
    """When its folder was made, seconds since 1970."""
    wrong: str = ""
    """What is the matter with its files, in a sentence."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self.status is None else self.status.step

    @property
    def stands(self) -> str:
        """In a word."""
        return "unreadable" if self.status is None else self.status.stands


def summaries(root: Path) -> list[Summary]:
    """Every run in there and what is left of those that were deleted by half, newest first."""
    return sorted([*map(summarise, run_folders(root)), *map(_remains, leftovers(root))], key=lambda s: s.begun, reverse=True)


def summarise(folder: Path) -> Summary:
    """Never raises: what cannot be read is said in `wrong`."""
    begun = _made(folder)
    settings, wrong = _settings(folder, _stamp(folder / "run.toml"))
    algorithm, model = str(_within(settings, "algorithm", "name")), str(_within(settings, "model", "path"))
    try:
        status = look(folder)
    except UserError as error:                                       # it is being deleted
        return Summary(folder, None, algorithm, model, begun=begun, wrong=str(error))
    except (OSError, ValueError, TypeError) as error:
        return Summary(folder, None, algorithm, model, begun=begun, wrong=f"its state.json is damaged ({type(error).__name__}): delete it and resume the run")
    steps = status.steps or _whole(settings.get("steps"))
    rewards = _rewards(folder / "metrics.jsonl", _stamp(folder / "metrics.jsonl"))
    left = time_left(latest(folder / "metrics.jsonl"), steps) if status.alive else None
    return Summary(folder, status, algorithm, model, steps, rewards, left, begun, wrong)


def leftovers(root: Path, depth: int = 3) -> Iterator[Path]:
    """Folders with a run's files in them and no run.toml: somebody began to delete them."""
    if (root / "run.toml").is_file():
        return
    if (root / "metrics.jsonl").is_file() or checkpoints(root):
        yield root
        return
    if depth > 0:
        with suppress(OSError):
            for path in sorted(root.iterdir()):
                if path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and path.name not in SKIPPED:
                    yield from leftovers(path, depth - 1)


def sampled(path: Path, points: int = POINTS) -> list[dict[str, Any]]:
    """Up to so many rows of a JSONL file, evenly spread and the last one among them; damaged lines are passed over."""
    try:
        size = path.stat().st_size
        if size <= WHOLE:
            rows = list(_rows(path.read_bytes()))
            return [rows[i * (len(rows) - 1) // (points - 1)] for i in range(points)] if len(rows) > points else rows
        with path.open("rb") as file:
            found = [_row_at(file, (size - LINE) * i // (points - 1)) for i in range(points - 1)]
        return [row for row in found if row] + latest(path)[-1:]
    except OSError:
        return []


def latest(path: Path, count: int = RECENT) -> list[dict[str, Any]]:
    """The last rows of a JSONL file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - count * LINE // 4))
            return list(_rows(file.read()))[-count:]
    except OSError:
        return []


def time_left(rows: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """Seconds until the last step, from the last steps' rows; None with fewer than two of them.

    >>> time_left([{"step": 1, "timestamp": 10.0}, {"step": 2, "timestamp": 12.0}, {"step": 3, "timestamp": 14.0}], 10)
    14.0
    """
    times = [float(row["timestamp"]) for row in rows if isinstance(row.get("timestamp"), int | float)]
    if len(times) < 2:
        return None
    return max(0.0, statistics.median(b - a for a, b in pairwise(times))) * max(0, steps - _whole(rows[-1].get("step")))


def duration(seconds: float) -> str:
    """
    >>> duration(45), duration(200), duration(8000), duration(200000)
    ('45 s', '3 min', '2 h 13 min', '2 d 7 h')
    """
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _remains(folder: Path) -> Summary:
    return Summary(folder, None, begun=_made(folder), wrong="its run.toml is gone, so it is no run any more: delete what is left of it")


def _made(folder: Path) -> float:
    for path in (folder / "run.toml", folder):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file: what was read once is not read again at each look."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=1024)
def _settings(folder: Path, stamp: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """run.toml as it is, empty if it is not TOML, and what is wrong with it."""
    wrong = ""
    try:
        read_run(folder)
    except UserError as error:
        wrong = f"its run.toml is not understood by this version: {error}"
    except (OSError, UnicodeError) as error:
        wrong = f"its run.toml cannot be read ({type(error).__name__}): delete the run, or put the file right"
    try:
        return tomllib.loads((folder / "run.toml").read_text("utf-8")), wrong
    except (OSError, ValueError):
        return {}, wrong


@lru_cache(maxsize=1024)
def _rewards(path: Path, stamp: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(float(row["reward"]) for row in sampled(path) if isinstance(row.get("reward"), int | float))


def _within(settings: Mapping[str, Any], section: str, key: str) -> object:
    found = settings.get(section)
    return found.get(key, "") if isinstance(found, dict) else ""


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _row_at(file: Any, at: int) -> dict[str, Any] | None:
    """The first whole line from there on."""
    file.seek(at)
    read = file.read(LINE)
    if at:
        _, _, read = read.partition(b"\n")
    return next(_rows(read[: read.find(b"\n") + 1]), None)


def _rows(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n"):
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row
