"""Asynchronous sampling, the trainer's side: searchers sample in processes of their own while the trainer learns.

The idea is that of Trajectory Balance with Asynchrony (arXiv 2503.18929, section 4): whoever samples is never waited for, as long as what
it finds may be older than the policy. Requests go out in shares of whole groups, rollouts come back when they come, and every
`replay.sync_every` updates the adapter goes out as a folder of safetensors.

No thread on this side: threads beside a training loop are trouble of their own. Each searcher has a share to work on and another one that
waits, so it stays busy while nobody looks here.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, groupby
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from localrl.batch import Request, Rollout
from localrl.config import Run
from localrl.engines.searcher import groups_of
from localrl.rewards.process import has_exited
from localrl.rewards.wire import HEAD, Message, frame, unframe
from localrl.sections import Gguf, RolloutSettings
from localrl.settings import UserError

DEPTH = 2
"""Most shares of one searcher: one that it samples, one that waits for it."""
LAST_WORDS = 3
"""Lines of the log that an error quotes."""

Group = list[Request]


class Adapter(NamedTuple):
    """Weights on their way to the searchers."""

    serial: int
    folder: Path
    version: int


class Process:
    """One searcher, seen from outside. What its libraries print goes to `log`."""

    def __init__(self, number: int, start: Message, threads: int, log: Path) -> None:
        self.number, self.ready = number, False
        self.shares: dict[int, list[Group]] = {}
        """What it was asked and has not answered."""
        self.told: set[int] = set()
        """Adapters that it may still have to read, by serial."""
        # It sees the modules that this process sees, wherever they come from (checkout, wheel, notebook), and none of the working folder (-P).
        paths = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "localrl.engines.searcher"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, bufsize=0,
                env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,                       # Ctrl-C in the terminal is for the run alone
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.replies, False)
        self._received = bytearray()
        self.send(start)

    @property
    def over(self) -> bool:
        """Whether the process has ended."""
        return self.process.returncode is not None or has_exited(self.process.pid)

    def send(self, message: Message) -> None:
        """Waits for no more than the pipe: a thread over there does nothing but read. One that is gone hears nothing, `receive` notices."""
        out = memoryview(frame(message))
        with suppress(BrokenPipeError):
            while out:
                out = out[os.write(self.requests, out) :]

    def receive(self) -> tuple[list[Message], bool]:
        """What it has said by now, and whether it hung up; does not wait."""
        messages, over = [], self.over                        # over first: what it said before it went is still read
        try:
            while part := os.read(self.replies, 1 << 16):
                self._received += part
            over = True
        except BlockingIOError:
            pass
        while (message := unframe(self._received)) is not None:
            del self._received[: HEAD + int.from_bytes(self._received[:HEAD], "big")]
            messages.append(message)
        return messages, over

    def end(self, patience: float = 0.0) -> str:
        """Kill it, after `patience` seconds for one that is about to go by itself. -> how it ended."""
        if self.process.returncode is None:
            until = time.monotonic() + patience
            while not self.over and time.monotonic() < until:
                time.sleep(0.005)
            with suppress(ProcessLookupError, PermissionError):   # PermissionError: macOS, where only a zombie is left
                os.killpg(self.process.pid, signal.SIGKILL)   # not reaped yet, so the number still is this group's
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        code = self.process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Searchers:
    """An engine whose answers come late, of policies that were: Rollout.version tells which. A context manager: on leaving, the processes end.

    `concurrent`: sequences that each searcher decodes at once; `llama`: what llama.cpp's base is rounded to, where it samples; `with_reference`:
    rollouts carry the reference's log-probabilities; `say` is told when a searcher died; `progress` hears, while the trainer waits, how many of
    the rollouts under way have come; `log`: the file for what the processes print, else it lives as long as they do. Waits until every searcher
    has loaded its model. Raises UserError if one cannot.
    """

    exact = False

    def __init__(
        self, run: Run, *, concurrent: int, with_reference: bool, kv_cache: Literal["full", "int8"] = "full", llama: Gguf | None = None,
        say: Callable[[str], None], progress: Callable[[int, int], None] | None = None, log: Path | None = None,
    ) -> None:  # fmt: skip
        self.run, self.say, self.progress = run, say, progress
        self.folder = Path(tempfile.mkdtemp(prefix="localrl-search-"))
        self.log = log or self.folder / "search.log"
        self._start = {
            "run": run.dump(), "concurrent": concurrent, "with_reference": with_reference, "kv_cache": kv_cache, "llama": llama,
            "folder": str(self.folder),
        }  # fmt: skip
        self._most = run.search.ahead * run.rollout.prompts_per_step * run.rollout.num_generations
        self._adapters: dict[int, Adapter] = {}
        self._newest: Adapter | None = None
        self._numbers = count()
        self._queue: deque[Group] = deque()
        self._under_way = self._restarts = 0
        self._ready: list[Rollout] = []
        self._busy = self._idle = 0.0
        self._last: dict[str, float] = {}
        self._processes: list[Process] = []
        try:
            for number in range(1, run.search.processes + 1):
                self._processes.append(self._begin(number))
            while not all(process.ready for process in self._processes):
                self._wait()
                self._collect()
        except BaseException:                                 # whatever it was, leave no process behind
            self.close()
            raise

    def _begin(self, number: int) -> Process:
        process = Process(number, self._start, self.run.search.threads, self.log)
        if self._newest:
            self._tell(process, self._newest)
        return process

    # ------------------------------------------------------------------------------------------------------------- sampling

    def generate(self, requests: list[Request], version: int, *, settings: RolloutSettings | None = None) -> list[Rollout]:
        """Ask for these, and return what is ready of all that was asked, in whole groups, maybe nothing.

        Waits only while more than `search.ahead` steps' worth is under way, or if nothing was asked, nothing is ready, and something is
        under way. `version`: the trainer's; a searcher samples under its own. Raises UserError if searchers die more often than
        `search.restarts`, or one of them found something that a person must put right.
        """
        if settings is not None:
            raise RuntimeError("searchers sample with the run's settings: evaluation uses the trainer's own engine")
        if not self._processes:
            raise RuntimeError("these searchers are closed")
        self._queue.extend(list(group) for _, group in groupby(requests, key=lambda request: request.prompt.id))
        self._under_way += len(requests)
        total = self._under_way + len(self._ready)
        self._turn()
        while self._under_way > self._most or (self._under_way and not requests and not self._ready):
            self._wait()
            self._turn()
            if self.progress:
                self.progress(len(self._ready), total)
        rollouts, self._ready = self._ready, []
        if rollouts:
            self._note(rollouts, version)
        return rollouts

    def _turn(self) -> None:
        self._collect()
        self._hand_out()

    def _wait(self) -> None:
        """Until a searcher says something or dies. Ctrl-C is heard."""
        with selectors.DefaultSelector() as ready:
            for process in self._processes:
                ready.register(process.replies, selectors.EVENT_READ)
            ready.select()

    def _hand_out(self) -> None:
        """Shares of equal size, to whoever has least to do."""
        each = -(-sum(map(len, self._queue)) // len(self._processes))
        while self._queue:
            able = [process for process in self._processes if process.ready and len(process.shares) < DEPTH]
            if not able:
                return
            groups = list(self._next(each))
            process, number = min(able, key=lambda process: len(process.shares)), next(self._numbers)
            process.shares[number] = groups
            process.send({"share": number, "groups": groups_of(groups)})

    def _next(self, rollouts: int) -> Iterator[Group]:
        """Whole groups from the queue, until they are `rollouts` or more."""
        while self._queue and rollouts > 0:
            rollouts -= len(self._queue[0])
            yield self._queue.popleft()

    # ----------------------------------------------------------------------------------------------------------- collecting

    def _collect(self) -> None:
        """All that has been said; who died is started again."""
        for place, process in enumerate(self._processes):
            messages, over = process.receive()
            for message in messages:
                self._take(process, message)
            if over:
                self._replace(place)

    def _take(self, process: Process, message: Message) -> None:
        match message:
            case {"failed": sentence}:
                raise UserError(sentence)
            case {"ready": True}:
                process.ready = True
            case {"taken": serial}:
                process.told = {other for other in process.told if other > serial}
                self._tidy()
            case {"share": number, "version": version, "rollouts": rows, "busy": busy, "idle": idle}:
                requests = [request for group in process.shares.pop(number) for request in group]
                self._ready += [rebuilt(request, version, *row) for request, row in zip(requests, rows, strict=True)]
                self._under_way -= len(requests)
                self._busy, self._idle = self._busy + busy, self._idle + idle

    def _replace(self, place: int) -> None:
        """A new process for one that died, which is given nothing back but its number: whoever is free first takes its unfinished shares."""
        gone, limit = self._processes[place], self.run.search.restarts
        how = gone.end(patience=0.5)
        if self._restarts >= limit:
            raise UserError(f"searcher {gone.number} ended ({how}), and search.restarts = {limit} allows no further start: give it more memory, take "
                            f"fewer search.processes, or raise the limit; its last words: {last_words(self.log)}")
        self._restarts += 1
        self.say(f"searcher {gone.number} ended ({how}) and is started again ({self._restarts} of search.restarts = {limit}), what it had not answered "
                 "is asked again")
        lost = [group for groups in gone.shares.values() for group in groups]
        self._queue.extendleft(reversed(lost))
        self._processes[place] = self._begin(gone.number)
        self._tidy()

    def _note(self, rollouts: list[Rollout], version: int) -> None:
        self._last["rollout/staleness_mean"] = sum(version - rollout.version for rollout in rollouts) / len(rollouts)
        self._last["rollout/searcher_busy_share"] = self._busy / (self._busy + self._idle)
        self._busy = self._idle = 0.0

    # ------------------------------------------------------------------------------------------------------------ following

    def follow(self, save_weights: Callable[[Path], None], version: int) -> None:
        """Write the adapter and tell the searchers, at the first call and then every `replay.sync_every` updates; each takes it before its
        next share."""
        every = self.run.replay.sync_every
        if self._newest and version // every == self._newest.version // every:
            return
        serial = next(self._numbers)
        part, folder = self.folder / f"{serial}.part", self.folder / str(serial)
        part.mkdir()
        save_weights(part)
        part.rename(folder)
        self._newest = self._adapters[serial] = Adapter(serial, folder, version)
        for process in self._processes:
            self._tell(process, self._newest)
        self._tidy()

    def _tell(self, process: Process, adapter: Adapter) -> None:
        process.told.add(adapter.serial)
        process.send({"adapter": adapter.serial, "folder": str(adapter.folder), "version": adapter.version})

    def _tidy(self) -> None:
        """Delete adapters that nobody will read any more. The newest one stays, for a searcher that is started again."""
        needed = set().union(*(process.told for process in self._processes))
        for serial in [serial for serial in self._adapters if serial not in needed and self._adapters[serial] is not self._newest]:
            shutil.rmtree(self._adapters.pop(serial).folder)

    # --------------------------------------------------------------------------------------------------------------- ending

    def metrics(self) -> dict[str, float]:
        """Now: `rollout/searchers_alive`, and `rollout/under_way`, rollouts asked for and not answered. So far: `rollout/restarts`. Of the
        rollouts returned last: `rollout/staleness_mean`, updates of the policy since, and `rollout/searcher_busy_share`, of the searchers' time."""
        alive = sum(not process.over for process in self._processes)
        return {"rollout/searchers_alive": float(alive), "rollout/under_way": float(self._under_way), "rollout/restarts": float(self._restarts), **self._last}

    def close(self) -> None:
        """End the processes and remove the temporary folder. What is under way is lost."""
        for process in self._processes:
            process.end()
        self._processes = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Searchers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def rebuilt(
    request: Request, version: int, tokens: list[int], text: str, done: bool, logp: list[float], more: bool, ref: list[float] | None
) -> Rollout:
    """A rollout as it was, with the very request that asked for it."""
    return Rollout(request, tuple(tokens), text, done, version, tuple(logp), more=more, ref=None if ref is None else tuple(ref))


def last_words(log: Path) -> str:
    """The end of a log, in one line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [" ".join(line.split()) for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LAST_WORDS:])[-600:] or f"none in {log}"
