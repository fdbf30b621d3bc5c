"""The reward functions that come along. Plain functions with TRL's signature: keyword arguments in, one value a completion out.

`column` names the data column with the expected answer; a row without one (None) gets None, "does not apply". Tags: where a
completion has an `<answer>` block, the last complete one is its answer, otherwise the whole text is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

Completion = str | list[dict[str, str]]
Values = list[float | None]


def text_of(completion: Completion) -> str:
    """The text of a completion, be it plain or a chat message.

    >>> text_of("hi"), text_of([{"role": "assistant", "content": "hi"}])
    ('hi', 'hi')
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def tagged(text: str, tag: str | None) -> str | None:
    """What stands in the last complete `<tag>...</tag>` block; None where there is none.

    >>> tagged("<answer>3</answer> no, <answer> 4 </answer>", "answer")
    '4'
    """
    _, found, rest = text.rpartition(f"</{tag}>")[0].rpartition(f"<{tag}>")
    return rest.strip() if tag and found else None


def exact_answer(
    *,
    completions: Sequence[Completion],
    column: str = "answer",
    tag: str | None = "answer",
    ignore_case: bool = False,
    **columns: list[Any],
) -> Values:
    """1 where the answer is the expected text, blanks around it aside; else 0. The column may hold several right answers as a list.

    >>> exact_answer(completions=["<think>hm</think><answer>Paris</answer>", "Rome"], answer=["Paris", ["Rome", "Roma"]])
    [1.0, 1.0]
    """

    def normal(text: Any) -> str:
        return str(text).strip().lower() if ignore_case else str(text).strip()

    values: Values = []
    for completion, expected in zip(completions, columns[column], strict=True):
        text = text_of(completion)
        block = tagged(text, tag)
        given = normal(text if block is None else block)
        right = expected if isinstance(expected, list) else [expected]
        values.append(None if expected is None else float(given in map(normal, right)))
    return values


_NUMBER = re.compile(
    r"""(?<![A-Za-z0-9_.])[-+]?                         # a minus between two words or numbers is none (3-5, x-1)
        (?: (?:\d{1,3}(?:,\d{3})+(?!\d) | \d+) (?:\.\d+)? | \.\d+ )
        (?:[eE][-+]?\d+)? (?:\s*/\s*\d+)?""",
    re.VERBOSE,
)


def number_in(text: str) -> float | None:
    r"""The last number in a text: in its `\boxed{}` or after its last `####` if it has one, else anywhere. None: no number.

    >>> [number_in(t) for t in ("so 1,234.5.", r"\boxed{-3}, not 4", "work\n#### 72", "3/4 cup", "from 3-5", "none", "$1e3")]
    [1234.5, -3.0, 72.0, 0.75, 5.0, None, 1000.0]
    """
    text = text.replace("\u2212", "-")                        # the typographic minus
    for mark in (r".*\\boxed\{([^{}]*)\}", r".*####([^\n]*)"):
        if field := re.match(mark, text, re.DOTALL):
            text = field[1]
            break
    found = _NUMBER.findall(text)
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    value = float(above) / float(below) if below and float(below) else math.nan if below else float(above)
    return value if math.isfinite(value) else None


def numeric_answer(
    *, completions: Sequence[Completion], column: str = "answer", tag: str | None = "answer", tolerance: float = 1e-6, **columns: list[Any]
) -> Values:
    r"""1 where the answer's number is the expected one within `tolerance * max(1, |expected|)`; else 0.

    The number is looked for in the answer block, in `\boxed{}`, after `####`, else it is the last in the text. The column may hold
    a number or a text with one (GSM8K's `... #### 72`).

    >>> numeric_answer(completions=["<answer>72</answer>", "It is 71", "many"], answer=[72, "6 * 12 = 72 #### 72", "3"])
    [1.0, 0.0, 0.0]
    """
    if tolerance < 0:
        raise ValueError(f"tolerance = {tolerance} must not be negative")
    values: Values = []
    for completion, expected in zip(completions, columns[column], strict=True):
        text = text_of(completion)
        block = tagged(text, tag)
        given, right = number_in(text if block is None else block), None if expected is None else number_in(str(expected))
        values.append(None if right is None else float(given is not None and abs(given - right) <= tolerance * max(1.0, abs(right))))
    return values


