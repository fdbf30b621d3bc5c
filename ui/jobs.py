"""Commands that the UI starts: each in a session of its own, with a folder that tells everything about it.

    .localrl/jobs/<number>-<kind>/      job.json  what, for whom, which process      output.log      rc  the exit code, once it is over

The folder is all there is: a UI that is closed and opened again finds its jobs where they are, and another tab sees the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from localrl.folder import write_whole

from .place import Place

RUNNER = Path(__file__).with_name("runner.py")
SHOWN = 64 * 2**10
"""Bytes of a log's end that are read."""
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
SLACK = 2.0
"""Seconds by which a process's start may differ from what was written down."""


@dataclass(frozen=True)
class Job:
    """One command."""

    folder: Path

    @property
    def about(self) -> dict[str, object]:
        """`kind`, `subject`, `argv`, `pid`, `started` (seconds since 1970); empty for a folder that is none."""
        try:
            found = json.loads((self.folder / "job.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def code(self) -> int | None:
        """Its exit code; None: it has none yet, or was killed together with its runner."""
        try:
            return int((self.folder / "rc").read_text())
        except (OSError, ValueError):
            return None

    @property
    def state(self) -> Literal["running", "done", "failed"]:
        """By its exit code and its process, not by what it last said."""
        if (code := self.code) is not None:
            return "done" if code == 0 else "failed"
        if self._process() is not None:
            return "running"
        code = self.code                                             # it may have ended in between
        return "done" if code == 0 else "failed"

    @property
    def command(self) -> str:
        """As a person would type it."""
        import shlex

        argv = self.about.get("argv", ())
        return shlex.join(["localrl", *argv]) if isinstance(argv, list) else ""

    def output(self) -> str:
        """The end of what it printed, as plain text; what a progress bar overwrote is left out."""
        try:
            with (self.folder / "output.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in ESCAPES.sub("", text).split("\n"))

    def complaint(self) -> str:
        """One sentence on why it failed; empty if it did not."""
        if self.state != "failed":
            return ""
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        said = [line.removeprefix("localrl:").strip() for line in lines if line.startswith("localrl:")]
        if said:
            return said[-1]
        code = self.code
        if code is None or code < 0:
            return f"its process was killed{'' if code is None else f' (signal {-code})'}" + (f"; it last said: {lines[-1]}" if lines else "")
        return lines[-1] if lines else f"it ended with exit code {code} and said nothing"

    def interrupt(self) -> None:
        """As Ctrl-C in a terminal would."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """At once, with everything it started."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if (process := self._process()) is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _process(self) -> psutil.Process | None:
        """Its runner, if it lives: a number that another process has since been given does not count."""
        about = self.about
        with suppress(psutil.Error, TypeError, ValueError):
            process = psutil.Process(int(str(about["pid"])))
            same = abs(process.create_time() - float(str(about["created"]))) < SLACK
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def start(place: Place, kind: str, argv: Sequence[str], subject: str = "", cwd: Path | None = None) -> Job:
    """`localrl ARGV...` in the background. `subject`: what it is about (a run's folder, say), to find it again."""
    folder = _next(place.own("jobs"), kind)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, str(RUNNER), str(folder), sys.executable, "-P", "-m", "localrl", *argv],
        cwd=cwd or place.root, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    about = {
        "kind": kind, "subject": subject, "argv": [*argv], "pid": process.pid, "created": psutil.Process(process.pid).create_time(), "started": time.time(),
    }  # fmt: skip
    write_whole(folder / "job.json", json.dumps(about))
    _CHILDREN.append(process)
    _reap()
    return Job(folder)


def jobs(place: Place, kind: str = "", subject: str = "") -> list[Job]:
    """Those of a kind and about a subject, newest first."""
    _reap()
    found = [Job(folder) for folder in sorted(place.own("jobs").iterdir(), reverse=True) if (folder / "job.json").is_file()]
    return [job for job in found if (not kind or job.about.get("kind") == kind) and (not subject or job.about.get("subject") == subject)]


_CHILDREN: list[subprocess.Popen[bytes]] = []


def _reap() -> None:
    """Children that have ended stay as zombies until somebody asks."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]


def _next(where: Path, kind: str) -> Path:
    """A new folder, numbered; two tabs at once get two."""
    number = 1 + max((int(p.name.split("-")[0]) for p in where.iterdir() if p.name.split("-")[0].isdigit()), default=0)
    while True:
        folder = where / f"{number:05d}-{kind}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
