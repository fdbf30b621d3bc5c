"""Opened models: each is a `localrl serve` of its own, on loopback with a key that nobody else has. Shared by all tabs, few at a time, gone with the UI."""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import IO, Any

import httpx

from localrl.exports import Files
from localrl.settings import UserError

GUARD = Path(__file__).with_name("guard.py")
MOST = 4
"""Models that are open at once."""
LOADING = 600.0
"""Seconds a model may take to load."""
WAIT = 0.1
"""Seconds between two looks at one that loads."""
QUIET = 600.0
"""Seconds without a token: another tab's answer may come first."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. `tokens`, of the whole, comes with the last one; `done`: it ended by itself."""

    text: str
    tokens: int = 0
    done: bool | None = None


class Server:
    """One process with one model."""

    def __init__(self, files: Files) -> None:
        self.files, self.key, self.url = files, secrets.token_urlsafe(32), ""
        self.asked, self.used = 0, time.monotonic()
        self.lock = RLock()
        self.said: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")        # noqa: SIM115 (lives as long as its process)
        adapter = [] if files.adapter is None else ["--adapter", str(files.adapter)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(GUARD), "serve", str(files.model), *adapter, "--port", "0"], start_new_session=True,
            stdin=subprocess.PIPE, stdout=self.said, stderr=self.said,
            env={**os.environ, "LOCALRL_API_KEY": self.key, "PYTHONUNBUFFERED": "1", "COLUMNS": "4000"},
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Its process is there."""
        return self.process.poll() is None

    def ready(self, stopped: Callable[[], bool]) -> None:
        """Wait until it listens, or until `stopped`. UserError with its own sentence if it ends before."""
        with self.lock:
            end = time.monotonic() + LOADING
            while not self.url and not stopped():
                if not self.alive:
                    raise UserError(self.complaint())
                if (found := re.search(r" at (http://127\.0\.0\.1:\d+)/v1,", self.output())) is not None:
                    self.url = found[1]
                elif time.monotonic() > end:
                    raise UserError(f"{self.files.label} has not loaded within {LOADING:.0f} s: try a smaller one")
                else:
                    time.sleep(WAIT)

    def output(self) -> str:
        """The end of what it printed. Its own file position is not moved: the process writes with the same."""
        size = os.fstat(self.said.fileno()).st_size
        return os.pread(self.said.fileno(), 65536, max(0, size - 65536)).decode("utf-8", "replace")

    def complaint(self) -> str:
        """Why it is gone."""
        code = self.process.wait()
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        said = [line.removeprefix("localrl:").strip() for line in lines if line.startswith("localrl:")]
        if code > 0 and said:
            return said[-1]
        ended = f"was killed (signal {-code}), as happens when memory runs out" if code < 0 else f"ended with exit code {code}"
        return f"the process of {self.files.label} {ended}: ask again to open it anew"

    def close(self) -> None:
        """At once, with everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.said.close()

    def answer(self, prompt: str | Sequence[Mapping[str, str]], sampling: Mapping[str, Any], seed: int, stopped: Callable[[], bool]) -> Iterator[Piece]:
        """An answer as it comes; ends early when `stopped`. UserError if the server refuses or dies."""
        kind, field = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
        body = {field: prompt, **sampling, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with httpx.Client(trust_env=False, timeout=httpx.Timeout(10.0, read=QUIET)) as client, client.stream(
                "POST", f"{self.url}/v1/{kind}", json=body, headers={"Authorization": f"Bearer {self.key}"}
            ) as reply:
                if reply.status_code != 200:
                    raise UserError(_refusal(reply))
                for line in reply.iter_lines():
                    if stopped():
                        return
                    if line.startswith("data: {"):
                        yield _piece(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            with suppress(subprocess.TimeoutExpired):                # a broken connection comes before the end of the process
                self.process.wait(2)
            raise UserError(self.complaint() if not self.alive else f"{self.files.label} does not answer ({type(error).__name__}): ask again") from None


def _refusal(reply: httpx.Response) -> str:
    try:
        return str(json.loads(reply.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the model's server answered with status {reply.status_code}"


def _piece(event: Mapping[str, Any]) -> Piece:
    if not event["choices"]:
        return Piece("", tokens=int(event["usage"]["completion_tokens"]))
    choice = event["choices"][0]
    text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return Piece(text, done=None if choice["finish_reason"] is None else choice["finish_reason"] == "stop")


class Servers:
    """Those that are open. The one least recently used makes room; one that is answering stays."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._open: dict[tuple[Path, Path | None, float], Server] = {}
        self._lock = RLock()
        atexit.register(self.close)

    @contextmanager
    def use(self, files: Files, stopped: Callable[[], bool] = lambda: False) -> Iterator[Server]:
        """A server that listens. UserError if it cannot be had."""
        with self._lock:
            server = self._take(files)
            server.asked += 1
        try:
            server.ready(stopped)
            yield server
        finally:
            with self._lock:
                server.asked -= 1
                server.used = time.monotonic()

    def _take(self, files: Files) -> Server:
        try:
            key = (files.model, files.adapter, max(p.stat().st_mtime for p in (files.model, files.adapter) if p is not None))   # exported again: a new one
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        for old in [k for k, server in self._open.items() if not server.alive and not server.asked]:
            self._open.pop(old).close()
        if key in self._open and self._open[key].alive:
            return self._open[key]
        free = [(server.used, k) for k, server in self._open.items() if not server.asked]
        if len(self._open) >= self.most:
            if not free:
                raise UserError(f"{self.most} models are answering already: wait for them, or stop one")
            self._open.pop(min(free, key=lambda one: one[0])[1]).close()
        self._open[key] = Server(files)
        return self._open[key]

    @property
    def open(self) -> list[Server]:
        """For onlookers."""
        with self._lock:
            return list(self._open.values())

    def close(self) -> None:
        """All of them."""
        with self._lock:
            for server in self._open.values():
                server.close()
            self._open.clear()
