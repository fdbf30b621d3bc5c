"""Every kind of tokenizer that is accepted gives the same ids in llama.cpp; the others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from localrl.export import CheckReport, Sample, check_exportable, export
from localrl.export.expected import expected_texts
from localrl.export.tokenizer import Vocabulary, read_vocabulary
from localrl.settings import UserError
from tests.export.vocabularies import BITS, GPT2, KINDS, QWEN2, TEKKEN, LlamaVocabulary, byte_level, every_pair, sentencepiece, spaced_merges, split

NEWER = (
    (0x1C89, 0x1C8A), (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x105C0, 0x105F3), (0x10D40, 0x10D65), (0x10D6F, 0x10D85), (0x10EC2, 0x10EC4),
    (0x11380, 0x113D3), (0x116D0, 0x116E3), (0x11BC0, 0x11BE0), (0x11BF0, 0x11BF9), (0x13460, 0x143FA), (0x16100, 0x1611D), (0x16130, 0x16139),
    (0x16D40, 0x16D6C), (0x16D70, 0x16D79), (0x18CFF, 0x18CFF), (0x1CCF0, 0x1CCF9), (0x1E5D0, 0x1E5FA),
)  # fmt: skip
"""Where letters and digits came with Unicode 16, which `tokenizers` knows and llama.cpp (Unicode 15) does not."""
BYTE_LEVEL = [kind for kind, (pre, _) in KINDS.items() if pre != "default"]


def tiny(tokenizer: PreTrainedTokenizerFast, ends: list[int]) -> Any:
    """A one-layer model with a few rows more than the tokenizer has tokens."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=ends,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@dataclass(frozen=True)
class Both:
    """A tokenizer, and llama.cpp with the file that it was exported to."""

    kind: str
    tokenizer: Any
    vocabulary: Vocabulary
    llama: LlamaVocabulary
    report: CheckReport
    path: Path


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Each kind in turn."""
    kind = str(request.param)
    tokenizer = KINDS[kind][1]()
    more = "<|finis|>" if kind in BYTE_LEVEL else "<|end|>" if kind == "phi3" else None
    ends = [tokenizer.eos_token_id, *([tokenizer.convert_tokens_to_ids(more)] if more else [])]
    told = [Sample(tuple(tokenizer(f"{tokenizer.bos_token}Say 12 or 345, they'll isn't <tool> it.")["input_ids"]))]
    done = export(tiny(tokenizer, ends), tokenizer, tmp_path_factory.mktemp(kind), what="base", dtype="f32", samples=told)
    llama = LlamaVocabulary(done.path)
    yield Both(kind, tokenizer, read_vocabulary(tokenizer, len(tokenizer), ends), llama, done.report, done.path)
    llama.close()


def test_token_ids_and_template_are_the_same_in_llama_cpp(both: Both) -> None:
    fields, byte = GGUFReader(both.path).fields, both.kind in BYTE_LEVEL
    assert fields["tokenizer.ggml.pre"].contents() == KINDS[both.kind][0]
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (both.kind in ("llama3", "phi4") or (not byte and both.kind != "gemma"))
    assert fields["tokenizer.ggml.eos_token_id"].contents() == both.tokenizer.eos_token_id
    assert ("tokenizer.ggml.eot_token_id" in fields) == (byte or both.kind == "phi3")
    rows = {row.name: row for row in both.report.checks}
    for name in ("tokens", "text of tokens"):
        assert rows[name].value.split()[0] == rows[name].value.split()[2], "all of them"
        assert int(rows[name].value.split()[2]) > 40
    assert ("NFC" in rows["tokens"].detail) == (both.kind == "qwen2")
    assert ("capitals" in rows["tokens"].detail) == (both.kind in ("tekken", "gpt4o"))
    assert rows["chat template"].value == ("4 of 4 equal" if both.kind == "phi4" else "6 of 6 equal")
    assert GGUFReader(both.path).fields["general.name"].contents() == ("model (phi-3)" if both.kind == "phi3" else "model")


def old(text: str) -> bool:
    """Without code points that only one of the two knows."""
    return not any(low <= ord(c) <= high for c in text for low, high in NEWER)


ANY = st.characters(exclude_categories=["Cs"]).filter(old)
TEXTS = st.lists(st.one_of(st.sampled_from(BITS), st.sampled_from(BITS), ANY, st.integers(0, 9)), min_size=1, max_size=9)
"""Bits to be glued together; a number stands for one of the tokenizer's added tokens."""


def glued(parts: list[str | int], names: list[str]) -> str:
    return "".join(names[part % len(names)] if isinstance(part, int) else part for part in parts)


