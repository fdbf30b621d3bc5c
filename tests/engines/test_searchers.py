"""Searchers are real processes: what they sample is what the trainer's own engine would, and none of them outlives its trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from localrl.batch import Prompt, Request, Rollout, collate
from localrl.config import Run
from localrl.engines.searchers import Searchers
from localrl.engines.torch import TorchEngine
from localrl.policy.policy import Policy
from localrl.settings import UserError
from tests.policy.test_policy import a_policy, a_run

STEP = 8
"""Requests of one step: two prompts, four rollouts each."""


def run_of(model: Path, **sections: Any) -> Run:
    values: dict[str, Any] = {
        "algorithm": {"name": "tba"}, "replay": {"capacity": 100, "sync_every": 2}, "search": {"processes": 2, "ahead": 2},
        "rollout": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 12, "temperature": 0.8},
    }  # fmt: skip
    return a_run(model, **{name: {**values.get(name, {}), **sections.get(name, {})} for name in values | sections})


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What a person was told."""
    return []


@pytest.fixture(scope="module")
def searchers(make_model: Callable[..., Path], one_thread: None, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searchers]:
    log = tmp_path_factory.mktemp("searchers") / "search.log"
    with Searchers(run_of(make_model()), concurrent=5, with_reference=True, say=said.append, log=log) as searchers:
        yield searchers


@pytest.fixture(scope="module")
def policy(searchers: Searchers) -> Policy:
    return a_policy(searchers.run, perturbed=False)


def perturb(policy: Policy, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)


fresh = iter(range(10**6))


def ask(prompts: int = 2, samples: int = 4) -> list[Request]:
    """Of prompts that were never asked before. Their columns could not travel."""
    return [Request(Prompt(n, tuple(b"say %d" % n), "", {"own": object()}), i) for n in (next(fresh) for _ in range(prompts)) for i in range(samples)]


def rest(searchers: Searchers, version: int) -> list[Rollout]:
    """All that is under way or ready."""
    found = []
    while more := searchers.generate([], version):
        found += more
    return found


def sampled_here(policy: Policy, requests: list[Request], version: int) -> dict[tuple[int, int], Rollout]:
    settings = policy.run.rollout.model_copy(update={"concurrent": 5})
    return {key(r): r for r in TorchEngine(policy.model, policy.tokenizer, settings, policy.run.seed).generate(requests, version)}


def key(rollout: Rollout) -> tuple[int, int]:
    return rollout.request.prompt.id, rollout.request.sample


def check(found: list[Rollout], requests: list[Request], policy: Policy, version: int) -> None:
    """Each request is answered once, as the trainer's own engine answers it."""
    own = sampled_here(policy, requests, version)
    assert sorted(map(key, found)) == sorted(own)
    asked = {id(request) for request in requests}
    for r in found:
        mine = own[key(r)]
        assert id(r.request) in asked, "the very request, columns and all"
        assert (r.tokens, r.text, r.done, r.version, r.more) == (mine.tokens, mine.text, mine.done, version, mine.more)
        assert r.logp == pytest.approx(mine.logp, abs=1e-5)


def in_whole_groups(found: list[Rollout], size: int = 4) -> bool:
    counts = [sum(r.request.prompt.id == n for r in found) for n in {r.request.prompt.id for r in found}]
    return all(count % size == 0 for count in counts)


