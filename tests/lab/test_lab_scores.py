"""Bad rewards, run for real: each costs its own values and gets a sentence, the others keep theirs."""

from __future__ import annotations

import math
import time
from pathlib import Path

import psutil
import pytest

from localrl.lab.samples import Samples, pasted
from localrl.lab.score import Scored, hollow, probes, score, score_probes
from localrl.rewards import RewardSettings
from localrl.settings import UserError

BAD = """
import os, sys, time

def fine(completions, **kwargs):
    return [float(len(c)) for c in completions]

def never(completions, **kwargs):
    while True:
        time.sleep(0.05)

def raises(completions, **kwargs):
    raise RuntimeError("no such thing")

def shouts(completions, **kwargs):
    for _ in range(100):
        print("x" * 2**20)
    return [1.0] * len(completions)

def forks(completions, **kwargs):
    if (child := os.fork()) == 0:
        time.sleep(600)
    open("child", "w").write(str(child))
    return [2.0] * len(completions)

def writes(completions, **kwargs):
    open("written-by-a-reward.txt", "w").write("hello")
    return [3.0] * len(completions)

def short(completions, **kwargs):
    return [1.0]

def eats(completions, **kwargs):
    kept = []
    while True:
        kept.append(bytearray(os.urandom(2**20) * 16))

def dies(completions, **kwargs):
    os._exit(3)

def wants(completions, colour, **kwargs):
    return [1.0] * len(completions)
"""


class Words:
    """A tokenizer that needs no file."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the rewards above, worked in."""
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = '{"prompt": "one", "completions": ["a", "bb"], "answer": "bb"}\n{"prompt": "two", "completions": ["ccc"], "answer": "no"}'


def tried(folder: Path, *names: str, **more: object) -> Scored:
    samples = pasted(GIVEN, Words(), 8)
    functions = [{"function": f"bad.py:{name}"} if name != "exact_answer" else {"function": name} for name in names]
    settings = RewardSettings.model_validate({"functions": functions, "timeout": 20, "workers": 2, **more})
    return score(samples.rollouts, samples.columns, settings, folder, folder / "rewards.log")


def values(scored: Scored, at: int) -> list[float]:
    return [r.rewards[at] for r in scored.rollouts]


@pytest.mark.parametrize(
    ("name", "said", "more"),
    [
        ("never", "took longer than rewards.timeout = 1 s", {"timeout": 1}), ("raises", "no such thing", {}), ("short", "1", {}), ("dies", "3", {}),
        ("eats", "rewards.memory = 0.25 GiB", {"memory": 0.25}),
    ],
)  # fmt: skip
def test_a_bad_reward_is_said_and_the_others_keep_their_values(bad: Path, name: str, said: str, more: dict[str, object]) -> None:
    scored = tried(bad, name, "fine", **more)
    assert all(map(math.isnan, values(scored, 0)))
    assert values(scored, 1) == [1, 2, 3]
    assert said in scored.troubles[f"{name}"]
    assert scored.troubles.keys() == {name}


def test_what_shouts_forks_or_writes_only_costs_what_it_does(bad: Path) -> None:
    scored = tried(bad, "shouts", "forks", "writes", "fine")
    assert [values(scored, at)[0] for at in range(4)] == [1, 2, 3, 1]
    assert not scored.troubles
    assert (bad / "rewards.log").stat().st_size < 2**26
    child = int((bad / "child").read_text())
    until = time.monotonic() + 10                                    # a signal takes its time on a busy machine
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_reward_that_cannot_be_called_is_left_out_with_what_depends_on_it(bad: Path) -> None:
    samples = pasted(GIVEN, Words(), 8)
    functions = [{"function": "bad.py:wants"}, {"function": "bad.py:fine"}, {"function": "nowhere.py:f", "name": "lost"},
                 {"function": "exact_answer", "name": "right", "given": "wants"}]  # fmt: skip
    scored = score(samples.rollouts, samples.columns, RewardSettings.model_validate({"functions": functions}), bad, None)
    assert "needs the column 'colour'" in scored.troubles["wants"]
    assert scored.troubles.keys() == {"wants", "lost", "right"}
    assert "given 'wants'" in scored.troubles["right"]
    assert values(scored, 1) == [1, 2, 3]


def test_probes_skip_what_failed_and_reach_the_rest(bad: Path) -> None:
    samples = pasted(GIVEN, Words(), 8)
    settings = RewardSettings.model_validate({"functions": ["bad.py:raises", "bad.py:fine", "exact_answer"]})
    scored = score(samples.rollouts, samples.columns, settings, bad, None)
    fakes = score_probes(samples, scored, settings, bad, None, Words())
    assert len(fakes) == 5
    assert [r.rewards[1:] for r in fakes["nothing at all"]] == [(0, 0), (0, 0)]
    assert all(math.isnan(r.rewards[0]) for rows in fakes.values() for r in rows)
    assert fakes["echo of the prompt"][1].text == "two"


def test_probes_are_no_longer_than_a_response_may_be() -> None:
    made = probes(pasted('{"prompt": "p", "completion": "<answer>4</answer>"}', Words(), 5), Words())
    assert len(made["very long"][0].tokens) == 5 and not made["very long"][0].done
    assert made["the form without content"][0].text == hollow("<answer>4</answer>") == "<answer>x</answer>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing to score"), ("{", "no JSON"), ('{"completions": ["a"]}', "line 1"), ('{"prompt": 3, "completions": ["a"]}', '"prompt" must be'),
        ('{"prompt": "p", "completions": []}', "at least one"), ('{"prompt": "p", "completions": [3]}', "list of texts"), ("[" * 100000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_pasted_wrongly_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        pasted(text, Words(), 8)


def test_chats_and_lists_can_be_pasted() -> None:
    found: Samples = pasted('[{"prompt": [{"role": "user", "content": "q"}], "completion": "a", "n": 1}]', Words(), 8)
    assert found.columns == {"n"}
    assert found.rollouts[0].tokens == (1,)
