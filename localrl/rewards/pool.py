"""The reward functions of a run: start their processes, score rollouts, tell what went wrong.

When a function raises, the whole call is lost (NaN for all its rows), also if a single row was to blame. Asking again row by row would
save the others, but a function may well look at its rows together (rank them, compare them within a group, send one request
for all), and then a value for a lone row means something else. A missing value is honest; a different one is not.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from localrl.rewards.process import Failure, Worker, wait
from localrl.rewards.spec import RewardSettings, RewardSpec
from localrl.rewards.wire import Message
from localrl.rewards.worker import GIVEN
from localrl.settings import UserError, nearest

if TYPE_CHECKING:
    # Only its type: a reward lab without a model need not load torch.
    from localrl.batch import Rollout


@dataclass(frozen=True)
class Health:
    """What became of one reward's calls since the last report."""

    seconds: float = 0.0
    """Spent in the function."""
    errors: int = 0
    """Calls in which it raised, or its module could not be imported again."""
    timeouts: int = 0
    """Calls that were stopped at `rewards.timeout`."""
    deaths: int = 0
    """Calls in which the process ended: a crash, os._exit, the memory limit."""
    invalid: int = 0
    """Values that were no finite number and not None; all of a call whose length was wrong."""

    def __add__(self, other: Health) -> Health:
        return Health(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Report:
    """What became of the calls since the last report, and what a person should be told now."""

    rewards: Mapping[str, Health]
    messages: tuple[str, ...]
    """One for each function and kind of failure over the life of the `Rewards`; repetitions are only counted."""

    def metrics(self) -> dict[str, float]:
        """For the metrics file.

        >>> list(Report({"short": Health(seconds=0.5)}, ()).metrics().items())[:2]
        [('rewards/short/seconds', 0.5), ('rewards/short/errors', 0)]
        """
        return {f"rewards/{name}/{key}": value for name, health in self.rewards.items() for key, value in asdict(health).items()}


class Rewards:
    """The functions of a run in their worker processes. A context manager: on leaving, the processes are killed.

    Raises UserError where a function cannot be found, imported or called. `base_dir` is where `file.py:function` starts from and
    the first place to look for dotted paths; `log` is the file for what the functions print (None: this process's stderr). Not
    for several threads at once.
    """

    def __init__(self, settings: RewardSettings, base_dir: Path, log: Path | None = None):
        if not settings.functions:
            raise UserError("there are no rewards: name at least one in rewards.functions, for instance \"exact_answer\"")
        self.settings, self.base_dir = settings, base_dir.resolve()
        self._health: dict[str, Health] = {}
        self._messages: list[str] = []
        self._told: set[tuple[str, str]] = set()
        if sys.platform != "linux":
            self._messages.append("rewards.memory is not watched on this system: a reward that eats memory is not stopped")
        count = min(settings.workers, len(settings.functions))
        self._places = [(index % count, index // count) for index in range(len(settings.functions))]   # function -> worker, number there
        self._workers: list[Worker] = []
        try:
            for _ in range(count):
                self._workers.append(Worker(settings.memory, log))
            self._first_load()
        except BaseException:                                 # whatever it was, leave no process behind
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names in the metrics, in the order of `Rollout.rewards`."""
        return self.settings.names

    @property
    def weights(self) -> tuple[float, ...]:
        """The rewards' weights, in the same order."""
        return self.settings.weights

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises UserError if a reward needs a column that the data lack, or a column has a name that rewards keep for themselves."""
        columns = set(columns)
        if taken := columns & {*GIVEN}:
            raise UserError(f"the column '{min(taken)}' has a name that reward functions use otherwise: rename it with data.rename")
        for index, name in enumerate(self.names):
            if lacking := [column for column in self._said(index)["needs"] if column not in columns]:
                there = f"they have {', '.join(sorted(columns)) or 'none but the prompt'}"
                raise UserError(f"reward '{name}' needs the column '{lacking[0]}', which the data lack: {there}")

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same rollouts with `rewards` filled in, one a function; NaN: does not apply, or could not be had. Those that go on are not asked about."""
        finished = [rollout for rollout in rollouts if not rollout.more]
        scored = iter(self._score(finished) if finished else ())
        nothing = (math.nan,) * len(self.names)
        return [replace(rollout, rewards=nothing) if rollout.more else next(scored) for rollout in rollouts]

    def _score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        given = _given(rollouts)
        values = [[math.nan] * len(rollouts) for _ in self.names]
        todo = [deque[int]() for _ in self._workers]
        for index, (at, _) in enumerate(self._places):
            todo[at].append(index)
        try:
            while any(todo):
                for worker, queue in zip(self._workers, todo, strict=True):
                    if queue and not worker.busy:
                        self._ask(worker, queue[0], given, len(rollouts))
                for worker in wait(self._workers):
                    queue = todo[self._workers.index(worker)]
                    self._take(worker, queue, values)
        finally:
            for worker in self._workers:
                if worker.busy:                               # interrupted: an answer still under way would belong to nobody
                    worker.kill()
        rows = [self._conditioned(row) for row in zip(*values, strict=True)]
        return [replace(rollout, rewards=row) for rollout, row in zip(rollouts, rows, strict=True)]

    def _conditioned(self, row: Sequence[float]) -> tuple[float, ...]:
        """A completion's rewards, those with an unmet condition 0. A missing one stays missing; a missing condition is unmet."""
        place = {name: index for index, name in enumerate(self.names)}
        met = [spec.given is None or row[place[spec.given]] >= spec.at_least for spec in self.settings.functions]
        return tuple(value if ok or math.isnan(value) else 0.0 for value, ok in zip(row, met, strict=True))

    def report(self) -> Report:
        """Everything since the last report; the counts start anew."""
        health = {name: self._health.get(name, Health()) for name in self.names}
        report = Report(health, tuple(self._messages))
        self._health, self._messages = {}, []
        return report

    def close(self) -> None:
        """Kill the processes. Scoring is over."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ loading

    def _said(self, index: int) -> Message:
        worker, number = self._places[index]
        return self._workers[worker].functions[number]

    def _specs_of(self, worker: Worker) -> list[RewardSpec]:
        number = self._workers.index(worker)
        return [spec for spec, (at, _) in zip(self.settings.functions, self._places, strict=True) if at == number]

    def _ask_to_load(self, worker: Worker) -> None:
        load = [[spec.function, spec.args] for spec in self._specs_of(worker)]
        try:
            worker.ask({"load": load, "base_dir": str(self.base_dir)}, self.settings.start_timeout)
        except TypeError as error:
            names = "' and '".join(spec.label for spec in self._specs_of(worker))
            raise UserError(f"the args of reward '{names}' must be plain values: {error}") from error

    def _first_load(self) -> None:
        for worker in self._workers:
            self._ask_to_load(worker)
        while wait(self._workers):
            pass
        for worker in self._workers:
            if problem := self._take_load(worker):
                raise UserError(problem)

    def _take_load(self, worker: Worker) -> str:
        """Note what a worker says of its functions; a sentence where one of them cannot be used."""
        problem = self._load_problem(worker)
        if not problem:
            assert isinstance(worker.answer, dict)            # a Failure is a problem
            worker.functions = worker.answer["loaded"]
        return problem

    def _load_problem(self, worker: Worker) -> str:
        """A sentence, or nothing where all functions of this worker are ready."""
        names = "' and '".join(spec.label for spec in self._specs_of(worker))
        match worker.answer:
            case Failure(kind="timeout", text=text):
                return (f"reward '{names}' took longer than rewards.start_timeout = {self.settings.start_timeout:g} s to import{text}: "
                        "raise the limit or do less at import")
            case Failure(kind="memory", text=text):
                return (f"reward '{names}' {text} while it was imported, the limit is rewards.memory = {self.settings.memory:g} GiB: "
                        "raise the limit or load less")
            case Failure(text=text):
                return f"reward '{names}' {text} while it was imported: try to import it in a plain Python"
            case {"loaded": loaded}:
                for spec, said in zip(self._specs_of(worker), loaded, strict=True):
                    if "unusable" in said:
                        hint = f": {nearest(said['word'], said['known'])}" if said["word"] and said["known"] else ""
                        return f"reward '{spec.label}': {said['unusable']}{hint}"
        return ""

    # ------------------------------------------------------------------------------------------------------------ scoring

    def _ask(self, worker: Worker, index: int, given: Mapping[str, list[Any]], rows: int) -> None:
        """Call function `index`; a process that is new since the last call must import first, on a clock of its own."""
        if not worker.alive:
            worker.restart()
        if not worker.functions:
            self._ask_to_load(worker)
            return
        its = self._said(index)
        keys = [k for k in given if k in its["given"] or k in its["named"] or (its["open"] and k not in GIVEN and k not in its["fixed"])]
        try:
            worker.ask({"call": self._places[index][1], "given": {k: given[k] for k in keys}, "rows": rows}, self.settings.timeout)
        except TypeError as error:
            raise UserError(f"a column for reward '{self.names[index]}' holds a value that cannot be handed over: {error}") from error

    def _take(self, worker: Worker, queue: deque[int], values: list[list[float]]) -> None:
        """Note an answer: the values, or what went wrong. A function that is through leaves the queue."""
        name = self.names[queue[0]]
        if not worker.functions:
            if problem := self._take_load(worker):            # perhaps the file is mended before the next call
                self._count(name, Health(errors=1), "load", problem)
                queue.popleft()
            return
        index = queue.popleft()
        match worker.answer:
            case Failure(kind=kind, text=text, seconds=seconds):
                timeout = kind == "timeout"
                self._count(name, Health(seconds, timeouts=int(timeout), deaths=int(not timeout)), kind, self._why(kind, text))
            case {"error": text, "seconds": seconds}:
                self._count(name, Health(seconds, errors=1), "error", f"raised {text}")
            case {"values": numbers, "invalid": invalid, "problem": None, "seconds": seconds}:
                values[index] = _floats(numbers)
                self._count(name, Health(seconds, invalid=invalid))
            case {"values": numbers, "invalid": invalid, "problem": {"kind": kind, "text": text}, "seconds": seconds}:
                values[index] = _floats(numbers)
                self._count(name, Health(seconds, invalid=invalid), kind, f"{text}: {_ADVICE[kind]}")

    def _why(self, kind: Literal["timeout", "memory", "death"], text: str) -> str:
        if kind == "timeout":
            return f"took longer than rewards.timeout = {self.settings.timeout:g} s{text} and was stopped"
        return f"{text}, more than rewards.memory = {self.settings.memory:g} GiB, and was stopped" if kind == "memory" else text

    def _count(self, name: str, health: Health, kind: str = "", text: str = "") -> None:
        self._health[name] = self._health.get(name, Health()) + health
        if kind and (name, kind) not in self._told:
            self._told.add((name, kind))
            subject = "" if kind == "load" else f"reward '{name}' "
            self._messages.append(f"{subject}{text}; the values are missing (NaN), further cases are only counted")


_ADVICE = {"length": "return one value for each", "type": "return a number or None", "nan": "return None where it does not apply"}


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _given(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """TRL's keyword arguments, one entry a rollout each. A column that a prompt lacks is None there."""
    prompts = [rollout.request.prompt for rollout in rollouts]
    columns = dict.fromkeys(key for prompt in prompts for key in prompt.columns)
    return {key: [prompt.columns.get(key) for prompt in prompts] for key in columns} | {
        "prompts": [prompt.content for prompt in prompts],
        "completions": [
            rollout.text if isinstance(prompt.content, str) else [{"role": "assistant", "content": rollout.text}]
            for rollout, prompt in zip(rollouts, prompts, strict=True)
        ],
        "completion_ids": [list(rollout.tokens) for rollout in rollouts],
        "done": [rollout.done for rollout in rollouts],
    }