@contextmanager
def standing_still(searchers: Searchers) -> Iterator[None]:
    """No searcher runs meanwhile."""
    pids = [p.process.pid for p in searchers._processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def running(pids: list[int]) -> list[int]:
    """Of these, the ones that still are processes and no zombies."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    return [pid for pid in pids if state(pid) not in ("Z", "gone")]


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


# -- what is sampled --------------------------------------------------------------------------------------------------------


def test_rollouts_are_those_of_the_learning_weights_of_their_version(searchers: Searchers, policy: Policy) -> None:
    perturb(policy, 1)                                               # a resumed run does not start at the fresh adapter
    searchers.follow(policy.save_adapter, 0)
    first = ask(6)
    found = searchers.generate(first, 0)                             # more than is allowed under way: some come at once
    assert len(found) >= len(first) - 2 * STEP
    assert in_whole_groups(found)
    found += rest(searchers, 0)
    check(found, first, policy, 0)
    batch = collate(found, (), 12)
    ref = policy.read_whole(batch, {"ref"}, [torch.arange(len(found))]).ref
    torch.testing.assert_close(batch.ref, ref, atol=1e-5, rtol=0)
    assert batch.ref is not None
    assert batch.sampler is not None
    assert not torch.allclose(batch.ref[batch.mask], batch.sampler[batch.mask], atol=1e-3), "the adapter says something"

    perturb(policy, 2)
    searchers.follow(policy.save_adapter, 1)                         # sync_every = 2: not yet
    between = ask()
    searchers.generate(between, 1)
    assert {r.version for r in rest(searchers, 1)} == {0}
    searchers.follow(policy.save_adapter, 2)
    later = ask(4)
    found = searchers.generate(later, 2) + rest(searchers, 3)
    check(found, later, policy, 2)
    metrics = searchers.metrics()
    assert metrics["rollout/staleness_mean"] == 1
    assert metrics["rollout/searchers_alive"] == 2
    assert metrics["rollout/under_way"] == metrics["rollout/restarts"] == 0
    assert 0 < metrics["rollout/searcher_busy_share"] <= 1


def test_new_weights_are_taken_between_two_shares(searchers: Searchers, policy: Policy) -> None:
    """What was handed out before them is sampled after them, if it had not begun; their folders go when they have been read."""
    perturb(policy, 3)
    searchers.follow(policy.save_adapter, 4)
    begun, waiting = ask(), ask()
    with standing_still(searchers):
        assert searchers.generate(begun, 4) == searchers.generate(waiting, 4) == []
        for version in (6, 8):
            perturb(policy, version)
            searchers.follow(policy.save_adapter, version)
        folders = [path for path in searchers.folder.iterdir() if path.is_dir()]
        assert len(folders) >= 2
        assert all(sorted(p.suffix for p in folder.iterdir() if "adapter_model" in p.name) == [".safetensors"] for folder in folders)
    found = rest(searchers, 8)
    check([r for r in found if r.request in waiting], waiting, policy, 8)
    assert len(found) == len(begun) + len(waiting)
    assert soon(lambda: searchers.generate([], 8) == [] and len([path for path in searchers.folder.iterdir() if path.is_dir()]) == 1)


# -- waiting ----------------------------------------------------------------------------------------------------------------


def test_the_trainer_waits_only_for_too_much_and_hears_ctrl_c(searchers: Searchers, policy: Policy) -> None:
    searchers.follow(policy.save_adapter, 10)
    asked = [ask(), ask(), ask()]
    with standing_still(searchers):
        assert searchers.generate(asked[0], 10) == []                # one step's worth, then two: search.ahead allows both
        assert searchers.generate(asked[1], 10) == []
        assert searchers.metrics()["rollout/under_way"] == 2 * STEP
        for requests in (asked[2], []):
            interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            interrupt.start()
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                searchers.generate(requests, 10)
            interrupt.cancel()
            assert 0.15 < time.monotonic() - start < 1
    assert len(rest(searchers, 10)) == 3 * STEP


def test_evaluation_settings_are_refused(searchers: Searchers) -> None:
    with pytest.raises(RuntimeError, match="evaluation"):
        searchers.generate(ask(), 0, settings=searchers.run.rollout)


# -- death ------------------------------------------------------------------------------------------------------------------


def test_a_killed_searcher_is_started_again_and_nothing_is_lost(searchers: Searchers, policy: Policy, said: list[str]) -> None:
    perturb(policy, 12)
    searchers.follow(policy.save_adapter, 12)
    requests = ask(4)
    with standing_still(searchers):
        searchers.generate(requests, 12)
        victim = searchers._processes[0]
        assert victim.shares
        os.kill(victim.process.pid, signal.SIGKILL)
    check(rest(searchers, 12), requests, policy, 12)
    assert searchers.metrics()["rollout/restarts"] == 1
    assert said == ["searcher 1 ended (signal SIGKILL) and is started again (1 of search.restarts = 3), what it had not answered is asked again"]
    while not all(p.ready for p in searchers._processes):            # the new one samples the newest weights too
        searchers._wait()
        searchers._turn()
    more = ask(4)
    check(searchers.generate(more, 12) + rest(searchers, 12), more, policy, 12)
    assert searchers.metrics()["rollout/searchers_alive"] == 2


def die_again_and_again(searchers: Searchers) -> None:
    """Whoever is started again is killed at once."""
    while True:
        known = {p.process.pid for p in searchers._processes}
        searchers._wait()
        searchers._turn()
        for process in searchers._processes:
            if process.process.pid not in known:
                os.kill(process.process.pid, signal.SIGKILL)


def test_too_many_deaths_end_the_run_and_close_leaves_nothing(searchers: Searchers) -> None:
    """Uses the searchers up: the last test that has them."""
    searchers._processes[1].send({"nonsense": 1})                    # a bug of ours: the process ends with a traceback
    with pytest.raises(UserError, match=r"^searcher 2 ended \(signal SIGKILL\), and search\.restarts = 3 allows .*; its last words: .*KeyError") as error:
        die_again_and_again(searchers)
    assert "\n" not in str(error.value)
    assert searchers.metrics()["rollout/restarts"] == 3
    pids = [p.process.pid for p in searchers._processes]
    assert searchers.folder.exists()
    searchers.close()
    searchers.close()                                                # once more is harmless
    assert not running(pids)
    assert not searchers.folder.exists()
    with pytest.raises(RuntimeError, match="closed"):
        searchers.generate([], 0)


def test_a_searcher_that_cannot_start_says_why(make_model: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of(tmp_path / "nowhere", search={"processes": 1})
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("localrl-search-*"))
    with pytest.raises(UserError, match=r"nowhere.*no such folder"):
        Searchers(run, concurrent=4, with_reference=False, say=print)
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("localrl-search-*")) <= before


PARENT = """
import os, sys, tomllib
from pathlib import Path
from localrl.batch import Prompt, Request
from localrl.config import Run
from localrl.engines.searchers import Searchers

run = Run.model_validate(tomllib.loads(Path(sys.argv[1]).read_text()))
searchers = Searchers(run, concurrent=8, with_reference=False, say=print)
searchers.generate([Request(Prompt(n, (1, 2), ""), i) for n in range(2) for i in range(4)], 0)
print(searchers.folder, *[p.process.pid for p in searchers._processes], flush=True)
sys.stdin.read()
"""


def test_no_searcher_outlives_a_killed_trainer(make_model: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of(make_model(), rollout={"max_completion_length": 400, "prompts_per_step": 2}, search={"processes": 1})
    (tmp_path / "run.toml").write_text(run.dump())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "run.toml")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        folder, *numbers = parent.stdout.readline().split()
        pids = list(map(int, numbers))
        assert running(pids) == pids
        assert Path(folder).exists()
        parent.kill()
        assert soon(lambda: not running(pids))
        assert soon(lambda: not Path(folder).exists())
