"""One reward worker, seen from outside: ask it something, wait with a limit, kill it and whatever it started.

Everything is done by one thread with non-blocking pipes, because threads beside a training loop are trouble of their own.
Memory is watched, not limited by the kernel: RLIMIT_AS and RLIMIT_DATA count address space, of which torch and CUDA reserve
far more than they use, and they count each process alone. The watch sums what the worker and all its children really hold.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from localrl.rewards.wire import Message, frame, unframe
from localrl.rewards.worker import is_own

TICK = 0.05
"""Seconds between two looks at deadlines."""
LOOK = 0.1
"""Seconds between two looks at memory; a fast function can take half a GiB in that time."""
LOG_LIMIT = 16 * 2**20
"""Bytes after which a log starts afresh: a function that prints in a loop must not fill the disk."""
GIB = 2**30
PAGE = os.sysconf("SC_PAGE_SIZE")

# The worker sees the modules that this process sees, wherever they come from (checkout, wheel, notebook). -P: not those of the working folder
# before that, where a person's json.py would be taken for the library's.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from localrl.rewards.worker import main; main(int(sys.argv[2]))"


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    kind: Literal["timeout", "memory", "death"]
    text: str
    """What happened, as the predicate of a sentence."""
    seconds: float


class Worker:
    """A process that answers one question at a time. `answer` is None while it has not.

    `memory`: GiB that it may hold, its children included; `log`: the file for what its functions print, None: our own stderr.
    """

    def __init__(self, memory: float, log: Path | None):
        self.memory, self.log = memory, log
        self.answer: Message | Failure | None = None
        self.functions: list[Message] = []
        """What it said of the functions it has imported; empty in a new process."""
        self.busy = False
        self._start()

    def _start(self) -> None:
        self.places = tempfile.TemporaryFile()                # noqa: SIM115  # lives as long as the process
        log = self.log.open("ab") if self.log else None
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps([str(entry) for entry in sys.path]), str(self.places.fileno())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                pass_fds=[self.places.fileno()], start_new_session=True,   # Ctrl-C in the terminal is for the run alone
            )
        finally:
            if log:
                log.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.returncode is None and not has_exited(self.process.pid)

    def ask(self, message: Message, seconds: float) -> None:
        """Put a question; `wait` brings the answer, or a Failure after `seconds`. Raises TypeError where a value is not JSON."""
        self.unsent, self.received = memoryview(frame(message)), bytearray()
        self.answer, self.busy = None, True
        self.asked, self.deadline = time.monotonic(), time.monotonic() + seconds

    def step(self) -> None:
        """Send and receive what the pipes will take, then look at the clock and at the process."""
        over = has_exited(self.process.pid)                   # first: what it said before it went is still read
        hung_up = self._pump()
        if (answer := unframe(self.received)) is not None:
            self.answer, self.busy = answer, False
            self._trim()
        elif over or hung_up:
            self._fail("death", "")
        elif time.monotonic() > self.deadline:
            place = self._where()
            self._fail("timeout", f" (at {place})" if place else "")

    def look(self, members: Sequence[Member]) -> None:
        """Look at the memory of its processes, and at the log."""
        self._trim()
        if (held := held_by(members, self.memory * GIB)) > self.memory * GIB:
            self._fail("memory", f"held {held / GIB:.2f} GiB")

    def _trim(self) -> None:
        if self.log and self.log.stat().st_size > LOG_LIMIT:
            os.truncate(self.log, 0)                          # the worker appends, so its next line is the first

    def _pump(self) -> bool:
        """Move bytes; True: the other side hung up."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.requests, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return True
        try:
            while part := os.read(self.replies, 1 << 16):
                self.received += part
        except BlockingIOError:
            return False
        return True

    def _fail(self, kind: Literal["timeout", "memory", "death"], text: str) -> None:
        code = self.kill()
        if kind == "death":
            crash = self._crash_place()
            text = f"ended its own process ({_how(code)}{f' at {crash}' if crash else ''})"
        self.answer, self.busy = Failure(kind, text, time.monotonic() - self.asked), False

    def _where(self) -> str:
        """The user's line at which the worker hangs: faulthandler tells on SIGUSR1, even when the interpreter lock is held."""
        self.places.seek(0)                                   # the position is shared with the worker, which writes there
        self.places.truncate()
        for member in sessions().get(self.process.pid, ()):
            if member.parent == self.process.pid:
                os.kill(member.pid, signal.SIGUSR1)
        for _ in range(20):
            if os.fstat(self.places.fileno()).st_size:
                break
            time.sleep(0.005)
        time.sleep(0.005)
        return self._crash_place()

    def _crash_place(self) -> str:
        self.places.seek(0)
        lines = re.findall(r'File "(.+)", line (\d+) in', self.places.read().decode(errors="replace"))
        return next((f"{Path(file).name}:{line}" for file, line in lines if is_own(file)), "")

    def kill(self) -> int:
        """End the worker and whatever it started, at once; its exit status. Harmless where it has ended already."""
        if self.process.returncode is None:
            for member in sessions().get(self.process.pid, ()):
                if member.pid != self.process.pid:            # the outer process reaps the inner one, then goes by itself
                    with suppress(ProcessLookupError):
                        os.kill(member.pid, signal.SIGKILL)
            until = time.monotonic() + 0.5
            while not has_exited(self.process.pid) and time.monotonic() < until and sys.platform == "linux":
                time.sleep(0.002)
            with suppress(ProcessLookupError, PermissionError):   # PermissionError: macOS, where only a zombie is left
                os.killpg(self.process.pid, signal.SIGKILL)   # not reaped yet, so the number still is this group's
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.busy = False
        return self.process.returncode

    def restart(self) -> None:
        """A new process in place of a killed one; it knows no functions yet."""
        self.close()
        self.functions = []
        self._start()

    def close(self) -> None:
        """Kill it, and let go of its files."""
        self.kill()
        self.places.close()