def math_answer(
    *, completions: Sequence[Completion], column: str = "answer", tag: str | None = "answer", seconds: int = 3, **columns: list[Any]
) -> Values:
    r"""1 where the answer is mathematically equal to the expected one (math-verify: LaTeX, fractions, sets, intervals); else 0.

    None where the expected answer cannot be understood; NaN, so that it is counted and shown, where a comparison takes longer than
    `seconds`. Needs `pip install "localrl[math]"`.

    >>> math_answer(completions=[r"so \boxed{\frac{1}{2}}", "<answer>x^2 + 1</answer>", "7"], answer=["0.5", "$1 + x^2$", "8"])
    [1.0, 1.0, 0.0]
    """
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError:
        raise ImportError('math_answer needs math-verify: pip install "localrl[math]"') from None

    def understood(text: str, bare: bool) -> list[Any]:
        # Only numbers are looked for in unmarked text, so a lone formula must be marked; a sentence must not, it is no formula.
        if bare and not re.search(r"\$|\\boxed|\\\(|\\\[|(?<![\\{A-Za-z])[A-Za-z]{2,}\s", text := text.rpartition("####")[2]):
            text = f"${text}$"
        read: list[Any] = parse(text, parsing_timeout=seconds, raise_on_error=False)
        return read

    values: Values = []
    for completion, expected in zip(completions, columns[column], strict=True):
        text = text_of(completion)
        block = tagged(text, tag)
        right = [] if expected is None else understood(str(expected), bare=True)
        given = understood(text if block is None else block, bare=block is not None)
        try:
            values.append(float(verify(right, given, timeout_seconds=seconds, raise_on_error=True)) if right else None)
        except TimeoutException:
            values.append(math.nan)
    return values


