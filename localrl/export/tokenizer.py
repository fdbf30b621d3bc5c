"""The live tokenizer as GGUF keys: tokens, types, merges, the pre-tokenizer's name, end tokens, chat template.

Read from `tokenizer.backend_tokenizer.to_str()`, the tokenizer that trained, never from files by class: transformers 5 rebuilds a tokenizer
from its class name, and may so replace its pre-tokenizer. The name `tokenizer.ggml.pre` is decided by structure (the regex itself), and the
self-check then compares token ids; a name that is nearly right differs on a few texts in a hundred, silently.

The two kinds: byte-level BPE here, SentencePiece-like BPE in `sentencepiece.py`; what holds for added tokens of both in `added.py`.
Left out: WordPiece and Unigram vocabularies, which no supported family uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from localrl.export.added import check_added, space_limits
from localrl.export.families import Value
from localrl.export.limits import CASED, LITERAL, NFC, Limit
from localrl.export.sentencepiece import BYTES, sentencepiece_keys
from localrl.export.steps import CONTRACTIONS, flatten, step_of
from localrl.settings import UserError

_WORDS, _MARKED = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str) -> str:
    """GPT-4o's two kinds of words: capitals first, or capitals only."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}"


PRE: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes with GPT-2's regex",), False): "gpt-2",
    (("digits", "bytes with GPT-2's regex"), False): "smollm",
    ((CONTRACTIONS + "|" + _WORDS + r"|\p{N}{1,3}" + _REST, "bytes"), True): "llama-bpe",
    ((CONTRACTIONS + "|" + _WORDS + r"|\p{N}{1,3}" + _REST, "bytes"), False): "dbrx",
    ((CONTRACTIONS + "|" + _WORDS + r"|\p{N}" + _REST, "bytes"), False): "qwen2",
    ((CONTRACTIONS + "|" + _MARKED + r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "bytes"), False): "qwen35",
    ((_cased("") + r"|\p{N}" + _REST_SLASH, "bytes"), True): "tekken",
    ((_cased(CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _REST_SLASH, "bytes"), False): "gpt-4o",
}
"""(steps of the pre-tokenizer, does a whole word in the vocabulary skip the merges) -> llama.cpp's name for exactly that."""

NEVER = "<none> <none>"
"""A merge that cannot match (merging starts from single characters): llama.cpp refuses a file without any, GGUF arrays cannot be empty."""


@dataclass(frozen=True)
class Vocabulary:
    """What the file says about the tokenizer, and what the self-check must know of it."""

    keys: Mapping[str, Value]
    """GGUF keys, whole."""
    stop_ids: tuple[int, ...]
    """Every token that ends a reply, the tokenizer's eos first."""
    limits: tuple[Limit, ...]
    """Classes of texts that llama.cpp tokenises differently."""
    space_at_start: bool
    """A text gets a leading space, but what follows a special token does not. llama.cpp can do both or neither; the file says neither,
    which is right for every text that begins with a special token, as chat prompts do."""
    takes_spaces: bool = False
    """Special tokens take the spaces behind them, as Phi-3's do: llama.cpp tells it from the model's name."""


def read_vocabulary(tokenizer: Any, rows: int, stop_ids: Sequence[int]) -> Vocabulary:
    """The GGUF keys of a live transformers tokenizer.

    `rows`: of the embedding; tokens up to there are padded. `stop_ids`: what ends a reply, beside the tokenizer's own eos.
    UserError if llama.cpp has no exact counterpart.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer {type(tokenizer).__name__} has no tokenizers backend to export: load it with use_fast=True")
    spec = json.loads(backend.to_str())
    model, size = spec["model"], len(tokenizer)
    if size > rows:
        raise UserError(f"the tokenizer has {size} tokens, the embedding only {rows} rows: resize the embedding before training")
    if model["type"] != "BPE":
        raise UserError(f"a {model['type']} tokenizer cannot be exported for these models, only BPE: keep the PEFT adapter instead")
    by_name = bool(model.get("byte_fallback"))
    takes_spaces = check_added(spec, normalized_names(tokenizer, spec))
    tokens, types = token_table(spec, rows, bytes_by_name=by_name)
    keys = sentencepiece_keys(spec, tokens) if by_name else byte_level_keys(spec, tokens)
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ends = end_ids(tokenizer, stop_ids)
    keys |= end_keys(tokenizer, ends) | edge_keys(tokenizer)
    if template := template_of(tokenizer):
        keys["tokenizer.chat_template"] = template
    first = any(s.get("prepend_scheme") == "first" for s in flatten(spec.get("pre_tokenizer"), "pretokenizers"))
    spaces = by_name and any(is_spaces(token) for token in spec.get("added_tokens") or ())
    cased = keys["tokenizer.ggml.pre"] in ("tekken", "gpt-4o")
    limits = [limit for limit, holds in ((NFC, "NFC" in str(spec.get("normalizer"))), (CASED, cased), (LITERAL, spaces)) if holds]
    return Vocabulary(keys, ends, (*limits, *space_limits(spec, takes_spaces)), first, takes_spaces)


def normalized_names(tokenizer: Any, spec: Mapping[str, Any]) -> dict[str, str]:
    """What the normalizer makes of the added tokens that are looked for in normalized text."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    names = [token["content"] for token in spec.get("added_tokens") or () if token.get("normalized")]
    return {} if normalizer is None else {name: normalizer.normalize_str(name) for name in names}


