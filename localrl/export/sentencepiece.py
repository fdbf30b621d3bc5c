"""SentencePiece-like BPE (Llama 2, Mistral, Phi-3, Gemma) as GGUF keys: spaces are U+2581, unknown characters fall back to bytes.

The tokenizer merges pairs by their rank. llama.cpp merges any two neighbours whose text is a token, by that token's score, so the file gives each
token the rank of its first merge as score. That comes to the same if no token can be put together that the merges would not make, which is so for
what was converted from SentencePiece (every pair is a merge) and for what was trained (each token's text becomes that token). It is looked at
token by token; anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from localrl.export.families import Value
from localrl.export.steps import flatten
from localrl.settings import UserError

BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
"""Names of the byte tokens."""
KEEP = "keep the PEFT adapter instead"

BARE: Mapping[str, Any] = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
"""A tokenizer reduced to its merges."""

Merges = Sequence[tuple[str, ...]]


def sentencepiece_keys(spec: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Value]:
    """The keys that differ from a byte-level vocabulary's. UserError for what llama.cpp would do otherwise."""
    model = spec["model"]
    if missing := sorted(set(BYTES) - set(tokens)):
        raise UserError(f"the tokenizer falls back to bytes but lacks {len(missing)} of 256 ({missing[0]}, ...): {KEEP}")
    if odd := next((name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)), None):
        raise UserError(f"the tokenizer's {odd} = {model[odd]!r} is not in llama.cpp's SentencePiece code: {KEEP}")
    prefix = check_steps(spec)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    check_merges(spec, merges)
    rank: dict[str, float] = {}
    for i, parts in enumerate(merges):
        rank.setdefault("".join(parts), float(-i))
    last = float(-len(merges) - 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [rank.get(text, last) for text in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def check_steps(spec: Mapping[str, Any]) -> bool:
    """Whether every stretch of text gets a space in front. UserError for a step that llama.cpp has not."""
    prefix, escapes = False, False
    steps = [*flatten(spec.get("normalizer"), "normalizers"), *flatten(spec.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "▁" and not escapes:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            escapes = True
        elif kind == "Metaspace" and step["replacement"] == "▁" and step.get("prepend_scheme", "always") != "always" and not prefix:
            escapes = True  # "never", or "first": see space_at_start
            if step.get("split", True) and (odd := next((text for text in spec["model"]["vocab"] if "▁" in text[1:]), None)):
                raise UserError(f"the tokenizer's Metaspace cuts before every space (split = true), llama.cpp does not, and '{odd}' spans one: {KEEP}")
        elif not (kind == "Split" and step["pattern"] == {"String": " "} and escapes):  # Gemma's: no spaces are left by then
            scheme = f" (prepend_scheme = '{step.get('prepend_scheme')}')" if kind == "Metaspace" else ""
            raise UserError(f"the tokenizer's step {kind}{scheme} is not in llama.cpp's SentencePiece code: {KEEP}")
    if not escapes:
        raise UserError(f"the tokenizer falls back to bytes but does not write spaces as U+2581, as llama.cpp's SentencePiece code does: {KEEP}")
    return prefix


def check_merges(spec: Mapping[str, Any], merges: Merges) -> None:
    """UserError unless merging by tokens' scores does what merging by pairs' ranks does."""
    model = spec["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    added = {token["content"] for token in spec.get("added_tokens") or ()} | set(BYTES)
    if odd := torn(merges):
        raise UserError(f"the merges that make '{odd}' are apart in the list, llama.cpp gives a token one place: {KEEP}")
    every, spaces = set(merges), {text for text in added if not text.strip("▁")}  # spaces may be added tokens and come of merges too
    doubtful = [text for text in (vocabulary.keys() - added) | spaces if model.get("ignore_merges") or not closed(text, vocabulary, every)]
    if not doubtful:
        return
    alone = Tokenizer.from_str(json.dumps({**spec, **BARE, "model": {**model, "ignore_merges": False}}))
    if odd := next((text for text in sorted(doubtful) if len(text) > 1 and alone.encode(text).tokens != [text]), None):
        raise UserError(f"the merges do not make the token '{odd}' of its own text, llama.cpp would: {KEEP}")


def closed(text: str, vocabulary: Mapping[str, int], merges: set[tuple[str, ...]]) -> bool:
    """Whether all two parts that a token can be put together from are a merge. (llama.cpp begins with characters, known or not.)"""
    last = len(text) - 1
    for i in range(1, last + 1):
        left, right = text[:i], text[i:]
        if (i == 1 or left in vocabulary) and (i == last or right in vocabulary) and (left, right) not in merges:
            return False
    return True


def torn(merges: Merges) -> str | None:
    """A token whose merges do not follow one another, if there is any. Runs of one character may: between them only other runs lie."""
    seen: set[str] = set()
    last = ""
    for left, right in merges:
        text = left + right
        if text != last and text in seen and len(set(text)) > 1:
            return text
        seen.add(text)
        last = text
    return None
