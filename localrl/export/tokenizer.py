"""The live tokenizer as GGUF keys: tokens, types, merges, the pre-tokenizer's name, end tokens, chat template.

Read from `tokenizer.backend_tokenizer.to_str()`, the tokenizer that trained, never from files by class: transformers 5 rebuilds a tokenizer
from its class name, and may so replace its pre-tokenizer. The name `tokenizer.ggml.pre` is decided by structure (the regex itself), and the
self-check then compares token ids; a name that is nearly right differs on a few texts in a hundred, silently.

Left out: WordPiece and Unigram vocabularies, which no supported family uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from localrl.export.families import Value
from localrl.settings import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
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
    ((_CONTRACTIONS + "|" + _WORDS + r"|\p{N}{1,3}" + _REST, "bytes"), True): "llama-bpe",
    ((_CONTRACTIONS + "|" + _WORDS + r"|\p{N}{1,3}" + _REST, "bytes"), False): "dbrx",
    ((_CONTRACTIONS + "|" + _WORDS + r"|\p{N}" + _REST, "bytes"), False): "qwen2",
    ((_cased("") + r"|\p{N}" + _REST_SLASH, "bytes"), True): "tekken",
    ((_cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _REST_SLASH, "bytes"), False): "gpt-4o",
}
"""(steps of the pre-tokenizer, does a whole word in the vocabulary skip the merges) -> llama.cpp's name for exactly that."""

BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
"""Names of the byte tokens of SentencePiece-like vocabularies."""

NEVER = "<none> <none>"
"""A merge that cannot match (merging starts from single characters): llama.cpp refuses a file without any, GGUF arrays cannot be empty."""


@dataclass(frozen=True)
class Vocabulary:
    """What the file says about the tokenizer, and what the self-check must know of it."""

    keys: Mapping[str, Value]
    """GGUF keys, whole."""
    stop_ids: tuple[int, ...]
    """Every token that ends a reply, the tokenizer's eos first."""
    normalises: bool
    """NFC is applied before the merges, which llama.cpp does not do: texts that it changes tokenise differently."""
    space_at_start: bool
    """A text gets a leading space, but what follows a special token does not. llama.cpp can do both or neither; the file says neither,
    which is right for every text that begins with a special token, as chat prompts do."""
    joins: bool
    """The pieces of a text, joined, are the text. (A SentencePiece-like one may drop a leading space, once per text.)"""
    unlike: tuple[tuple[str, str], ...]
    """Regular expressions of texts that llama.cpp tokenises in another way, and what is in them."""
    phi3: bool
    """Special tokens take the spaces behind them as Phi-3's do, which llama.cpp does for files of that name alone: see `named`."""


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
    tokens, types = token_table(spec, rows, bytes_by_name=bool(model.get("byte_fallback")))
    keys = sentencepiece_keys(spec, tokens) if model.get("byte_fallback") else byte_level_keys(spec, tokens)
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ends = end_ids(tokenizer, stop_ids)
    keys |= end_keys(tokenizer, ends) | edge_keys(tokenizer)
    if template := template_of(tokenizer):
        keys["tokenizer.chat_template"] = template
    normalises = "NFC" in str(spec.get("normalizer"))
    first = any(s.get("prepend_scheme") == "first" for s in flatten(spec.get("pre_tokenizer"), "pretokenizers"))
    changing = [step for step in flatten(spec.get("decoder"), "decoders") if step["type"] not in ("Replace", "ByteFallback", "Fuse")]
    joins = keys["tokenizer.ggml.model"] == "gpt2" or not (changing or first or keys["tokenizer.ggml.add_space_prefix"])
    return Vocabulary(keys, ends, normalises, first, joins, unlike(spec), like_phi3(spec))


