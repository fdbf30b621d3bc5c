"""`Rewards`: which functions it finds, what they are given, what comes back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from localrl.rewards import Rewards, RewardSettings
from localrl.settings import UserError

Make = Callable[..., Any]


def test_keyword_arguments_are_trls(reward_file: Make, rollouts: Make, start: Make, tmp_path: Path) -> None:
    reward_file("""
        import json
        def spy(**kwargs):
            with open(kwargs.pop("file"), "w") as file: json.dump(kwargs, file)
            return [1, 2]
    """)
    told = tmp_path / "told.json"
    with start({"function": "mine.py:spy", "args": {"file": str(told), "kind": "fixed"}}) as r:
        made = rollouts(["a", "bc"], chat=True, answer=["x", None], kind=["from", "data"])
        scored = r.score(made)
        assert [s.rewards for s in scored] == [(1.0,), (2.0,)]
        assert [s.tokens for s in scored] == [m.tokens for m in made]
        assert json.loads(told.read_text()) == {
            "prompts": [[{"role": "user", "content": "question 0"}], [{"role": "user", "content": "question 1"}]],
            "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "bc"}]],
            "completion_ids": [[97], [98, 99]],
            "done": [True, False],
            "answer": ["x", None],
            "kind": "fixed",
        }
        r.score(rollouts(["a", "bc"]))
        assert json.loads(told.read_text()) == {
            "prompts": ["question 0", "question 1"], "completions": ["a", "bc"], "completion_ids": [[97], [98, 99]],
            "done": [True, False], "kind": "fixed",
        }


def test_functions_get_only_what_they_name(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("""
        def right(completions, answer, bonus=0): return [float(c == a) + bonus for c, a in zip(completions, answer)]
        def ended(*, done): return done
        def length(completion_ids, **kwargs): return (len(ids) for ids in completion_ids)
    """)
    more = {"function": "mine.py:right", "args": {"bonus": 2}, "name": "more", "weight": -0.5}
    with start("mine.py:right", more, "mine.py:ended", "mine.py:length") as r:
        assert r.names == ("right", "more", "ended", "length")
        assert r.weights == (1.0, -0.5, 1.0, 1.0)
        scored = r.score(rollouts(["a", "bc"], answer=["a", "z"], other=[1, 2]))
        assert [s.rewards for s in scored] == [(1.0, 3.0, 1.0, 1.0), (0.0, 2.0, 0.0, 2.0)]
        assert r.report().messages == ()
        assert r.score([]) == []


def test_none_does_not_apply_and_is_no_failure(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("def some(completions): return [None, 1, True]")
    with start("mine.py:some") as r:
        values = [s.rewards[0] for s in r.score(rollouts("abc"))]
        assert math.isnan(values[0])
        assert values[1:] == [1.0, 1.0]
        report = r.report()
    assert report.messages == ()
    assert {k: v for k, v in report.metrics().items() if v} == {"rewards/some/seconds": report.rewards["some"].seconds}


def test_async_functions_keep_one_loop_for_life(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("""
        import asyncio
        loops = set()
        async def one(c): await asyncio.sleep(0.1); return len(c)
        async def waits(completions, **kwargs):
            loops.add(id(asyncio.get_running_loop()))
            return [sum(await asyncio.gather(*map(one, completions))), len(loops)]
    """)
    with start("mine.py:waits") as r:
        for _ in range(2):
            assert [s.rewards[0] for s in r.score(rollouts(["ab", "c"]))] == [3.0, 1.0]


def test_functions_run_at_the_same_time(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("import time\ndef slow(completions): time.sleep(0.5); return [1]")
    with start(*({"function": "mine.py:slow", "name": f"slow{n}"} for n in range(4))) as r:
        begin = time.monotonic()
        assert r.score(rollouts("a"))[0].rewards == (1.0,) * 4
        assert time.monotonic() - begin < 1.5, "one after another would take two seconds"
        assert all(0.5 <= health.seconds < 1.0 for health in r.report().rewards.values())


def test_several_functions_in_one_process(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("import os\ndef process(completions): return [os.getpid()]")
    functions = [{"function": "mine.py:process", "name": name} for name in "abcde"]
    for workers, distinct in ((1, 1), (2, 2), (64, 5)):
        with start(*functions, workers=workers) as r:
            pids = r.score(rollouts("x"))[0].rewards
            assert len(set(pids)) == distinct
            assert pids == r.score(rollouts("x"))[0].rewards, "a process serves many calls"


def test_megabytes_both_ways(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("def size(completions, completion_ids): return [len(c) / 3 for c in completions]")
    texts = ["x" * 100_000, *["é\x00\ud800" * 5] * 10_000]
    with start("mine.py:size", timeout=20) as r:
        assert [s.rewards[0] for s in r.score(rollouts(texts))] == [len(text) / 3 for text in texts]


def test_a_worker_pays_for_neither_torch_nor_pydantic(reward_file: Make, rollouts: Make, start: Make) -> None:
    reward_file("import sys\ndef heavy(completions): return [len({'torch', 'pydantic', 'numpy', 'asyncio'} & sys.modules.keys())]")
    with start("mine.py:heavy") as r:
        assert r.score(rollouts("a"))[0].rewards == (0.0,)


BUILTIN = [
    ({"function": "exact_answer"}, "4", 1), ({"function": "numeric_answer", "args": {"column": "n"}}, "is 4.0", 1),
    ({"function": "math_answer"}, r"\boxed{\frac{8}{2}}", 1), ({"function": "regex", "args": {"pattern": r"\d"}}, "4", 1),
    ({"function": "tagged_format", "args": {"partial": True}}, "<think>a</think>", 0.25), ({"function": "json_schema"}, "4", 1),
    ({"function": "length_target", "args": {"target": 2, "limit": 10}}, "123456", 0.5),
    ({"function": "overlong_penalty", "args": {"limit": 10, "cache": 4}}, "12345678", -0.5),
    ({"function": "repetition_penalty", "args": {"ngram": 1}}, "4444", -0.75),
]


def test_every_builtin_in_its_process(rollouts: Make, start: Make) -> None:
    with start(*(spec for spec, _, _ in BUILTIN)) as r:
        r.check_columns({"answer", "n"})
        for chat in (False, True):
            # Columns that are called like a built-in's parameters must not become its arguments.
            scored = r.score(rollouts([t for _, t, _ in BUILTIN], chat, answer=["4"] * 9, n=[4] * 9, tag=["x"] * 9, target=[0] * 9))
            assert [s.rewards[at] for at, s in enumerate(scored)] == [value for _, _, value in BUILTIN]
        assert r.report().messages == ()


def test_where_functions_are_found(reward_file: Make, rollouts: Make, start: Make, tmp_path: Path) -> None:
    reward_file("from neighbour import VALUE\ndef one(completions): return [VALUE]", "sub/mine.py")
    reward_file("VALUE = 1", "sub/neighbour.py")
    reward_file("def two(completions): return [2]", "sub/package_like.py")
    reward_file("def json(completions): return [3]", "json.py")
    reward_file("class Judge:\n    def __call__(self, completions): return [4]\njudge = Judge()", "judges.py")
    functions = ("sub/mine.py:one", "sub.package_like.two", "sub.package_like:two", "json.py:json", str(tmp_path / "judges.py:judge"))
    named = [{"function": function, "name": f"n{at}"} for at, function in enumerate(functions)]
    with start(*named) as r:
        assert r.score(rollouts("a"))[0].rewards == (1, 2, 2, 3, 4)
    with start(*named, workers=1) as r:
        assert r.score(rollouts("a"))[0].rewards == (1, 2, 2, 3, 4)


UNUSABLE = {
    "exact_anwser": "reward 'exact_anwser': there is no built-in reward 'exact_anwser' .*did you mean 'exact_answer'?",
    "nowhere.py:f": "reward 'f': there is no file .*/nowhere.py$",
    "mine.py": "'mine.py' names a file but no function: write mine.py:function",
    "mine.py:goood": "mine.py has no function 'goood': did you mean 'good'?",
    "mine.py:zzz": "mine.py has no function 'zzz': known: good, ",
    "mine.py:CONSTANT": "'CONSTANT' in mine.py is a int, not a function",
    "mine.py:Class": "'Class' in mine.py is a class, not a function",
    "mine.py:position": "'position': takes 'completions' by position only",
    "broken.py:f": r"broken.py cannot be imported: SyntaxError: .* \(broken.py:2\)",
    "raises.py:f": r"raises.py cannot be imported: ZeroDivisionError: division by zero \(raises.py:3\)",
    "exits.py:f": r"exits.py cannot be imported: SystemExit: 3 \(exits.py:1\)",
    "dies.py:f": r"reward 'f' ended its own process \(exit code 3\) while it was imported",
    "hangs.py:f": r"reward 'f' took longer than rewards.start_timeout = 0.5 s to import \(at hangs.py:2\)",
    "no.such.module.f": "no.such.module cannot be imported: ModuleNotFoundError: No module named 'no'",
}


@pytest.mark.parametrize("function", UNUSABLE)
def test_an_unusable_function_is_one_sentence(function: str, reward_file: Make, start: Make) -> None:
    reward_file("CONSTANT = 3\nclass Class: pass\ndef good(completions): return [1]\ndef position(completions, /): return [1]")
    reward_file("def f(completions):\n    return [", "broken.py")
    reward_file("\n\n1 / 0", "raises.py")
    reward_file("raise SystemExit(3)", "exits.py")
    reward_file("import os\nos._exit(3)", "dies.py")
    reward_file("import time\ntime.sleep(60)", "hangs.py")
    with pytest.raises(UserError, match=UNUSABLE[function]) as error:
        start(function, start_timeout=0.5 if "hangs" in function else 20)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"function": "regex"}, "reward 'regex': needs the argument 'pattern': give it in args"),
        ({"function": "regex", "args": {"patern": "a"}}, "has no argument 'patern': did you mean 'pattern'?"),
        ({"function": "regex", "args": {"pattern": "("}}, r"refuses its arguments: pattern '\(' is no regular expression"),
        ({"function": "length_target", "args": {"target": 9, "limit": 3}}, "target = 9 and limit = 3 must satisfy"),
        ({"function": "length_target", "args": {"target": "a", "limit": 3}}, "refuses its arguments: '<=' not supported"),
        ({"function": "exact_answer", "args": {"completions": []}}, "cannot have 'completions' fixed"),
        ({"function": "mine.py:own", "args": {"bonus": 1}}, "has no argument 'bonus'"),
        ({"function": "mine.py:own", "args": {"scale": {1, 2}}}, "the args of reward 'own' must be plain values"),
    ],
)
def test_wrong_arguments_are_one_sentence(spec: dict[str, Any], sentence: str, reward_file: Make, start: Make) -> None:
    reward_file("def own(completions, scale=1): return [1]")
    with pytest.raises(UserError, match=sentence):
        start(spec)


@pytest.mark.parametrize(("function", "module", "extra"), [("math_answer", "math_verify", "math"), ("json_schema", "jsonschema", "json")])
def test_a_missing_package_names_its_extra(
    function: str, module: str, extra: str, start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('as if it were not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf'{function} needs .*: pip install "localrl\[{extra}\]"'):
        start(function)


def test_columns_are_checked(reward_file: Make, start: Make) -> None:
    reward_file("def own(completions, solution, extra=None, **kwargs): return [1]")
    with start("mine.py:own", {"function": "exact_answer", "args": {"column": "gold"}}) as r:
        r.check_columns({"solution", "gold"})
        with pytest.raises(UserError, match="reward 'own' needs the column 'solution', which the data lack: they have answer, gold"):
            r.check_columns({"gold", "answer"})
        with pytest.raises(UserError, match="reward 'exact_answer' needs the column 'gold', which the data lack: they have solution"):
            r.check_columns(["solution"])
        with pytest.raises(UserError, match="they have none but the prompt"):
            r.check_columns([])
        with pytest.raises(UserError, match="the column 'done' has a name that reward functions use otherwise"):
            r.check_columns({"solution", "gold", "done"})


def test_a_column_that_is_not_plain_is_one_sentence(start: Make, rollouts: Make) -> None:
    with start("exact_answer") as r, pytest.raises(UserError, match=r"a column for reward 'exact_answer' holds a value .* type bytes"):
        r.score(rollouts("a", answer=[b"x"]))


def test_settings() -> None:
    assert RewardSettings.model_validate({"functions": ["regex"]}).functions[0].weight == 1.0
    with pytest.raises(ValidationError, match="two rewards are called 'f': give one of them a name"):
        RewardSettings.model_validate({"functions": ["a.py:f", "b.f"]})
    with pytest.raises(UserError, match="there are no rewards"):
        Rewards(RewardSettings(), Path())
    for wrong in ({"timeout": 0}, {"memory": 0}, {"workers": 0}, {"functions": [{"function": "f", "name": "a b"}]}, {"colour": 1}):
        with pytest.raises(ValidationError):
            RewardSettings.model_validate(wrong)


@pytest.mark.parametrize("name", ["Health", "Report", "RewardSettings", "RewardSpec", "Rewards"])
def test_every_setting_and_name_is_documented(name: str) -> None:
    import localrl.rewards

    thing = getattr(localrl.rewards, name)
    assert thing.__doc__
    assert all(field.description for field in getattr(thing, "model_fields", {}).values())
    with pytest.raises(AttributeError, match="no attribute 'Reward'"):
        _ = localrl.rewards.Reward
