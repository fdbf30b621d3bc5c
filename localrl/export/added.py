"""Added tokens (specials, tools, markers): which of the tokenizer's rules about them llama.cpp has, and which are refused.

Both take added tokens out of a text before anything else. The tokenizer takes the leftmost, of those the longest; llama.cpp the longest, wherever.
They agree unless one token's end is another's beginning. Of the flags (`single_word`, `lstrip`, `rstrip`, `normalized`) llama.cpp knows one, and
that by the model's name alone: in a model called phi-3 every special token but three takes the spaces behind it. Where tokens take spaces otherwise
(Phi-4's do, on both sides), texts with spaces beside them differ, and no others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from localrl.export.limits import Limit
from localrl.settings import UserError

PHI3 = ("<unk>", "<s>", "<|endoftext|>")
"""What keeps the spaces behind it in a model of that name. (llama.cpp does not load one that lacks them, or `</s>`.)"""
NAMED = {"phi-3": "phi 3", "phi3": "phi 3", "modern-bert": "modern bert"}
"""Names within which llama.cpp changes how special tokens are read, and how such a model is called instead."""
WIDE_SPACES = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
OUT = "add it without that flag before training, or keep the PEFT adapter instead"


def check_added(spec: Mapping[str, Any], normalized: Mapping[str, str]) -> bool:
    """Whether every special token takes the spaces behind it as in Phi-3 (else: none does). UserError for what llama.cpp has not.

    `normalized`: what the tokenizer's normalizer makes of the tokens that ask for it.
    """
    added: Sequence[Mapping[str, Any]] = spec.get("added_tokens") or ()
    for token in added:
        if token.get("single_word"):
            raise UserError(f"the added token '{token['content']}' has single_word = true, which llama.cpp has not: {OUT}")
        text = token["content"]
        if normalized.get(text, text) != text:
            raise UserError(f"the added token '{text}' is normalized to '{normalized[text]}', which llama.cpp does not do: add it with normalized = False")
    plain = {token["content"] for token in added if not token.get("normalized")}
    for token in added:
        inner = next((p for p in plain if p != token["content"] and token.get("normalized") and p in token["content"]), None)
        if inner is not None:
            raise UserError(f"the added token '{inner}' lies within '{token['content']}' and is looked for first, in llama.cpp the longer one is: "
                            "add both with normalized = False")  # fmt: skip
    if pair := overlap([token["content"] for token in added]):
        raise UserError(f"the added tokens '{pair[0]}' and '{pair[1]}' overlap, and of such llama.cpp takes the longer, not the first: rename one")
    return strips(spec, added)


def strips(spec: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the tokens take spaces as llama.cpp has it for Phi-3, to the letter."""
    texts = {token["content"] for token in added}
    taking = {token["content"] for token in added if token.get("rstrip")}
    known = texts | set(spec["model"]["vocab"])
    return known >= {*PHI3, "</s>"} and taking == (texts | {"</s>"}) - set(PHI3) and not any(token.get("lstrip") for token in added)


def space_limits(spec: Mapping[str, Any], takes_spaces: bool) -> list[Limit]:
    """Texts with spaces that a token takes and llama.cpp leaves: as in Phi-3 those beyond ASCII alone, otherwise all beside such a token."""
    added: Sequence[Mapping[str, Any]] = spec.get("added_tokens") or ()
    before, behind = ([re.escape(token["content"]) for token in added if token.get(flag)] for flag in ("lstrip", "rstrip"))
    if takes_spaces:
        wide = re.compile(rf"(?:{'|'.join(behind)})[\t-\r ]*[{WIDE_SPACES}]")
        return [Limit("with spaces beyond ASCII behind a special token, which llama.cpp does not take away", lambda text: wide.search(text) is not None)]
    sides = [rf"\s(?:{'|'.join(before)})"] * bool(before) + [rf"(?:{'|'.join(behind)})\s"] * bool(behind)
    if not sides:
        return []
    first = next(token["content"] for token in added if token.get("lstrip") or token.get("rstrip"))
    beside = re.compile("|".join(sides))
    return [Limit(f"with spaces beside {first} and its like, which take them (llama.cpp leaves them)", lambda text: beside.search(text) is not None)]


def overlap(texts: Sequence[str]) -> tuple[str, str] | None:
    """Two tokens of which one's end is the other's beginning, so that both are found in one stretch of text. (Runs of one character agree.)

    >>> overlap(["<a>", "<b>"]), overlap(["<a>", ">b"]), overlap(["\\n", "\\n\\n", "\\n\\n\\n"])
    (None, ('<a>', '>b'), None)
    """
    beginnings: dict[str, list[str]] = {}
    for text in texts:
        for i in range(1, len(text)):
            beginnings.setdefault(text[:i], []).append(text)
    for text in texts:
        for i in range(1, len(text)):
            for other in beginnings.get(text[i:], ()):
                if other != text and len(set(text) | set(other)) > 1:
                    return text, other
    return None


def model_name(name: str, takes_spaces: bool) -> str:
    """`general.name`, from which llama.cpp tells whether special tokens take the spaces behind them.

    >>> model_name("sums", True), model_name("my-Phi-3-run", True), model_name("my-Phi-3-run", False)
    ('sums (phi-3)', 'my-Phi-3-run', 'my-phi 3-run')
    """
    if takes_spaces:
        return name if any(word in name.lower() for word in ("phi-3", "phi3")) else f"{name} (phi-3)"
    for word, instead in NAMED.items():
        name = re.sub(re.escape(word), instead, name, flags=re.IGNORECASE)
    return name