def regex(*, completions: Sequence[Completion], pattern: str, full: bool = False, **_: Any) -> Values:
    """1 where the pattern is found (`full`: matches the whole text), else 0. Flags stand in the pattern: `(?si)...`.

    >>> regex(completions=["I think so.", "No"], pattern=r"(?i)\\bi think\\b")
    [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    seek = compiled.fullmatch if full else compiled.search
    return [float(seek(text_of(completion)) is not None) for completion in completions]


def tagged_format(
    *, completions: Sequence[Completion], tags: Sequence[str] = ("think", "answer"), opened: bool = False, partial: bool = False, **_: Any
) -> Values:
    """1 where the text is exactly `<think>...</think><answer>...</answer>`: each once, in order, filled, nothing around them; else 0.

    `opened`: the prompt ends with the first opening tag already, as some chat templates have it. `partial`: a text that is not
    well-formed earns half of the share of tags that stand in it exactly once.

    >>> tagged_format(completions=["<think>a</think> <answer>b</answer>", "<answer>b</answer>"], partial=True)
    [1.0, 0.25]
    """
    if isinstance(tags, str) or not tags:
        raise ValueError(f"tags = {tags!r} must be a list of names")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    blocks = [rf"{re.escape(f'<{tag}>')}(?P<t{i}>.*?\S.*?){re.escape(f'</{tag}>')}" for i, tag in enumerate(tags)]
    whole = re.compile(r"\s*" + r"\s*".join(blocks) + r"\s*", re.DOTALL)
    values: Values = []
    for completion in completions:
        text = (marks[0] if opened else "") + text_of(completion)
        once = sum(text.count(mark) == 1 for mark in marks)
        good = once == len(marks) and whole.fullmatch(text) is not None
        values.append(1.0 if good else 0.5 * once / len(marks) if partial else 0.0)
    return values


def json_schema(*, completions: Sequence[Completion], schema: dict[str, Any] | None = None, tag: str | None = "answer", **_: Any) -> Values:
    """1 where the answer is JSON, alone or in a ```json fence, that satisfies `schema` (None: any JSON); else 0.

    References to schemas elsewhere are not followed: nothing is fetched. Needs `pip install "localrl[json]"`.

    >>> json_schema(completions=['{"age": 3}', '{"age": "3"}', "age: 3"], schema={"properties": {"age": {"type": "integer"}}})
    [1.0, 0.0, 0.0]
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError:
        raise ImportError('json_schema needs jsonschema: pip install "localrl[json]"') from None

    kind = validator_for(schema or {})
    try:
        kind.check_schema(schema or {})
    except SchemaError as error:
        raise ValueError(f"the schema is none: {error.message}") from None
    validator = kind(schema or {}, registry=Registry())

    def good(text: str) -> bool:
        block = tagged(text, tag)
        text = (text if block is None else block).strip()
        fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
        try:
            return bool(validator.is_valid(json.loads(fenced[1] if fenced else text)))
        except (json.JSONDecodeError, RecursionError):        # RecursionError: a thousand opening brackets
            return False

    return [float(good(text_of(completion))) for completion in completions]


def length_target(*, completion_ids: Sequence[Sequence[int]], target: int, limit: int, **_: Any) -> Values:
    """1 up to `target` tokens, then falling evenly to 0 at `limit` tokens and beyond. A low target rewards brevity.

    An empty completion has the full reward, so let something else reward the answer.

    >>> length_target(completion_ids=[[7] * 10, [7] * 15, [7] * 30], target=10, limit=20)
    [1.0, 0.5, 0.0]
    """
    if not 0 <= target < limit:
        raise ValueError(f"target = {target} and limit = {limit} must satisfy 0 <= target < limit")
    return [min(1.0, max(0.0, (limit - len(ids)) / (limit - target))) for ids in completion_ids]


def overlong_penalty(*, completion_ids: Sequence[Sequence[int]], limit: int, cache: int, **_: Any) -> Values:
    """DAPO's soft over-long punishment (arXiv 2503.14476, equation 13): 0 up to `limit - cache` tokens, then evenly down to -1 at `limit`.

    >>> overlong_penalty(completion_ids=[[7] * 6, [7] * 8, [7] * 11], limit=10, cache=4)
    [0.0, -0.5, -1.0]
    """
    if not 0 < cache <= limit:
        raise ValueError(f"cache = {cache} and limit = {limit} must satisfy 0 < cache <= limit")
    return [max(-1.0, min(0.0, (limit - cache - len(ids)) / cache)) for ids in completion_ids]


def repetition_penalty(*, completion_ids: Sequence[Sequence[int]], ngram: int = 4, **_: Any) -> Values:
    """Minus the share of n-grams that repeat an earlier one: 0 without repetition, towards -1 for a loop.

    Counted over tokens, not words, so that it holds for languages without blanks, and for loops without blanks too.

    >>> repetition_penalty(completion_ids=[[1, 2, 3, 4, 5], [1, 2, 1, 2, 1, 2], [1]], ngram=2)
    [0.0, -0.6, 0.0]
    """
    if ngram < 1:
        raise ValueError(f"ngram = {ngram} must be at least 1")
    values: Values = []
    for ids in completion_ids:
        grams = [tuple(ids[at : at + ngram]) for at in range(len(ids) - ngram + 1)]
        values.append(-(len(grams) - len(set(grams))) / len(grams) if len(set(grams)) < len(grams) else 0.0)
    return values


BUILTINS: dict[str, Callable[..., Values]] = {
    function.__name__: function
    for function in (
        exact_answer, numeric_answer, math_answer, regex, tagged_format, json_schema, length_target, overlong_penalty, repetition_penalty,
    )
}
