"""Metric files as they grow: only new bytes are read, and a long run is kept in buckets of steps, each with its least, mean and greatest value."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from orjson import loads
except ImportError:                                                  # it comes with gradio, but nobody promises it
    loads: Callable[[bytes], Any] = json.loads  # type: ignore[no-redef]

Numbers = NDArray[np.float64]
PIECE = 2 * 2**20
"""Bytes that are read and taken apart at a time."""
BUCKETS = 300
"""A curve is kept in as many to twice as many buckets, however long the run is."""
KEPT = 200
"""Last rows that are kept as they are."""


class Lines:
    """The rows of a JSONL file, each once. A last line that is not finished waits for its end; damaged ones are counted and passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._at, self._file = 0, (0, 0)

    def read(self) -> Iterator[list[dict[str, Any]] | None]:
        """New rows, some thousand at a time. None: the file is another one, or was cut short (a resumed run forgets its last steps); all rows follow."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._at:
                    started, self._at, self.damaged = self._at > 0, 0, 0
                    self._file = found.st_dev, found.st_ino
                    if started:
                        yield None
                yield from self._new(file)
        except FileNotFoundError:
            if self._at:
                self._at, self.damaged, self._file = 0, 0, (0, 0)
                yield None

    def _new(self, file: Any) -> Iterator[list[dict[str, Any]]]:
        file.seek(self._at)
        rest = b""
        while read := file.read(PIECE):
            whole, newline, rest = (rest + read).rpartition(b"\n")
            if newline:
                self._at += len(whole) + 1
                yield self._parse(whole)

    def _parse(self, lines: bytes) -> list[dict[str, Any]]:
        try:
            rows = loads(b"[" + lines.replace(b"\n", b",") + b"]")   # a call for thousands of lines
        except ValueError:
            rows = [self._one(line) for line in lines.split(b"\n")]
        good = [row for row in rows if type(row) is dict]
        self.damaged += len(rows) - len(good)
        return good

    @staticmethod
    def _one(line: bytes) -> Any:
        try:
            return loads(line)
        except ValueError:
            return None


@dataclass
class Curves:
    """Every metric of a run over its steps, in buckets. Columns as in `names`; NaN where a metric was not told."""

    names: dict[str, int] = field(default_factory=dict)
    low: Numbers = field(default_factory=lambda: np.empty((0, 0)))
    total: Numbers = field(default_factory=lambda: np.empty((0, 0)))
    high: Numbers = field(default_factory=lambda: np.empty((0, 0)))
    known: Numbers = field(default_factory=lambda: np.empty((0, 0)))
    """How many values are in `total`."""
    width: int = 1
    """Rows that become one bucket."""
    count: int = 0
    _open: Numbers = field(default_factory=lambda: np.empty((0, 0)))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """More rows, in their order."""
        for keys, alike in groupby(rows, tuple):                     # all rows of a run have the same keys, or nearly
            values = self._matrix(keys, list(alike))
            self.count += len(values)
            if len(self._open):
                values = np.concatenate([self._open, values])
            whole = len(values) // self.width * self.width
            if whole:
                self._close(values[:whole], np.arange(0, whole, self.width))
            self._open = values[whole:]
            while len(self.low) >= 2 * BUCKETS:
                self._halve()

    def steps(self) -> Numbers:
        """(n,) the last step of each bucket."""
        return self._column("step", lambda c: c.high)

    def mean(self, name: str) -> Numbers:
        """(n,); NaN where it is not known, and everywhere if no row has it."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._column(name, lambda c: c.total) / self._column(name, lambda c: c.known)

    def range(self, name: str) -> tuple[Numbers, Numbers]:
        """(n,), (n,): least and greatest."""
        return self._column(name, lambda c: c.low), self._column(name, lambda c: c.high)

    def _column(self, name: str, of: Callable[[Curves], Numbers]) -> Numbers:
        at = self.names.get(name)
        closed = of(self)
        tail = [] if not len(self._open) else [float(of(self._reduced())[0, at])] if at is not None else [np.nan]
        return np.concatenate([closed[:, at] if at is not None else np.full(len(closed), np.nan), tail])

    def _reduced(self) -> Curves:
        """What is not a whole bucket yet, as one."""
        it = Curves(self.names)
        it._close(self._open, np.zeros(1, dtype=np.intp))
        return it

    def _matrix(self, keys: tuple[str, ...], rows: list[dict[str, Any]]) -> Numbers:
        """(rows, names): None, and what is no number, become NaN."""
        new = [key for key in keys if key not in self.names]
        if new:
            self.names |= {key: len(self.names) + i for i, key in enumerate(new)}
            for table in ("low", "total", "high", "known", "_open"):
                old = getattr(self, table)
                wide = np.full((len(old), len(self.names)), 0.0 if table == "known" else np.nan)
                wide[:, : old.shape[1]] = old
                setattr(self, table, wide)
        try:
            told = np.array([[*row.values()] for row in rows], dtype=np.float64)
        except (TypeError, ValueError):
            told = np.array([[v if isinstance(v, int | float) else np.nan for v in row.values()] for row in rows], dtype=np.float64)
        if [self.names[key] for key in keys] == list(range(len(self.names))):
            return told
        values = np.full((len(rows), len(self.names)), np.nan)
        values[:, [self.names[key] for key in keys]] = told
        return values

    def _close(self, values: Numbers, starts: NDArray[np.intp]) -> None:
        known = np.isfinite(values)
        values = np.where(known, values, np.nan)
        sums = np.add.reduceat(np.where(known, values, 0.0), starts)
        parts = np.fmin.reduceat(values, starts), sums, np.fmax.reduceat(values, starts), np.add.reduceat(known.astype(np.float64), starts)
        self._take(*(part if not len(old) else np.concatenate([old, part])
                     for old, part in zip((self.low, self.total, self.high, self.known), parts, strict=True)))

    def _halve(self) -> None:
        """Two buckets become one. The numbers are exact: sums stay sums."""
        starts = np.arange(0, len(self.low), 2)
        self._take(np.fmin.reduceat(self.low, starts), np.add.reduceat(np.nan_to_num(self.total), starts),
                   np.fmax.reduceat(self.high, starts), np.add.reduceat(self.known, starts))
        self.width *= 2

    def _take(self, low: Numbers, total: Numbers, high: Numbers, known: Numbers) -> None:
        self.low, self.total, self.high, self.known = low, total, high, known


