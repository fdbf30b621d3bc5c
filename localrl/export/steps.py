"""The steps of a tokenizer (normalizers, pre-tokenizers) in words that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SAME = (
    (r"'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),                       # tiktoken's spelling
    ("?+", "?"), ("++", "+"),                                       # possessive: what follows cannot match what they took
    (r"\s*[\r\n]|", r"\s*[\r\n]+|"),                                # greedy spaces take all lines but the last in any case
)  # fmt: skip
"""Two spellings of the same cut. (Tested on hundreds of texts, in `tests/export`.)"""


def flatten(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A tokenizer step as a list of simple ones: none, itself, or a Sequence's members."""
    if step is None:
        return []
    return [each for member in step[inner] for each in flatten(member, inner)] if step["type"] == "Sequence" else [step]


def step_of(step: Mapping[str, Any]) -> str:
    """One word for a pre-tokenizer step: what it does, as far as token ids depend on it.

    >>> step_of({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True})
    "bytes with GPT-2's regex"
    """
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes with GPT-2's regex" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return canonical(str(step["pattern"]["Regex"]))
    return f"{kind} { ({k: v for k, v in step.items() if k != 'type'}) }"


def canonical(regex: str) -> str:
    r"""One spelling of regexes that cut alike.

    >>> canonical(r"'(?i:[sdmt]|ll|ve|re)|x?+|\s*[\r\n]|") == canonical(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|x?|\s*[\r\n]+|")
    True
    """
    for spelling, usual in SAME:
        regex = regex.replace(spelling, usual)
    return regex
