"""Everything that people's reward functions get wrong, with real processes: each costs missing values, a count and one message."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localrl.rewards import process
from localrl.rewards.process import sessions
from localrl.settings import UserError

Make = Callable[..., Any]

LATE = " (NaN), further cases are only counted"
FAILING = {
    # function: (its body, the counter, the message)
    "raises": ("\n    return [1 / 0]", "errors", r"reward 'f' raised ZeroDivisionError: division by zero \(mine.py:3\); the values are"),
    "leaves": ("\n    sys.exit(4)", "errors", r"reward 'f' raised SystemExit: 4 \(mine.py:3\)"),
    "reads": ("\n    input()", "errors", r"reward 'f' raised EOFError: EOF when reading a line \(mine.py:3\)"),
    "out_of_memory": ("\n    bytearray(2 ** 62)", "errors", r"reward 'f' raised MemoryError"),
    "hangs": ("\n    time.sleep(60)", "timeouts", r"reward 'f' took longer than rewards.timeout = 0.4 s \(at mine.py:3\) and was stopped"),
    "locks": ("\n    re.match(r'(a+)+b', 'a' * 40)", "timeouts", r"reward 'f' took longer than rewards.timeout = 0.4 s \(at mine.py:3\)"),
    "exits": ("\n    os._exit(3)", "deaths", r"reward 'f' ended its own process \(exit code 3\)"),
    "crashes": ("\n    ctypes.string_at(0)", "deaths", r"reward 'f' ended its own process \(signal SIGSEGV at mine.py:3\)"),
    "kills": ("\n    os.kill(os.getpid(), 9)", "deaths", r"reward 'f' ended its own process \(signal SIGKILL\)"),
    "eats": ("\n    while True: eaten.append(b'x' * 2**22)", "deaths", r"reward 'f' held 0.\d\d GiB, more than rewards.memory = 0.1 GiB"),
    "forks_eater": ("\n    os.fork()\n    while True: eaten.append(b'x' * 2**22)", "deaths", "held 0.[1-9]"),
    "short": ("\n    return [1]", "invalid", "reward 'f' returned 1 values for 3 completions: return one value for each"),
    "number": ("\n    return 1.0", "invalid", "reward 'f' returned a float for 3 completions: return one value for each"),
    "nothing": ("\n    pass", "invalid", "reward 'f' returned a NoneType for 3 completions"),
    "word": ("\n    return 'abc'", "invalid", "reward 'f' returned a str for 3 completions"),
    "words": ("\n    return ['high', 'low', '1']", "invalid", "reward 'f' returned 'high' for completion 0 of 3: return a number or None"),
    "nans": ("\n    return [float('nan')] * 3", "invalid", "reward 'f' returned nan for completion 0 of 3: return None where"),
    "infinite": ("\n    return [float('inf')] * 3", "invalid", "reward 'f' returned inf for completion 0"),
}
HEAD = "import ctypes, os, re, sys, time; eaten = []\ndef f(completions):"


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_function(case: str, reward_file: Make, rollouts: Make, start: Make) -> None:
    body, counter, message = FAILING[case]
    reward_file(HEAD + body)
    reward_file("def steady(completions): return [1, 2, 3]", "good.py")
    limits: dict[str, Any] = {"timeout": 0.4} if counter == "timeouts" else {"memory": 0.1} if "eat" in case else {}
    with start("mine.py:f", "good.py:steady", **limits) as r:
        told = []
        for _ in range(2):
            scored = r.score(rollouts("abc"))
            assert all(math.isnan(s.rewards[0]) for s in scored), "a missing value, never a zero"
            assert [s.rewards[1] for s in scored] == [1, 2, 3], "the others lose nothing"
            report = r.report()
            health = report.rewards["f"]
            counts = {k: getattr(health, k) for k in ("errors", "timeouts", "deaths", "invalid")}
            assert counts == dict.fromkeys(counts, 0) | {counter: 3 if counter == "invalid" else 1}
            assert health.seconds > 0
            told.append(report.messages)
        (first,), second = told
        assert second == (), "said once, counted twice"
        assert "\n" not in first
        assert first.endswith(LATE)
        assert re.search(message, first), first


def test_one_bad_value_costs_one_value(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("def f(completions): return [1, 'x', float('nan'), None, 2]")
    with start("mine.py:f") as r:
        values = [s.rewards[0] for s in r.score(rollouts("abcde"))]
        assert [v for v in values if not math.isnan(v)] == [1, 2]
        report = r.report()
        assert report.rewards["f"].invalid == 2, "None is no failure"
        assert "'x' for completion 1 of 5" in report.messages[0]
        assert r.report().rewards["f"].invalid == 0, "a report starts the counts anew"


def test_a_failure_in_a_shared_process_costs_the_others_nothing(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("import os, time\ndef one(completions): return [1]\ndef dies(completions): os._exit(0)\n"
                "def hangs(completions): time.sleep(60)\ndef two(completions): return [2]")
    with start("mine.py:one", "mine.py:dies", "mine.py:hangs", "mine.py:two", workers=1, timeout=0.4) as r:
        for _ in range(2):
            values = r.score(rollouts("a"))[0].rewards
            assert (values[0], values[3]) == (1, 2)
            assert math.isnan(values[1])
            assert math.isnan(values[2])
        assert len(r.report().messages) == 2


def test_prints_go_to_the_log_and_never_into_the_answers(reward_file: Make, rollouts: Make, start: Make, tmp_path: Path) -> None:
    reward_file("""
        import os, subprocess, sys
        print("at import")
        def f(completions):
            print("x" * 2_000_000)
            sys.stderr.write("to stderr\\n")
            os.write(1, b"raw\\n")
            subprocess.run(["echo", "from a child"])
            return [1]
    """)
    with start("mine.py:f") as r:
        assert r.score(rollouts("a"))[0].rewards == (1.0,)
    log = (tmp_path / "log").read_text()
    assert all(said in log for said in ("at import", "x" * 2_000_000, "to stderr", "raw", "from a child"))


def test_the_log_has_the_traceback_once_and_stays_small(
    reward_file: Make, rollouts: Make, start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_LIMIT", 100_000)
    reward_file("def f(completions, answer):\n    if answer[0]: 1 / 0\n    while True: print('x' * 1000)")
    with start("mine.py:f", timeout=0.4) as r:
        for _ in range(3):
            r.score(rollouts("a", answer=[1]))
        assert (tmp_path / "log").read_text().count("ZeroDivisionError") == 1
        r.score(rollouts("a", answer=[0]))
        assert r.report().rewards["f"].timeouts == 1
    written = (tmp_path / "log").stat().st_size
    assert 0 < written < 200e6, "a function that prints for ever is cut every few hundredths of a second"


def test_children_of_a_function_end_with_it(
    reward_file: Make, rollouts: Make, start: Make, tmp_path: Path, lives: Make, soon: Make
) -> None:
    reward_file("""
        import os, time
        def child(file, group=False):
            pid = os.fork()
            if not pid:
                if group: os.setpgid(0, 0)
                while True: time.sleep(60)
            with open(file, "a") as out: print(pid, file=out)
            return pid
        def leaves_one(completions, file): child(file); return [1]
        def waits_for_one(completions, file): os.waitpid(child(file, group=True), 0)
        def dies_beside_one(completions, file): child(file); os._exit(7)
    """)
    names = ["leaves_one", "waits_for_one", "dies_beside_one"]

    def pids(name: str) -> list[int]:
        return [int(pid) for pid in (tmp_path / name).read_text().split()]

    with start(*({"function": f"mine.py:{n}", "args": {"file": str(tmp_path / n)}} for n in names), timeout=0.4) as r:
        values = r.score(rollouts("a"))[0].rewards
        assert values[0] == 1
        assert lives(pids("leaves_one")[0]), "not ours to end while its function does well"
        assert soon(lambda: not lives(pids("waits_for_one")[0]))
        assert soon(lambda: not lives(pids("dies_beside_one")[0]))
        health = r.report().rewards
        assert (health["waits_for_one"].timeouts, health["dies_beside_one"].deaths) == (1, 1)
    assert soon(lambda: not lives(pids("leaves_one")[0]))


def test_a_process_that_ends_between_calls_is_replaced(reward_file: Make, rollouts: Make, start: Make, soon: Make) -> None:
    reward_file("import os\ndef f(completions): return [os.getpid()]")
    with start("mine.py:f") as r:
        pid = int(r.score(rollouts("a"))[0].rewards[0])
        os.kill(pid, signal.SIGKILL)
        assert soon(lambda: not r._workers[0].alive)
        other = int(r.score(rollouts("a"))[0].rewards[0])
        assert other != pid
        assert r.report().messages == ()


def test_a_file_that_breaks_during_the_run_and_is_mended(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("import os\ndef f(completions, die): \n    if die[0]: os._exit(1)\n    return [1]")
    with start("mine.py:f") as r:
        r.score(rollouts("a", die=[True]))
        r.report()
        reward_file("def f(completions, die): return [2")
        for told in (1, 0):
            assert math.isnan(r.score(rollouts("a", die=[False]))[0].rewards[0])
            report = r.report()
            assert report.rewards["f"].errors == 1
            assert len(report.messages) == told
        assert r.report().messages == ()
        reward_file("def f(completions, die): return [3]")
        assert r.score(rollouts("a", die=[False]))[0].rewards == (3,)


def test_ctrl_c_during_a_call(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("import time\ndef f(completions, seconds): time.sleep(seconds[0]); return [seconds[0]]")
    with start("mine.py:f") as r:
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                r.score(rollouts("a", seconds=[3]))
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert r.score(rollouts("a", seconds=[0]))[0].rewards == (0,), "not the answer to the question before"


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)       # a run started in the background ignores Ctrl-C otherwise
from pathlib import Path
from localrl.batch import Prompt, Request, Rollout
from localrl.rewards import Rewards, RewardSettings
with Rewards(RewardSettings(functions=("mine.py:f", "mine.py:g")), Path(sys.argv[1])) as rewards:
    for worker in rewards._workers:
        print(worker.process.pid, flush=True)
    rewards.score([Rollout(Request(Prompt(0, (1,), "q")), (1,), "a", True, 0)])
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_workers_end_with_the_run(end: signal.Signals, reward_file: Make, tmp_path: Path, lives: Make, soon: Make) -> None:
    reward_file("""
        import os, re, time
        def f(completions):
            os.fork()
            open("busy", "w").close()
            re.match(r"(a+)+b", "a" * 60)       # holds the interpreter lock for years
        def g(completions): time.sleep(60)
    """)
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    path = os.pathsep.join([str(Path(process.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           env={**os.environ, "PYTHONPATH": path})
    assert run.stdout is not None
    leaders = [int(run.stdout.readline()) for _ in range(2)]
    deadline = time.monotonic() + 10
    while not (tmp_path / "busy").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    members = [member.pid for leader in leaders for member in sessions()[leader]]
    assert len(members) == 5, "two processes a worker and a child of a function's own"
    os.killpg(run.pid, end)
    _, said = run.communicate(timeout=10)
    assert soon(lambda: not any(lives(pid) for pid in members))
    assert said.count("Traceback") == (end == signal.SIGINT), "only the run itself has something to say"


def test_nothing_is_left_behind(reward_file: Make, rollouts: Make, start: Make, lives: Make) -> None:
    reward_file("import os\ndef f(completions, die):\n    if die[0]: os._exit(1)\n    return [1]")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with start("mine.py:f", "repetition_penalty") as r:
            leaders = [worker.process.pid for worker in r._workers]
            r.score(rollouts("a", die=[True]))
            r.score(rollouts("a", die=[False]))
            leaders += [worker.process.pid for worker in r._workers]
        assert not any(lives(pid) for pid in leaders)
        r.close()
    with pytest.raises(UserError):
        start("repetition_penalty", "nothing.py:f")
    assert len(os.listdir("/proc/self/fd")) == before
