"""The demo's task: the habits do what they are named for, and nothing that is held out is ever trained on."""

from __future__ import annotations

import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrl.demo import build, task
from localrl.rewards.builtin import numeric_answer, tagged_format

questions = st.builds(task.Question, st.integers(task.LOW, task.HIGH), st.integers(task.LOW, task.HIGH), st.sampled_from(task.WORDINGS))


def right(text: str, question: task.Question) -> bool:
    return numeric_answer(completions=[text], answer=[str(question.answer)]) == [1.0]


def well_formed(text: str) -> bool:
    return tagged_format(completions=[text]) == [1.0]


@given(questions, st.integers(0, 2**32))
def test_careful_habits_are_right(question: task.Question, seed: int) -> None:
    for habit in task.HABITS:
        text = habit.write(random.Random(seed), question)
        assert right(text, question) or not habit.careful
        if habit.write is task.forgetful:
            assert well_formed(text)
            assert right(text, question) != question.carries


@given(questions, st.integers(0, 2**32))
def test_format_of_each_habit(question: task.Question, seed: int) -> None:
    keep = {task.short, task.middling, task.long, task.forgetful, task.pretended}
    for habit in task.HABITS:
        assert well_formed(habit.write(random.Random(seed), question)) == (habit.write in keep)


def test_a_guess_is_hardly_ever_right() -> None:
    rng, question = random.Random(0), task.Question(47, 38)
    hits = sum(task.guess(rng, question) == 85 for _ in range(4000)) / 4000
    assert 0 < hits < 0.02


def test_shares_are_shares() -> None:
    assert sum(habit.share for habit in task.HABITS) == pytest.approx(1)


def test_sides_of_the_split_share_no_pair() -> None:
    sides = [{frozenset((q.a, q.b)) for q in islice(task.questions(5, held_out), 8000)} for held_out in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == task.HELD_OUT


def test_questions_are_seeded() -> None:
    first, again, other = (list(islice(task.questions(seed, False), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_shipped_data_are_what_the_script_writes(tmp_path: Path) -> None:
    build.write_data(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (build.HERE / "data" / name).read_bytes()


def test_shipped_data_do_not_leak() -> None:
    pairs = {}
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (build.HERE / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        numbers = [[int(number) for number in re.findall(r"\d+", row["prompt"][0]["content"])] for row in rows]
        assert all(str(sum(pair)) == row["answer"] for pair, row in zip(numbers, rows, strict=True))
        pairs[name] = {tuple(sorted(pair)) for pair in numbers}
        assert len(pairs[name]) == len(rows)
    assert not pairs["train"] & pairs["eval"]
