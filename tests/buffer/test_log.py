"""Learning from logs: what can be read, and a sentence for what cannot."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrl.batch import Prompt, Request, Rollout
from localrl.buffer import LogBuffer, read_log, without_log_columns
from localrl.data import DataSettings, load_prompts
from localrl.evaluate import completion_rows
from localrl.folder import RunFolder
from localrl.settings import UserError
from tests.buffer.rollouts import goes_on_alike, rollout, settings
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def rows(*columns: dict[str, Any]) -> list[Prompt]:
    return [Prompt(i, (row.pop("prompt", 1),), "", row) for i, row in enumerate(columns)]


def test_rows_become_rollouts() -> None:
    log = read_log(rows(
        {"prompt": 1, "response": "ab", "rewards": {"right": 1, "short": None}},
        {"prompt": 2, "completion": "abc", "done": False, "rewards": {"right": 0.5}},
        {"prompt": 1, "response": "c", "reward": -1},
        {"prompt": 3, "completion": "", "done": True, "rewards": {"short": True}, "response": None},
    ), TOKENIZER, END, 8)  # fmt: skip
    assert log.names == ("right", "short", "reward") and log.notes == []
    a, b, c = (TOKENIZER.convert_tokens_to_ids(x) for x in "abc")
    assert [r.tokens for r in log.rollouts] == [(a, b, END), (a, b, c), (c, END), (END,)]
    assert [r.done for r in log.rollouts] == [True, False, True, True]
    assert repr([r.rewards for r in log.rollouts]) == "[(1.0, nan, nan), (0.5, nan, nan), (nan, nan, -1.0), (nan, 1.0, nan)]"
    assert [(r.request.prompt.id, r.request.sample) for r in log.rollouts] == [(0, 0), (1, 0), (0, 1), (3, 0)]
    assert log.rollouts[2].request.prompt is log.rollouts[0].request.prompt
    assert all(r.logp is None and not r.more for r in log.rollouts)


def test_the_order_of_training_does_not_matter() -> None:
    data = rows(*({"prompt": i % 3, "response": f"{i}", "reward": i} for i in range(9)))
    assert read_log(data[::-1], TOKENIZER, END, 8) == read_log(data, TOKENIZER, END, 8)


def test_what_is_cut_or_left_out_is_told() -> None:
    log = read_log(rows(
        {"response": "abcd", "reward": 1}, {"response": "abc", "reward": 1}, {"response": "abcdef", "reward": None, "done": "false"},
        {"response": "x", "rewards": [math.nan, 2.0]},
    ), TOKENIZER, END, 4)  # fmt: skip
    assert [(len(r.tokens), r.done) for r in log.rollouts] == [(4, False), (4, True), (2, True)]
    assert len(log.notes) == 2 and "1 of 4 rows" in log.notes[0] and "1 of 3 responses" in log.notes[1]
    assert log.names == ("reward", "reward_1", "reward_2")


def test_an_end_that_the_log_spells_out_is_not_doubled() -> None:
    assert read_log(rows({"response": "a<|im_end|>", "reward": 1}), TOKENIZER, END, 9).rollouts[0].tokens[1:] == (END,)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"reward": 1}, "nothing in column response"),
        ({"response": ["a"], "reward": 1}, r'list \["a"\] in column response'),
        ({"response": "", "reward": 1}, "response is empty"),
        ({"response": "", "reward": 1, "done": False}, "response is empty"),
        ({"response": "\ud800", "reward": 1}, "not valid Unicode"),
        ({"response": "a"}, "no reward"),
        ({"response": "a", "rewards": {}}, "no reward"),
        ({"response": "a", "rewards": 3}, "no reward"),
        ({"response": "a", "reward": "good"}, r"the reward 'reward' is str \"good\""),
        ({"response": "a", "rewards": {"right": [1]}}, "the reward 'right' is list"),
        ({"response": "a", "rewards": {"right": math.inf}}, "the reward 'right' is infinite"),
        ({"response": "a", "reward": 1, "done": "perhaps"}, "done is str"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"row 2 of the log.*{says}"):
        read_log(rows({"response": "fine", "reward": 1}, row), TOKENIZER, END, 8)


def test_a_log_without_any_reward_is_refused() -> None:
    with pytest.raises(UserError, match="none of the log's 2 rows has a reward"):
        read_log(rows({"response": "a", "reward": None}, {"response": "b", "reward": ""}), TOKENIZER, END, 8)


def test_a_runs_own_completions_are_such_a_log(tmp_path: Path) -> None:
    chat = Prompt(4, (1,), [{"role": "user", "content": "two?"}])
    text = "2"
    ids = tuple(TOKENIZER([text], add_special_tokens=False)["input_ids"][0])
    written = [
        Rollout(Request(chat, 0), (*ids, END), text, True, 3, rewards=(1.0, math.nan)),
        Rollout(Request(chat, 1), (END,), "", True, 3, rewards=(0.0, 0.5)),
        Rollout(Request(chat, 2), ids * 3, text * 3, False, 3, rewards=(0.0, 0.5)),
    ]
    folder = RunFolder(tmp_path)
    folder.write_completions(3, completion_rows(written, ("right", "short"), (1.0, 1.0)))
    [file] = (tmp_path / "completions").glob("step-*.jsonl")
    data = load_prompts(DataSettings(path=file.name, holdout=0, from_log=True), TOKENIZER, 0, file.parent)
    log = read_log(data.train, TOKENIZER, END, 8)
    assert log.names == ("right", "short") and log.notes == []
    assert repr([(r.tokens, r.text, r.done, r.rewards) for r in log.rollouts]) == repr([(r.tokens, r.text, r.done, r.rewards) for r in written])
    assert len({r.request.prompt.id for r in log.rollouts}) == 1
    bare = without_log_columns(data)
    assert set(bare.columns) == set(bare.train[0].columns) == {"prompt_id", "sample", "tokens"}
    assert [(p.id, p.tokens, p.content) for p in bare.train] == [(p.id, p.tokens, p.content) for p in data.train]


def small_log(sizes: list[int]) -> list[Rollout]:
    return [rollout(prompt, [row], sample=row) for prompt, size in enumerate(sizes) for row in range(size)]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), prompts=st.integers(1, 8), group=st.integers(1, 4))
def test_a_step_has_different_prompts_and_different_rows(sizes: list[int], prompts: int, group: int) -> None:
    buffer = LogBuffer(small_log(sizes), settings(prompts, group), 0, True, 1)
    for step in range(3):
        assert buffer.requests(step) == [] and buffer.ready
        drawn = buffer.draw(step)
        counts = Counter(r.request.prompt.id for r in drawn)
        assert len(counts) == min(prompts, len(sizes))
        assert all(count == min(group, sizes[prompt]) for prompt, count in counts.items())
        assert len({(r.request.prompt.id, r.request.sample) for r in drawn}) == len(drawn)


def test_in_time_every_row_is_drawn() -> None:
    buffer = LogBuffer(small_log([5, 5]), settings(1, 2), 0, True, 2)
    assert len({(r.request.prompt.id, r.request.sample) for step in range(40) for r in buffer.draw(step)}) == 10
    assert buffer.metrics()["buffer/epoch"] == 20


def test_single_responses_cannot_be_compared() -> None:
    buffer = LogBuffer(small_log([1, 3, 1]), settings(2, 2), 0, True, 2)
    assert {r.request.prompt.id for r in buffer.draw(0)} == {1} and buffer.metrics()["buffer/left_out_prompts"] == 2
    with pytest.raises(UserError, match="no prompt of the log has 2 responses"):
        LogBuffer(small_log([1, 1]), settings(2, 2), 0, True, 2)


def test_resumed_and_rolled_back_runs_go_on_alike() -> None:
    asked = settings(2, 2)
    goes_on_alike(lambda: LogBuffer(small_log([3, 1, 4, 2, 5]), asked, 0, True, 1), asked, lambda *_: (0.0,))
    assert json.dumps(LogBuffer(small_log([3]), asked, 0, True, 1).state())