NAMED_PHI3, NOT_PHI3 = re.compile("phi-?3", re.IGNORECASE), frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""In files of such a name llama.cpp lets all added tokens but these take the spaces behind them, and needs these and `</s>`: llama-vocab.cpp, load."""


def like_phi3(spec: Mapping[str, Any]) -> bool:
    """Whether added tokens take the spaces beside them exactly as llama.cpp has it for Phi-3."""
    added = list(spec.get("added_tokens") or ())
    names, behind = {token["content"] for token in added}, {token["content"] for token in added if token["rstrip"]}
    return names >= {*NOT_PHI3, "</s>"} and behind == names - NOT_PHI3 and not any(token["lstrip"] for token in added)


def unlike(spec: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What llama.cpp knows of no tokenizer (but Phi-3's): tokens that take spaces. And Gemma's runs of spaces, if a text spells them out."""
    added, found = list(spec.get("added_tokens") or ()), []
    if taking := [] if like_phi3(spec) else [token["content"] for token in added if token["lstrip"] or token["rstrip"]]:
        marks = "|".join(map(re.escape, taking))
        found.append((rf"\s({marks})|({marks})\s", f"spaces beside {taking[0]} and its like, which take them (llama.cpp leaves them)"))
    if any(set(token["content"]) == {"▁"} for token in added):
        found.append(("▁", "a ▁ of their own, which is a space in llama.cpp"))
    return tuple(found)


def named(name: str, vocabulary: Vocabulary) -> str:
    """What the file is called within (`general.name`): llama.cpp treats special tokens in another way if that looks like Phi-3."""
    if vocabulary.phi3:
        return name if NAMED_PHI3.search(name) else f"{name} (Phi-3)"
    return NAMED_PHI3.sub("Phi 3", name)


def token_table(spec: Mapping[str, Any], rows: int, *, bytes_by_name: bool) -> tuple[list[str], list[int]]:
    """(texts, types), `rows` long each: the model's vocabulary, over it the added tokens, and names nobody uses for the rest."""
    by_id: dict[int, tuple[str, int]] = {i: (text, TokenType.NORMAL) for text, i in spec["model"]["vocab"].items()}
    if bytes_by_name:
        by_id |= {i: (text, TokenType.BYTE) for i, (text, _) in by_id.items() if text in BYTES}
    for added in spec.get("added_tokens") or ():
        if bytes_by_name and not added["special"] and set(added["content"]) == {"▁"} and added["id"] in by_id:
            continue  # Gemma's runs of spaces: merges come to them, and only a normal token is written out as spaces
        by_id[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = spec["model"].get("unk_token")
    by_id |= {i: (text, TokenType.UNKNOWN) for i, (text, _) in by_id.items() if text == unknown and bytes_by_name}
    texts = {text for text, _ in by_id.values()}
    if len(texts) != len(by_id):  # llama.cpp aborts the whole process on it
        raise UserError("two ids of the tokenizer stand for the same text, which GGUF forbids: remove the duplicate added token")
    for i in range(rows):
        name = f"[PAD{i}]"
        while i not in by_id and name in texts:
            name = f"[{name}]"
        by_id.setdefault(i, (name, TokenType.UNUSED))
    return [by_id[i][0] for i in range(rows)], [int(by_id[i][1]) for i in range(rows)]


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


def sentencepiece_keys(spec: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Value]:
    """Keys of a SentencePiece-like BPE (Llama 2, Mistral, Gemma, Phi-3): spaces are U+2581, unknown characters fall back to bytes.

    llama.cpp merges by score, highest first: minus the merge's rank gives the same order.
    """
    if missing := sorted(set(BYTES) - set(tokens)):
        raise UserError(f"the tokenizer falls back to bytes but lacks {len(missing)} of 256 ({missing[0]}, ...): keep the PEFT adapter instead")
    prefix, escaped, odd = False, False, []
    for step in [*flatten(spec.get("normalizer"), "normalizers"), *flatten(spec.get("pre_tokenizer"), "pretokenizers")]:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁" and step.get("prepend_scheme", "always") != "always":
            continue  # "never", or "first": see space_at_start
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            escaped = True
        elif not (escaped and step["type"] == "Split" and step["pattern"] == {"String": " "}):  # Gemma's: no space is left to split at
            odd.append(step["type"])
    if odd:
        raise UserError(f"the tokenizer's step {odd[0]} is not in llama.cpp's SentencePiece code: keep the PEFT adapter instead")
    rank: dict[str, float] = {}
    for i, merge in enumerate(spec["model"]["merges"]):
        rank.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ", 1)), float(-i))
    last = float(-len(rank) - 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [rank.get(text, last) for text in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def flatten(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A tokenizer step as a list of simple ones: none, itself, or a Sequence's members."""
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


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
        return str(step["pattern"]["Regex"])
    return f"{kind} { ({k: v for k, v in step.items() if k != 'type'}) }"


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
