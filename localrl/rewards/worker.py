"""A reward worker, seen from inside: import the functions it is asked for, call them, answer in JSON.

Two processes: the outer one only watches, the inner one (its fork) runs other people's code. When the run is gone, even by
`kill -9`, the outer one sees the hang-up and ends the whole group; a function that holds the interpreter lock, hangs or has
children of its own cannot prevent that, as a watching thread beside it could be prevented.

Standard output and input belong to the functions, so the answers travel on duplicates: what a function prints goes to stderr.
This module imports neither torch nor pydantic: a worker is up within a tenth of a second.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import math
import os
import resource
import select
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from localrl.rewards import builtin
from localrl.rewards.wire import HEAD, Message, frame, unframe

GIVEN = ("prompts", "completions", "completion_ids", "done")
"""What every function may ask for; anything else comes from the data's columns. `done`: whether each completion ended by itself."""


class Unusable(Exception):
    """This function cannot serve; the sentence says why. `word` and `known` are for the hint at the nearest known name."""

    def __init__(self, sentence: str, word: str = "", known: Iterable[str] = ()):
        super().__init__(sentence)
        self.word, self.known = word, sorted(known)


# ---------------------------------------------------------------------------------------------------------------- finding


def find(path: str, base_dir: Path) -> Callable[..., Any]:
    """The function that `path` names: a built-in, `file.py:function` (relative to `base_dir`) or a dotted path."""
    if ":" not in path and "." not in path:
        if path not in builtin.BUILTINS:
            raise Unusable(f"there is no built-in reward '{path}' (your own is written file.py:function)", path, builtin.BUILTINS)
        return builtin.BUILTINS[path]
    place, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if path.endswith(".py"):
        raise Unusable(f"'{path}' names a file but no function: write {path}:function")
    module = _file_module(base_dir / Path(place).expanduser()) if place.endswith(".py") else _dotted_module(place, base_dir)
    if not hasattr(module, name):
        own = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise Unusable(f"{place} has no function '{name}'", name, own)
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        raise Unusable(f"'{name}' in {place} is {_kind(function)}, not a function")
    return function


def _file_module(file: Path) -> ModuleType:
    if not file.is_file():
        raise Unusable(f"there is no file {file}")
    file = file.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(file):
            return module
    sys.path.insert(0, str(file.parent))                      # its neighbours, as when the file itself is run
    name = file.stem if file.stem not in sys.modules and file.stem not in sys.stdlib_module_names else f"reward_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    loader = spec.loader if spec else None
    assert spec is not None
    assert loader is not None                                 # a .py file always has one
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        _guarded(lambda: loader.exec_module(module), file.name)
    except Unusable:
        del sys.modules[name]                                 # half imported: the next attempt must start afresh
        raise
    return module


def _dotted_module(place: str, base_dir: Path) -> ModuleType:
    if str(base_dir) not in sys.path:
        sys.path.insert(0, str(base_dir))
    module: ModuleType = _guarded(lambda: importlib.import_module(place), place)
    return module