@settings(derandomize=True, max_examples=100, database=None)
@given(parts=TEXTS)
@example(parts=["x", 0, "  ", 1, "\n", 2, "\t ", 3, "y"])
@example(parts=[3, "\r\n", 3, " ", 0, " " * 40, 1])
@example(parts=["'ſ", "'S'LL'rE", "1" * 50, " ", "٣" * 5])
@example(parts=["👩🏽‍🚀", "❤️\u200d🔥", "e\u0301", "\u0301\u0301", " \u0301"])
@example(parts=["\u0627\u0644\u0633\u0651", "\u202e", "שָׁלוֹם", "a\x00b", "\x00"])
def test_any_text_is_tokenised_and_written_the_same(both: Both, parts: list[str | int]) -> None:
    """Added tokens within words, emoji and their modifiers, every script, controls, lines, digits; what is beyond a kind's limits is left out."""
    text = glued(parts, sorted(both.tokenizer.get_added_vocab()))
    if both.vocabulary.space_at_start:
        text = both.tokenizer.bos_token + text
    if any(limit.beyond(text) for limit in both.vocabulary.limits):
        return
    wanted = list(both.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert both.llama.encode(text) == wanted
    written = both.llama.decode(wanted)
    told = both.tokenizer.decode(wanted, clean_up_tokenization_spaces=False)
    assert told in (written, written.removeprefix(" ") if both.vocabulary.keys.get("tokenizer.ggml.add_space_prefix") else written)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("qwen2", "cafe\u0301"), ("tekken", "FÜR"), ("tekken", "हिन्दी"), ("gpt4o", "éÉ"), ("gemma", " ▁▁▁"),
        ("phi4", "a <|im_sep|>"), ("phi4", "<|im_sep|>\n"), ("phi3", "<|end|>\u3000x"),
    ],
)  # fmt: skip
def test_what_lies_beyond_a_limit_does_differ(kind: str, text: str, tmp_path: Path) -> None:
    """No limit is wider than it is true: this text is beyond one, and llama.cpp has other ids for it."""
    tokenizer = KINDS[kind][1]()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), [])
    assert any(limit.beyond(text) for limit in vocabulary.limits)
    llama = LlamaVocabulary.of(vocabulary, tmp_path)
    assert llama.encode(text) != list(tokenizer(text, add_special_tokens=False)["input_ids"])
    llama.close()


def test_a_run_whose_own_texts_lie_beyond_a_limit_is_refused() -> None:
    tokenizer = KINDS["tekken"][1]()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), [])
    mostly = [tokenizer(f"plain {i}")["input_ids"] for i in range(20)] + [tokenizer("हिन्दी")["input_ids"]]
    texts, note = expected_texts(tokenizer, vocabulary, mostly)
    assert "(1 of them the run's own) with combining marks" in note
    assert not any("हिन्दी" in text for text, _, _ in texts)
    with pytest.raises(UserError, match=r"3 of 23 of the run's own texts .* combining marks"):
        expected_texts(tokenizer, vocabulary, mostly + [tokenizer(f"हिन्दी {i}")["input_ids"] for i in (1, 2)])


def test_sentencepiece_with_a_space_at_the_start_only_is_compared_behind_special_tokens(tmp_path: Path) -> None:
    tokenizer = KINDS["mistral"][1]()
    told = [Sample(tuple(tokenizer("Hello you")["input_ids"]))]
    done = export(tiny(tokenizer, [2]), tokenizer, tmp_path, what="base", dtype="f32", samples=told)
    assert GGUFReader(done.path).fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert "behind <s>" in next(row.detail for row in done.report.checks if row.name == "tokens")


def test_a_run_called_phi_3_does_not_lose_its_spaces(tmp_path: Path) -> None:
    """llama.cpp goes by the name, and takes the spaces behind every special token of a model that is called so; or does not load it."""
    tokenizer = KINDS["gpt2"][1]()
    told = [Sample(tuple(tokenizer("Hello you")["input_ids"]))]
    done = export(tiny(tokenizer, [tokenizer.eos_token_id]), tokenizer, tmp_path, what="base", dtype="f32", samples=told, name="my-Phi-3")
    assert done.path.name == "my-Phi-3-base-f32.gguf"
    assert GGUFReader(done.path).fields["general.name"].contents() == "my-phi 3"


def test_a_template_with_spaces_that_its_tokens_take_is_refused(tmp_path: Path) -> None:
    tokenizer = KINDS["phi4"][1]()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_sep|>", "<|im_sep|>\n")
    told = [Sample(tuple(tokenizer("Hello")["input_ids"]))]
    with pytest.raises(UserError, match="chat template: 0 of 6 equal"):  # in each of them
        export(tiny(tokenizer, [tokenizer.eos_token_id]), tokenizer, tmp_path, what="base", dtype="f32", samples=told)


def test_tokens_that_take_spaces_almost_as_phi_3s_do_not_change_the_name() -> None:
    """One more that takes none: llama.cpp would take spaces from it, so the file is not called Phi-3 and texts with such spaces are left out."""
    tokenizer = with_added(KINDS["phi3"][1], AddedToken("<x>", normalized=False))
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), [])
    assert not vocabulary.takes_spaces and any(limit.beyond("<|end|> x") for limit in vocabulary.limits)
    tokenizer = KINDS["phi3"][1]()
    assert read_vocabulary(tokenizer, len(tokenizer), []).takes_spaces