class Tail:
    """A run's numbers, followed. Safe to ask from several tabs at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines, self._evaluations = Lines(folder / "metrics.jsonl"), Lines(folder / "evaluations.jsonl")
        self.lock = threading.RLock()
        """Held while `curves` and the rest are looked at: another tab may be reading."""
        self._forget()
        self.evaluations: list[dict[str, Any]] = []
        self.version = 0
        """Changes whenever there is something new to see."""

    def _forget(self) -> None:
        self.curves = Curves()
        self.first: dict[str, float] = {}
        self.recent: deque[dict[str, float]] = deque(maxlen=KEPT)

    @property
    def damaged(self) -> int:
        """Lines that could not be read."""
        return self._lines.damaged + self._evaluations.damaged

    def read(self) -> int:
        """Take in what is new. Returns `version`."""
        with self.lock:
            last: list[dict[str, Any]] = []
            for rows in self._lines.read():
                self.version += 1
                if rows is None:
                    self._forget()
                    last = []
                elif rows:
                    self.first = self.first or numbers(rows[0])
                    self.curves.add(rows)
                    last = [*last, *rows][-KEPT:]
            self.recent.extend(map(numbers, last))
            for rows in self._evaluations.read():
                self.version += 1
                self.evaluations = [*self.evaluations, *rows] if rows is not None else []
            return self.version


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers; what JSON could not say is NaN again.

    >>> numbers({"step": 1, "reward": None, "note": "x"})
    {'step': 1.0, 'reward': nan}
    """
    return {name: np.nan if value is None else float(value) for name, value in row.items() if value is None or isinstance(value, int | float)}


_TAILS: OrderedDict[Path, Tail] = OrderedDict()
_TAILS_LOCK = threading.Lock()
OPEN = 8
"""Runs that are kept in memory."""


def tail(folder: Path) -> Tail:
    """The one of this folder, the same for all tabs."""
    with _TAILS_LOCK:
        found = _TAILS.pop(folder, None) or Tail(folder)
        _TAILS[folder] = found
        while len(_TAILS) > OPEN:
            _TAILS.popitem(last=False)
        return found
