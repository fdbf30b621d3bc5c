"""The built-in reward functions, called directly; that each of them also works in its process is in test_rewards.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrl.rewards.builtin import (
    BUILTINS,
    exact_answer,
    json_schema,
    length_target,
    math_answer,
    number_in,
    numeric_answer,
    overlong_penalty,
    regex,
    repetition_penalty,
    tagged_format,
)

DAPO = [  # arXiv 2503.14476, section 3.4: (limit, cache, lengths, punishments)
    (20480, 4096, [100, 16384, 16385, 18432, 20480, 20481], [0.0, 0.0, -0.000244140625, -0.5, -1.0, -1.0]),
    (10, 4, [5, 6, 7, 8, 9, 10, 11], [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0]),
]


@pytest.mark.parametrize(("limit", "cache", "lengths", "expected"), DAPO)
def test_overlong_penalty_is_dapos(limit: int, cache: int, lengths: list[int], expected: list[float]) -> None:
    assert overlong_penalty(completion_ids=[range(n) for n in lengths], limit=limit, cache=cache) == expected


@pytest.mark.parametrize(
    ("name", "args", "text", "columns"),
    [
        ("exact_answer", {}, "<answer>a</answer>", {"answer": ["a"]}),
        ("numeric_answer", {}, "it is 4", {"answer": [4]}),
        ("math_answer", {}, r"\boxed{4}", {"answer": ["4"]}),
        ("regex", {"pattern": "a"}, "cat", {}),
        ("tagged_format", {}, "<think>a</think><answer>b</answer>", {}),
        ("json_schema", {"schema": {"type": "object"}}, "{}", {}),
    ],
)
def test_text_and_chat_are_the_same_to_a_reward(name: str, args: dict[str, Any], text: str, columns: dict[str, list[Any]]) -> None:
    for completion in (text, [{"role": "assistant", "content": text}]):
        assert BUILTINS[name](completions=[completion], prompts=["?"], completion_ids=[[1]], done=[True], **args, **columns) == [1.0]


def test_exact_answer() -> None:
    def one(text: str, expected: Any, **args: Any) -> float | None:
        return exact_answer(completions=[text], answer=[expected], **args)[0]

    assert one("<answer> a b </answer> trailing", "a b") == 1
    assert one("<answer>a</answer><answer>b</answer>", "a") == 0, "the last block counts: several guesses are one"
    assert one("<answer>a</answer> then <answer> unfinished", "a") == 1, "an unfinished block is none"
    assert one("A", "a") == 0
    assert one("A", "a", ignore_case=True) == 1
    assert one("4", 4) == 1
    assert one("<answer>a</answer>", "a", tag=None) == 0
    assert one("a", None) is None
    assert one("", "a") == 0
    assert exact_answer(completions=["x"], column="solution", solution=["x"], answer=["y"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-7", -7), ("−7", -7), ("x-7", 7), ("3-5", 5), ("+2", 2), (".5", 0.5), ("1,234,567.25", 1234567.25), ("(1,5)", 5), ("1.5.", 1.5),
        ("2e-3", 0.002), ("1/4", 0.25), ("1/0", None), ("1e999", None), ("H2O", None), ("", None), ("答えは5です", 5), ("12", 12),
        ("#### 8\nor 9", 8), (r"\boxed{1} and \boxed{2}, 3", 2), (r"\boxed{}", None), ("$1,000 in 2 years", 2), ("50%", 50),
    ],
)
def test_number_in(text: str, value: float | None) -> None:
    assert number_in(text) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_in_reads_what_python_writes(value: float) -> None:
    assert number_in(f"The answer is {value!r}.") == value


@given(st.text(max_size=200))
def test_number_in_survives_any_text(text: str) -> None:
    found = number_in(text)
    assert found is None or math.isfinite(found)


def test_numeric_answer() -> None:
    texts, answers = ["<answer>3.0</answer> 9", "about 3.1", "none", "4", "4"], [3, "3", 3, None, "no number"]
    assert numeric_answer(completions=texts, answer=answers) == [1.0, 0.0, 0.0, None, None]
    assert numeric_answer(completions=["3.1"], answer=[3], tolerance=0.04) == [1.0], "0.04 of 3 is 0.12"
    assert numeric_answer(completions=["0.1"], answer=[0], tolerance=0.05) == [0.0], "absolute below 1"
    with pytest.raises(ValueError, match="negative"):
        numeric_answer(completions=[], answer=[], tolerance=-1)


def test_math_answer() -> None:
    texts = [r"hence $\frac{2}{4}$", "<answer>(1,2)</answer>", "<answer>result is 7</answer>", "so x = 3", "<answer></answer>", "5", "5"]
    answers: list[Any] = ["0.5", "$(1,2)$", 7, "3", "3", None, ""]
    assert math_answer(completions=texts, answer=answers) == [1.0, 1.0, 1.0, 1.0, 0.0, None, None]
    assert math_answer(completions=["72"], answer=["6 * 12 = 72\n#### 72"]) == [1.0]


def test_math_answer_that_takes_too_long_is_missing_and_not_wrong() -> None:
    value = math_answer(completions=[r"\boxed{9^{9^{9^{9}}}}"], answer=["$2^{10}$"], seconds=1)[0]
    assert value is not None
    assert math.isnan(value)


def test_regex() -> None:
    texts = ["say ok", "ok", "OK\nok"]
    assert regex(completions=texts, pattern="ok") == [1.0, 1.0, 1.0]
    assert regex(completions=texts, pattern="ok", full=True) == [0.0, 1.0, 0.0]
    assert regex(completions=texts, pattern="(?si)ok.*", full=True) == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"pattern '\(' is no regular expression"):
        regex(completions=[], pattern="(")


@pytest.mark.parametrize(
    ("text", "value", "partial"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" \n<think>a\nb</think>\n\n<answer>c</answer>\n", 1, 1),
        ("<think>a</think>x<answer>b</answer>", 0, 0.5),
        ("<answer>b</answer><think>a</think>", 0, 0.5),
        ("<think> </think><answer>b</answer>", 0, 0.5),
        ("<think>a</think><answer>b</answer> bye", 0, 0.5),
        ("<think>a</think><think>a</think><answer>b</answer>", 0, 0.25),
        ("<think>a</think><answer>b", 0, 0.375),
        ("", 0, 0),
    ],
)
def test_tagged_format(text: str, value: float, partial: float) -> None:
    assert tagged_format(completions=[text]) == [value]
    assert tagged_format(completions=[text], partial=True) == [partial]
    if text.startswith("<think>"):
        assert tagged_format(completions=[text.removeprefix("<think>")], opened=True) == [value]


def test_tagged_format_with_other_tags() -> None:
    assert tagged_format(completions=["<a.b>1</a.b>", "<a.b>1</a_b>"], tags=["a.b"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="must be a list"):
        tagged_format(completions=[], tags="answer")


def test_json_schema() -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
    texts = ['{"n": 1}', '```json\n{"n": 1}\n```', '<answer>{"n": 1}</answer>', '{"n": -1}', "{}", "{n: 1}", "", "[" * 100_000]
    assert json_schema(completions=texts, schema=schema) == [1, 1, 1, 0, 0, 0, 0, 0]
    assert json_schema(completions=["3", "three"]) == [1, 0]
    with pytest.raises(ValueError, match="the schema is none: 'nonsense' is not valid"):
        json_schema(completions=[], schema={"type": "nonsense"})


def test_length_target() -> None:
    lengths = [0, 8, 10, 12, 20, 30]
    assert length_target(completion_ids=[range(n) for n in lengths], target=10, limit=20) == [1, 1, 1, 0.8, 0, 0]
    with pytest.raises(ValueError, match="0 <= target < limit"):
        length_target(completion_ids=[], target=5, limit=5)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_repetition_penalty_is_a_share(ids: list[int], ngram: int) -> None:
    value = repetition_penalty(completion_ids=[ids], ngram=ngram)[0]
    assert value is not None
    assert -1 < value <= 0
    looped = repetition_penalty(completion_ids=[ids * 10], ngram=ngram)[0]
    assert looped is not None
    assert looped <= value, "a text said ten times repeats itself at least as much"
