"""What llama.cpp cannot tokenise as the tokenizer does, although it knows the kind: each a narrow class of texts, left out of the comparison and told.

Beside these, llama.cpp's tables are those of Unicode 15: the letters and digits that came with Unicode 16 (4,382 of them, in scripts such as Garay,
Kirat Rai and Tulu-Tigalari) are neither to it, in every byte-level kind.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """One class of texts."""

    words: str
    """Which texts, and why, in half a sentence."""
    beyond: Callable[[str], bool]
    """Whether a text is one of them."""


def cased_beyond_ascii(text: str) -> bool:
    """Whether a text has a combining mark, or a word with a letter beyond ASCII that has case, in which a capital follows after anything
    but ASCII's capitals.

    >>> [cased_beyond_ascii(text) for text in ("helloWorld, Привет", "приветМир", "FÜR", "für", "e\u0301", "日Ab")]
    [False, True, True, False, True, False]
    """
    after = turned = beyond = False
    for letter in text:
        kind = unicodedata.category(letter)
        if kind[0] == "M":
            return True
        if kind[0] != "L":
            after = turned = beyond = False
            continue
        turned |= after and kind in ("Lu", "Lt")
        beyond |= letter > "\x7f" and kind in ("Lu", "Lt", "Ll")
        after |= kind not in ("Lu", "Lt") or beyond
        if turned and beyond:
            return True
    return False


NFC = Limit("that NFC changes: llama.cpp has no NFC", lambda text: not unicodedata.is_normalized("NFC", text))
CASED = Limit("with combining marks, or capitals within words beyond ASCII, where llama.cpp cuts words differently", cased_beyond_ascii)
LITERAL = Limit("that hold U+2581 as a character, which both take for a space, but not always alike", lambda text: "▁" in text)