def _guarded(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except BaseException as error:                            # other people's module: anything may come out of it
        raise Unusable(f"{what} cannot be imported: {_said(error)}") from error


# -------------------------------------------------------------------------------------------------------------- describing


class Reward:
    """A function with its fixed arguments bound, and what it wants to be given."""

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]):
        self.function, self.args = function, dict(args)
        self.builtin = function in builtin.BUILTINS.values()
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            raise Unusable("has no signature that can be read: wrap it in a def") from None
        self.named = {k for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if unnamed := [k for k, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
            raise Unusable(f"takes '{unnamed[0]}' by position only, but rewards are called by keyword")
        for key in self.args:
            if key in GIVEN:
                raise Unusable(f"cannot have '{key}' fixed: it comes with every call")
            if key not in self.named and (self.builtin or not self.open):
                raise Unusable(f"has no argument '{key}'", key, self.named - {*GIVEN})
        demanded = {k for k in self.named if parameters[k].default is inspect.Parameter.empty}
        self.needs = demanded - {*GIVEN} - self.args.keys()   # columns without which it cannot be called
        if self.builtin:
            self._check_builtin({k: p.default for k, p in parameters.items()} | self.args)

    def _check_builtin(self, values: Mapping[str, Any]) -> None:
        """A built-in's parameters are settings, never columns; `column` names the one column that it reads."""
        if self.needs:
            raise Unusable(f"needs the argument '{min(self.needs)}': give it in args")
        self.needs = {values["column"]} if values.get("column") is not None else set()
        probe = {"prompts": [""], "completions": [""], "completion_ids": [[0]], "done": [True], **{k: ["1"] for k in self.needs}}
        try:
            self({k: v for k, v in probe.items() if self.wants(k)})   # a bad pattern or a missing package shows now, not at step 1
        except (ArithmeticError, ImportError, LookupError, TypeError, ValueError) as error:
            raise Unusable(f"refuses its arguments: {error}") from error

    def wants(self, key: str) -> bool:
        """Whether the keyword `key` is to be passed. Fixed arguments win over columns of the same name."""
        if self.builtin:
            return key in self.needs or (key in GIVEN and key in self.named)
        return key not in self.args and (key in self.named or self.open)

    def __call__(self, given: Mapping[str, Any]) -> Any:
        return self.function(**given, **self.args)


def load(path: str, args: Mapping[str, Any], base_dir: Path) -> tuple[Reward | None, Message]:
    """The reward and what there is to say about it: {"needs", "wants", "open"}, or {"unusable", "word", "known"}."""
    try:
        reward = Reward(find(path, base_dir), args)
    except Unusable as error:
        return None, {"unusable": str(error), "word": error.word, "known": error.known}
    asks = [k for k in GIVEN if reward.wants(k)]
    named = sorted(reward.needs if reward.builtin else reward.named - {*GIVEN} - reward.args.keys())
    return reward, {"needs": sorted(reward.needs), "given": asks, "named": named, "open": reward.open and not reward.builtin,
                    "fixed": sorted(reward.args)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- calling


class Caller:
    """Calls rewards one after another, in the main thread: SIGALRM, which math-verify uses, works nowhere else."""

    def __init__(self) -> None:
        self.runner: Any = None
        self.told: set[str] = set()

    def __call__(self, reward: Reward, given: Mapping[str, Any], rows: int) -> Message:
        """{"values", "seconds", "invalid", "problem"}; or {"error", "place", "seconds"} where the function raised."""
        start = time.perf_counter()
        try:
            returned = reward(given)
            if inspect.iscoroutine(returned):
                returned = self._run(returned)
            values = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping)) else None
        except BaseException as error:                        # other people's function: SystemExit, math-verify's time-out, anything
            self._trace(error)
            return {"error": _said(error), "seconds": time.perf_counter() - start}
        seconds = time.perf_counter() - start
        if values is None or len(values) != rows:
            what = f"returned {_kind(returned)}" if values is None else f"returned {len(values)} values"
            wrong = {"kind": "length", "text": f"{what} for {rows} completions"}
            return {"values": [None] * rows, "invalid": rows, "problem": wrong, "seconds": seconds}
        numbers, problems = zip(*map(number, values), strict=True) if values else ((), ())
        first = next(((row, p) for row, p in enumerate(problems) if p), None)
        problem = first and {"kind": first[1][0], "text": f"returned {first[1][1]} for completion {first[0]} of {rows}"}
        return {"values": numbers, "invalid": sum(map(bool, problems)), "problem": problem, "seconds": seconds}

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self.runner is None:
            # Imported here: it takes 30 ms, which plain functions need not pay.
            import asyncio

            self.runner = asyncio.Runner()                    # one loop for life, so that a function may keep its HTTP client
        return self.runner.run(coroutine)

    def _trace(self, error: BaseException) -> None:
        """The whole traceback goes to stderr, once for each kind and place."""
        said = f"{type(error).__name__} {_place(error)}"
        if said not in self.told:
            self.told.add(said)
            traceback.print_exception(error, file=sys.stderr)


def number(value: Any) -> tuple[float | None, tuple[str, str] | None]:
    """A reward as a float, or None and what is wrong with it: (kind, words).

    >>> number(True), number(None), number("high"), number(float("nan"))
    ((1.0, None), (None, None), (None, ('type', "'high'")), (None, ('nan', 'nan')))
    """
    if value is None:
        return None, None
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return None, ("type", repr(value)[:60])
    try:
        real = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):   # an array of several numbers, an integer beyond all floats
        return None, ("type", repr(value)[:60])
    return (real, None) if math.isfinite(real) else (None, ("nan", repr(real)))


def _said(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero (reward.py:12)`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}:{error.lineno})"
    words = " ".join(str(error).split())[:300]
    place = _place(error)
    return f"{type(error).__name__}{': ' if words else ''}{words}{f' ({place})' if place else ''}"


def _place(error: BaseException) -> str:
    """The innermost line of the user's, else of anybody's but ours: `reward.py:12`, or nothing."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    own = [frame for frame in frames if is_own(frame[0])] or frames
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


_OURS = str(Path(__file__).parent)
_LIBRARY = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), _OURS, "<frozen")


def is_own(file: str) -> bool:
    """Whether a traceback's file is the user's, and neither Python's, nor an installed package's, nor ours."""
    return not file.startswith(_LIBRARY) and "site-packages" not in file


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if not inspect.isclass(value) else "a class"


# ----------------------------------------------------------------------------------------------------------------- serving


def serve(requests: BinaryIO, replies: int) -> None:
    """Answer until the other side hangs up."""
    rewards: list[Reward | None] = []
    call = Caller()
    while (message := _receive(requests)) is not None:
        if "load" in message:
            loaded = [load(path, args, Path(message["base_dir"])) for path, args in message["load"]]
            rewards = [reward for reward, _ in loaded]
            answer: Message = {"loaded": [said for _, said in loaded]}
        else:
            reward = rewards[message["call"]]
            assert reward is not None                         # the pool never calls what was unusable
            answer = call(reward, message["given"], message["rows"])
        out = memoryview(frame(answer))
        while out:
            out = out[os.write(replies, out) :]


def _receive(requests: BinaryIO) -> Message | None:
    head = requests.read(HEAD)
    return unframe(head + requests.read(int.from_bytes(head, "big"))) if len(head) == HEAD else None


def main(places: int) -> None:
    """Become a worker: requests on stdin, replies on stdout, where it hung or crashed on the descriptor `places`."""
    requests, replies = os.dup(0), os.dup(1)                  # dup: not inherited by what the functions start
    inner = os.fork()
    if inner:
        os.close(replies)
        os.close(1)
        threading.Thread(target=_end_with_the_run, args=(requests,), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
        os._exit(code if code >= 0 else 128 - code)           # as a shell reports a signal
    with suppress(OSError):                                   # where there is no such file the kernel has no such choice
        Path("/proc/self/oom_score_adj").write_text("500")    # should memory run out, rather this process than the trainer
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)               # type: ignore[union-attr]  # prints must survive a kill
    os.set_inheritable(places, False)
    faulthandler.enable(places)
    faulthandler.register(signal.SIGUSR1, places, all_threads=False)
    serve(os.fdopen(requests, "rb"), replies)
    os._exit(0)


def _end_with_the_run(requests: int) -> None:
    hangup = select.poll()
    hangup.register(requests, 0)                              # no event asked for but the hang-up, which always comes
    hangup.poll()
    os.killpg(0, signal.SIGKILL)