def token_table(spec: Mapping[str, Any], rows: int, *, bytes_by_name: bool) -> tuple[list[str], list[int]]:
    """(texts, types), `rows` long each: the model's vocabulary, over it the added tokens, and names nobody uses for the rest."""
    by_id: dict[int, tuple[str, int]] = {i: (text, TokenType.NORMAL) for text, i in spec["model"]["vocab"].items()}
    if bytes_by_name:
        by_id |= {i: (text, TokenType.BYTE) for i, (text, _) in by_id.items() if text in BYTES}
    for added in spec.get("added_tokens") or ():
        text, special = added["content"], added["special"]
        spaces = bytes_by_name and is_spaces(added)
        by_id[added["id"]] = (text, TokenType.NORMAL if spaces else TokenType.CONTROL if special else TokenType.USER_DEFINED)
    unknown = spec["model"].get("unk_token")
    special_ids = {i for i, (_, kind) in by_id.items() if kind == TokenType.CONTROL}
    by_id |= {i: (text, TokenType.UNKNOWN) for i, (text, _) in by_id.items() if text == unknown and bytes_by_name and i in special_ids}
    texts = {text for text, _ in by_id.values()}
    if len(texts) != len(by_id):  # llama.cpp aborts the whole process on it
        raise UserError("two ids of the tokenizer stand for the same text, which GGUF forbids: remove the duplicate added token")
    if odd := next((text for text in texts if "\0" in text or not text), None):
        raise UserError(f"the token {odd!r} is empty or holds a NUL, at which llama.cpp ends a token: remove it, or keep the PEFT adapter instead")
    for i in range(rows):
        name = f"[PAD{i}]"
        while i not in by_id and name in texts:
            name = f"[{name}]"
        by_id.setdefault(i, (name, TokenType.UNUSED))
    return [by_id[i][0] for i in range(rows)], [int(by_id[i][1]) for i in range(rows)]


def is_spaces(added: Mapping[str, Any]) -> bool:
    """Whether an added token is nothing but U+2581 (Gemma's are): it is read as spaces, and merges make it of them, so it is a token like others."""
    return not added["special"] and not added["content"].strip("▁")


def byte_level_keys(spec: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Value]:
    """Keys of a GPT-2 style vocabulary: every byte has a character, words are cut by a regex first."""
    from tokenizers.pre_tokenizers import ByteLevel

    model, steps = spec["model"], tuple(step_of(step) for step in flatten(spec.get("pre_tokenizer"), "pretokenizers"))
    name = PRE.get((steps, bool(model.get("ignore_merges"))))
    if name is None or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        known = ", ".join(sorted(set(PRE.values())))
        raise UserError(f"the pre-tokenizer {list(steps)} has no exact counterpart in llama.cpp (known: {known}): keep the PEFT adapter instead")
    for step in flatten(spec.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise UserError(f"the tokenizer's normalizer {step['type']} is not in llama.cpp, only NFC: keep the PEFT adapter instead")
    missing = set(ByteLevel.alphabet()) - set(tokens)
    if missing:
        raise UserError(f"the tokenizer lacks {len(missing)} of the 256 byte tokens: train it with initial_alphabet=ByteLevel.alphabet()")
    merges = [joined(merge) for merge in model["merges"]] or [NEVER]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def joined(merge: Sequence[str] | str) -> str:
    """A merge as GGUF wants it, in one string; a space within a part becomes U+0120, as in every byte-level token."""
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)


def end_ids(tokenizer: Any, stop_ids: Sequence[int]) -> tuple[int, ...]:
    """Every token that ends a reply, the tokenizer's eos first."""
    eos = tokenizer.eos_token_id
    ends = tuple(dict.fromkeys(([] if eos is None else [int(eos)]) + [int(i) for i in stop_ids]))
    if not ends:
        raise UserError("neither tokenizer nor generation config names an end token, the exported model would not stop: set tokenizer.eos_token")
    return ends


def end_keys(tokenizer: Any, ends: Sequence[int]) -> dict[str, Value]:
    """eos, and what else ends a reply as eot and eom: llama.cpp stops at each of the three (and at some tokens by their name)."""
    keys: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(("eos", "eot", "eom"), ends, strict=False)}
    bos = tokenizer.bos_token_id
    keys["tokenizer.ggml.bos_token_id"] = int(ends[0] if bos is None else bos)  # left out, llama.cpp would take 11
    for name in ("unk", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            keys[f"tokenizer.ggml.{'unknown' if name == 'unk' else 'padding'}_token_id"] = int(i)
    return keys


def edge_keys(tokenizer: Any) -> dict[str, Value]:
    """Does a text get bos before and eos after it: asked of the tokenizer, and always written, for llama.cpp's defaults differ by name."""
    bare, dressed = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    places = [i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare]
    before, after = (dressed[: places[0]], dressed[places[0] + len(bare) :]) if places else (dressed, dressed)
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise UserError(f"the tokenizer wraps a text as {dressed}, but GGUF knows only bos before and eos after it: change its post-processor")
    return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def template_of(tokenizer: Any) -> str | None:
    """The chat template in force, or None."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else None
