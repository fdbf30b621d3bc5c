"""Everything that a file will be asked, with the answers of the live model and the live tokenizer."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from gguf import TokenType
from torch import nn

from localrl.export.reference import GREEDY, Asked, Sample, ask, computes_in_fp32, divergence, is_on, reference, room
from localrl.export.tokenizer import Vocabulary, template_of
from localrl.settings import UserError

GREEDY_CASES = 2
"""Samples whose prompts are continued greedily."""
TEXT_CASES = 32
"""Samples whose prompts are also compared as text."""

PROBES = (
    "Hello world", " leading and trailing ", "two  spaces   three", "tabs\tand\nnewlines\n\n\nand\r\nmore \n \n end", "", " ", "\n", "a",
    "It's what they'll say: I'm, you've, he'd, we're, DON'T, CAN'T",
    "12345 + 67890 = 80235; 3.14159, 1,000,000 and 0x1F", "1 12 123 1234 12345",
    "CamelCase snake_case kebab-case SCREAMING_CASE iPhone",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n",
    "<b>html & entities</b> &amp; {json: [1, 2]}",
    "naïve café Ångström straße ﬁne", "Привет, мир! Ελληνικά",
    "你好，世界。今天天气很好 日本語のテスト 한국어", "שלום עולם مرحبا بالعالم", "हिन्दी ไทย",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 and ½ ² ③ € ™ …",
    "“quotes” ‘and’ — dashes – \u00a0nbsp \u200bzero \ufeffbom", "e\u0301 combining",
    "!!! ??? ... --- === *** ///", "$x^2 + \\frac{1}{2}$ \\boxed{42}",
    "<think>\nLet me see.\n</think>\n<answer>42</answer>",
    "https://example.org/a?b=c&d=%20#frag user@example.org", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)  # fmt: skip
"""Texts on which tokenizers are known to part."""

DIALOGUES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße! 你好"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nYes?"}, {"role": "user", "content": " Again\n"}],
)


Text = tuple[str, list[int], list[int] | None]
"""(text, its ids bare, its ids with what the tokenizer puts around a text; None: not asked)."""


@dataclass(frozen=True)
class Expected:
    """What the trained model says, gathered before the child starts."""

    texts: list[Text]
    pieces: list[tuple[list[int], str]]
    """(ids, the text they read as)."""
    note: str
    """Which texts were left out, because llama.cpp cannot do as the tokenizer does; empty: none."""
    dialogues: list[dict[str, Any]]
    stop_ids: tuple[int, ...]
    """What ends a reply, the tokenizer's eos first."""
    harmless_ends: frozenset[int]
    """What llama.cpp may take for an end of its own accord: special tokens that answers hardly hold."""
    asked: list[Asked]
    prompts: list[tuple[int, ...]]
    """To be continued greedily by llama.cpp; the model then says whether it agrees."""
    own_rounding: float | None
    """Mean KL of the live model from the fp32 reference; None: they are the same."""


def expected_texts(tokenizer: Any, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]]) -> tuple[list[Text], str]:
    """Probes, prompts as text, and added tokens within words (256 at most), with their ids. -> (texts, what was left out, if anything)."""
    added = [f"one{token}two {token} three" for token in list(tokenizer.get_added_vocab())[:256]]
    texts = list(dict.fromkeys([*PROBES, *(tokenizer.decode(list(p), clean_up_tokenization_spaces=False) for p in prompts), *added]))
    note = ""
    if vocabulary.normalises:
        kept = [text for text in texts if unicodedata.is_normalized("NFC", text)]
        note = f"without {len(texts) - len(kept)} texts that NFC changes, llama.cpp has no NFC"
        texts = kept
    if vocabulary.space_at_start:
        mark = tokenizer.bos_token or tokenizer.eos_token
        texts = [text if text.startswith(mark) else mark + text for text in texts]
        note = f"each behind {mark}: a text that begins without a special token lacks a space in llama.cpp"
    bare, dressed = ([list(tokenizer(text, add_special_tokens=add)["input_ids"]) for text in texts] for add in (False, True))
    return [(t, b, None if vocabulary.space_at_start else d) for t, b, d in zip(texts, bare, dressed, strict=True)], note


def expected_dialogues(tokenizer: Any) -> list[dict[str, Any]]:
    """Dialogues as the live tokenizer renders and tokenises them; those that its template refuses are left out."""
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
    return found


def expect(model: nn.Module, tokenizer: Any, adapter: str | None, vocabulary: Vocabulary, samples: Sequence[Sample], rows: int) -> Expected:
    """Ask the live model and the live tokenizer everything that the file will be asked."""
    told = [sample for sample in samples if sample.prompt]
    if not told:
        raise UserError("an export is compared with the model on prompts, and none was given: pass some of the run's samples")
    texts, note = expected_texts(tokenizer, vocabulary, [sample.prompt for sample in told[:TEXT_CASES]])
    pieces = [(ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for _, ids, _ in texts] if byte_level(vocabulary) else []
    own: float | None = None
    with reference(model, adapter):
        asked = ask(model, told, rows)
    if adapter is not None and is_on(model, adapter) and not computes_in_fp32(model):
        live = ask(model, told, rows)
        own = max(float(divergence(a.logits, b.logits).mean()) for a, b in zip(asked, live, strict=True))
    prompts = [sample.prompt[: max(1, room(model) - GREEDY)] for sample in told[:GREEDY_CASES]]
    dialogues, harmless = expected_dialogues(tokenizer), harmless_ends(vocabulary, told)
    return Expected(texts, pieces, note, dialogues, vocabulary.stop_ids, harmless, asked, prompts, own)


def harmless_ends(vocabulary: Vocabulary, samples: Sequence[Sample]) -> frozenset[int]:
    """Special tokens at which llama.cpp may stop although nobody asked it to: they are in fewer than one of ten sampled answers."""
    types = vocabulary.keys["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    special = {i for i, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNUSED)}
    often = Counter(i for sample in samples for i in set(sample.response))
    return frozenset(i for i in special if often[i] * 10 < len(samples))


def byte_level(vocabulary: Vocabulary) -> bool:
    """Whether pieces joined are the text; SentencePiece drops a leading space, once per text."""
    return vocabulary.keys["tokenizer.ggml.model"] == "gpt2"