def config_for(tokenizer: Any) -> Any:
    return AutoConfig.for_model("llama", vocab_size=len(tokenizer))


def with_added(make: Callable[[], PreTrainedTokenizerFast], *tokens: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = make()
    tokenizer.backend_tokenizer.add_tokens(list(tokens))
    return tokenizer


def with_merges(change: Callable[[list[tuple[str, str]]], list[tuple[str, str]]], **options: Any) -> PreTrainedTokenizerFast:
    vocabulary, merges = spaced_merges(False)
    return sentencepiece("never", merges=change(every_pair(vocabulary, merges)), **options)


def without_first(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A token that its own merges no longer make: that its parts may be put together is what llama.cpp goes by."""
    long = next(left + right for left, right in merges if len(left + right) == 3)
    return [merge for merge in merges if "".join(merge) != long]


def torn_apart(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One of a token's merges at the end of the list."""
    seen: set[str] = set()
    again = next(m for m in merges if len(set("".join(m))) > 1 and ("".join(m) in seen or seen.add("".join(m))))  # type: ignore[func-returns-value]
    return [m for m in merges if m != again] + [again]


def longest_space() -> int:
    return max(len(text) for text in spaced_merges(False)[0] if not text.strip("▁"))


def changed(make: Callable[[], PreTrainedTokenizerFast], **model: Any) -> PreTrainedTokenizerFast:
    spec = json.loads(make().backend_tokenizer.to_str())
    spec["model"] |= model
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)), "pre-tokenizer"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), "pre-tokenizer"),
        (lambda: byte_level(split(QWEN2 + "|x")), "pre-tokenizer"),
        (lambda: byte_level(split(QWEN2), ignore_merges=True), "pre-tokenizer"),
        (lambda: byte_level(split(TEKKEN)), "pre-tokenizer"),
        (lambda: byte_level(split(QWEN2), normalizer=normalizers.Lowercase()), "Lowercase"),
        (lambda: sentencepiece("always"), "Metaspace .prepend_scheme = 'always'"),
        (lambda: with_added(lambda: byte_level(GPT2), AddedToken("<x>", single_word=True)), "'<x>' has single_word = true"),
        (lambda: with_added(lambda: byte_level(GPT2), AddedToken("l>ab", normalized=False)), "'<tool>' and 'l>ab' overlap"),
        (lambda: with_added(lambda: byte_level(GPT2), AddedToken("[<tool>]", normalized=True)), r"'<tool>' lies within '\[<tool>\]'"),
        (lambda: with_added(sentencepiece, AddedToken("<x>", normalized=True)), "'<x>' is normalized to '▁<x>'"),
        (lambda: with_added(sentencepiece, AddedToken("a\0b", normalized=False)), r"'a\\x00b' is empty or holds a NUL"),
        (lambda: with_merges(without_first), "do not make the token"),
        (lambda: with_merges(torn_apart), "apart in the list"),
        (lambda: with_added(lambda: sentencepiece("gemma"), AddedToken("▁" * (longest_space() + 1), normalized=False)), "token '▁+' of its own"),
        (lambda: changed(sentencepiece, dropout=0.1), "dropout = 0.1"),
        (lambda: changed(lambda: byte_level(GPT2), dropout=0.1), "pre-tokenizer"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_do_exactly_is_refused(make: Callable[[], Any], word: str) -> None:
    tokenizer = make()
    with pytest.raises(UserError, match=word):
        check_exportable(config_for(tokenizer), {}, tokenizer)


def test_other_refusals_name_the_reason() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(UserError, match="WordLevel"):
        check_exportable(config_for(tokenizer), {}, tokenizer)
    tokenizer = byte_level(GPT2)
    with pytest.raises(UserError, match="rows"):
        check_exportable(AutoConfig.for_model("llama", vocab_size=len(tokenizer) - 1), {}, tokenizer)
    few = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    few.pre_tokenizer = GPT2
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=few, eos_token="</s>")
    with pytest.raises(UserError, match="254 of the 256 byte tokens"):
        check_exportable(config_for(tokenizer), {}, tokenizer)


def test_a_wrongly_named_pre_tokenizer_is_caught(tmp_path: Path) -> None:
    """The self-check does not trust the table: with another name of the same length in the file, it sees the texts that differ."""
    tokenizer = byte_level(split(QWEN2))
    told = [Sample(tuple(tokenizer("Hello 123")["input_ids"]))]

    def rename(done: int, total: int, name: str) -> None:
        if name == "self-check":
            field = GGUFReader(tmp_path / "model-base-f32.gguf.tmp", "r+").fields["tokenizer.ggml.pre"]
            field.parts[field.data[0]][:] = memoryview(b"gpt-2")

    with pytest.raises(UserError, match="tokens:"):
        export(tiny(tokenizer, [tokenizer.eos_token_id]), tokenizer, tmp_path, what="base", dtype="f32", samples=told, progress=rename)