def wait(workers: Sequence[Worker]) -> list[Worker]:
    """Block until at least one of the busy workers has its answer or its failure; those that have."""
    looked = time.monotonic()
    while True:
        busy = [worker for worker in workers if worker.busy]
        for worker in busy:
            worker.step()
        if time.monotonic() > looked + LOOK:
            looked, all_members = time.monotonic(), sessions()
            for worker in busy:
                if worker.busy:
                    worker.look(all_members.get(worker.process.pid, ()))
        done = [worker for worker in busy if not worker.busy]
        if done or not busy:
            return done
        with selectors.DefaultSelector() as ready:
            for worker in busy:
                ready.register(worker.replies, selectors.EVENT_READ)
                if worker.unsent:
                    ready.register(worker.requests, selectors.EVENT_WRITE)
            ready.select(TICK)


def has_exited(pid: int) -> bool:
    """Whether our child `pid` is over; leaves it unreaped, so that its number stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Member(NamedTuple):
    """A process of a session, which is a worker with all that it started."""

    pid: int
    parent: int
    resident: int
    """Bytes in main memory, shared ones included."""


def sessions() -> dict[int, list[Member]]:
    """Every process of this machine by the leader of its session; nothing where there is no /proc."""
    found: dict[int, list[Member]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else ()):
        with suppress(OSError):                               # gone between two looks
            with open(f"/proc/{name}/stat", "rb") as file:
                _, parent, _, leader, *rest = file.read().rpartition(b")")[2].split()
            found.setdefault(int(leader), []).append(Member(int(name), int(parent), int(rest[17]) * PAGE))
    return found


def held_by(members: Sequence[Member], enough: float) -> float:
    """Bytes that processes hold in main memory together.

    Resident sizes count a page once for every process that shares it, so only their sum being above `enough` is a reason to ask
    for the slower, exact figures, in which sharers divide a page.
    """
    total = float(sum(member.resident for member in members))
    return total if total <= enough else sum(_proportional(member) for member in members)


def _proportional(member: Member) -> float:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{member.pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return member.resident                                # gone, or a kernel older than 4.14
    return int(found[1]) * 1024 if found else member.resident


def _how(code: int) -> str:
    number = -code if code < 0 else code - 128                # the outer process hands a signal on as a shell does
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"
