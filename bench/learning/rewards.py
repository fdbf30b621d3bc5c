"""Rewards of the comparisons, all read off the completion's text, in scales and variances of their own."""

from __future__ import annotations

import hashlib
import re
from typing import Any

Completions = list[list[dict[str, str]]]


def texts(completions: Completions) -> list[str]:
    """What was said."""
    return [completion[0]["content"] for completion in completions]


def slight_brevity(completions: Completions, **_: Any) -> list[float]:
    """Short is good, on a scale of a tenth: its spread drowns beside rewards of 0 or 1."""
    return [0.1 * max(0.0, 1 - len(text) / 120) for text in texts(completions)]


def slight_format(completions: Completions, **_: Any) -> list[float]:
    """The asked-for tags, on a scale of a tenth."""
    return [0.1 * bool(re.fullmatch(r"<think>.+?</think>\s*<answer>.+?</answer>\s*", text, re.DOTALL)) for text in texts(completions)]


def brevity(completions: Completions, **_: Any) -> list[float]:
    """From 1 (nothing) to 0 (160 characters and more)."""
    return [max(0.0, 1 - len(text) / 160) for text in texts(completions)]


def working(completions: Completions, **_: Any) -> list[float]:
    """How much of the working is shown: sums of single digits, up to two."""
    return [min(2, len(re.findall(r"\d ?\+ ?\d", text))) / 2 for text in texts(completions)]


def words(completions: Completions, **_: Any) -> list[float]:
    """Explains itself in words: up to twelve of them."""
    return [min(12, len(re.findall(r"[A-Za-z]{2,}", re.sub(r"</?\w+>", "", text)))) / 12 for text in texts(completions)]


def starts_politely(completions: Completions, **_: Any) -> list[float]:
    """Opens with a word to the reader."""
    return [float(bool(re.match(r"(<think>)?\s*(Well|Okay|Let me)", text))) for text in texts(completions)]


def one_line(completions: Completions, **_: Any) -> list[float]:
    """No line breaks."""
    return [float("\n" not in text) for text in texts(completions)]


def sentences(completions: Completions, **_: Any) -> list[float]:
    """Full stops, up to three."""
    return [min(3, text.count(".")) / 3 for text in texts(completions)]


def few_symbols(completions: Completions, **_: Any) -> list[float]:
    """Neither = nor +."""
    return [max(0.0, 1 - (text.count("=") + text.count("+")) / 4) for text in texts(completions)]


def commas(completions: Completions, **_: Any) -> list[float]:
    """Up to two."""
    return [min(2, text.count(",")) / 2 for text in texts(completions)]


def names_tens(completions: Completions, **_: Any) -> list[float]:
    """Speaks of ones and tens."""
    return [0.5 * ("ones" in text.lower()) + 0.5 * ("tens" in text.lower()) for text in texts(completions)]


def noisy_judge(completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """Half a point for the right number somewhere, and a mood that spreads much wider: a judge as people have them. The same text, the same mood."""
    scores = []
    for text, right in zip(texts(completions), answer, strict=True):
        mood = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        scores.append(0.5 * (right in re.findall(r"\d+", text)) + 4 * (mood - 0.5))
    return scores
