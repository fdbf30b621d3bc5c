"""Everything that a file will be asked, with the answers of the live model and the live tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from gguf import TokenType
from torch import nn

from localrl.export.original import Original
from localrl.export.probes import DIALOGUES, PROBES
from localrl.export.reference import GREEDY, Asked, Sample, ask, computes_in_fp32, divergence, is_on, reference, room
from localrl.export.tokenizer import Vocabulary, template_of
from localrl.settings import UserError

GREEDY_CASES = 2
"""Samples whose prompts are continued greedily."""
TEXT_CASES = 32
"""Samples whose prompts and answers are also compared as text."""
MOST_BEYOND = 0.1
"""Share of the run's own texts that may be of a kind which llama.cpp tokenises differently; of more the file would not say what was trained."""
SPECIALS = ("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token", "add_eos_token")
"""Keys of `tokenizer.ggml.` that llama.cpp can be asked about."""

Text = tuple[str, list[int], list[int] | None]
"""(text, its ids bare, its ids with what the tokenizer puts around a text; None: not asked)."""


@dataclass(frozen=True)
class Expected:
    """What the trained model says, gathered before the child starts."""

    texts: list[Text]
    pieces: list[tuple[list[int], str]]
    """(ids, the text they read as)."""
    space_in_front: bool
    """Every stretch of text gets a space in front, which is taken away again from the text that the tokens read as."""
    note: str
    """Which texts were left out, because llama.cpp cannot do as the tokenizer does; empty: none."""
    dialogues: list[dict[str, Any]]
    template: str
    """The chat template in force; empty: none."""
    specials: dict[str, int | bool]
    """Special tokens by their GGUF keys, and whether they are put around a text."""
    stop_ids: tuple[int, ...]
    """What ends a reply, the tokenizer's eos first."""
    harmless_ends: frozenset[int]
    """What llama.cpp may take for an end of its own accord: special tokens that answers hardly hold."""
    asked: list[Asked]
    prompts: list[tuple[int, ...]]
    """To be continued greedily by llama.cpp; the model then says whether it agrees."""
    own_rounding: float | None
    """Mean KL of the live model from the fp32 reference; None: they are the same."""


def expected_texts(tokenizer: Any, vocabulary: Vocabulary, data: Sequence[Sequence[int]]) -> tuple[list[Text], str]:
    """Probes, the run's own data (ids) as text, and every added token within words, with their ids. -> (texts, what was left out, if anything)."""
    names = list(tokenizer.get_added_vocab())
    each = 1 + len(names) // 256  # some models have thousands of them
    apart = [text if like(text := f"one{name}two {name} three", vocabulary) else f"one{name}two{name}three" for name in names]
    added = ["".join(apart[i : i + each]) for i in range(0, len(apart), each)]
    own = {tokenizer.decode(list(p), clean_up_tokenization_spaces=False) for p in data if p}
    texts, note = list(dict.fromkeys([*PROBES, *sorted(own), *added])), ""
    for limit in vocabulary.limits:
        kept = [text for text in texts if not limit.beyond(text)]
        lost = [text for text in own if limit.beyond(text)]
        if len(lost) > MOST_BEYOND * len(own):
            first = f"first: {min(lost)[:60]!r}"
            raise UserError(f"{len(lost)} of {len(own)} of the run's own texts are ones {limit.words} ({first}): keep the PEFT adapter instead")
        if len(kept) < len(texts):
            note += f"without {len(texts) - len(kept)} texts ({len(lost)} of them the run's own) {limit.words}; "
        texts = kept
    note = note.removesuffix("; ")
    if vocabulary.space_at_start:
        mark = tokenizer.bos_token or tokenizer.eos_token
        texts = [text if text.startswith(mark) else mark + text for text in texts]
        note += f"{'; ' if note else ''}each behind {mark}: a text that begins without a special token lacks a space in llama.cpp"
    bare, dressed = ([list(tokenizer(text, add_special_tokens=add)["input_ids"]) for text in texts] for add in (False, True))
    return [(t, b, None if vocabulary.space_at_start else d) for t, b, d in zip(texts, bare, dressed, strict=True)], note


def like(text: str, vocabulary: Vocabulary) -> bool:
    """Whether llama.cpp can tokenise this text as the tokenizer does."""
    return not any(limit.beyond(text) for limit in vocabulary.limits)


def expected_dialogues(tokenizer: Any, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Dialogues as the live tokenizer renders and tokenises them, without what its template refuses, and (if not all) what is unlike in llama.cpp."""
    found: list[dict[str, Any]] = []
    if template_of(tokenizer) is None:
        return found
    for messages in DIALOGUES:
        for prompt in (True, False):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except jinja2.TemplateError:
                continue
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    return [dialogue for dialogue in found if like(dialogue["text"], vocabulary)] or found


def expect(
    model: nn.Module, tokenizer: Any, adapter: str | None, vocabulary: Vocabulary, samples: Sequence[Sample], rows: int, original: Original | None = None
) -> Expected:
    """Ask the live model (on its `original` weights, if given) and the live tokenizer everything that the file will be asked."""
    told = [sample for sample in samples if sample.prompt]
    if not told:
        raise UserError("an export is compared with the model on prompts, and none was given: pass some of the run's samples")
    texts, note = expected_texts(tokenizer, vocabulary, [ids for sample in told[:TEXT_CASES] for ids in (sample.prompt, sample.response)])
    pieces = [(ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for _, ids, _ in texts]
    own: float | None = None
    with reference(model, adapter, original):
        asked = ask(model, told, rows)
    if original is None and adapter is not None and is_on(model, adapter) and not computes_in_fp32(model):
        live = ask(model, told, rows)
        own = max(float(divergence(a.logits, b.logits).mean()) for a, b in zip(asked, live, strict=True))
    prompts = [sample.prompt[: max(1, room(model) - GREEDY)] for sample in told[:GREEDY_CASES]]
    dialogues, harmless = expected_dialogues(tokenizer, vocabulary), harmless_ends(vocabulary, told)
    specials: dict[str, Any] = {name: value for name in SPECIALS if (value := vocabulary.keys.get(f"tokenizer.ggml.{name}")) is not None}
    front = bool(vocabulary.keys.get("tokenizer.ggml.add_space_prefix"))
    return Expected(texts, pieces, front, note, dialogues, template_of(tokenizer) or "", specials, vocabulary.stop_ids, harmless, asked, prompts, own)


def harmless_ends(vocabulary: Vocabulary, samples: Sequence[Sample]) -> frozenset[int]:
    """Special tokens at which llama.cpp may stop although nobody asked it to: they are in fewer than one of ten sampled answers."""
    types = vocabulary.keys["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    special = {i for i, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNUSED)}
    often = Counter(i for sample in samples for i in set(sample.response))
    return frozenset(i for i in special if often[i] * 10 < len(samples))


def few(expected: Expected) -> Expected:
    """A tenth of it, for a file whose contents were compared already."""
    return replace(expected, texts=expected.texts[::10], pieces=expected.pieces[::10], dialogues=expected.dialogues[:2], asked=expected.asked[:2], prompts=[])
