"""Every kind of tokenizer that is accepted gives the same ids in llama.cpp; the others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GemmaTokenizer, PreTrainedTokenizerFast

from localrl.export import Sample, check_exportable, export
from localrl.settings import UserError

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's what they'll say, isn't it?",
    "def add(a, b):\n    return a + b  # 12345 and 67890\n\n\nprint(add(1, 22))",
    "naïve café, Ångström, Привет мир, 你好世界, こんにちは, 한국어, emoji 🙂🙂",
    "HELLO World helloWorld HelloWorld hello_world 1 12 123 1234",
] * 4

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def split(regex: str) -> Any:
    """Cut by a regex, then bytes, as published tokenizers do it."""
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(
    pre: Any, *, ignore_merges: bool = False, normalizer: Any = None, bos: bool = False, **names: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, trained here, with a Llama-3 like template."""
    inner = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    inner.pre_tokenizer, inner.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    special = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finis|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    )
    inner.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", inner.token_to_id("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|begin|>", eos_token="<|eot_id|>", chat_template=TEMPLATE, **names)


def sentencepiece(*, metaspace: str = "") -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE with byte fallback and a Llama-2 like template."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    spec = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {name: i for i, name in enumerate([*names, *sorted(spec["vocab"], key=spec["vocab"].get)])}
    merges = [tuple(merge) for merge in spec["merges"]]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)


def gemma() -> GemmaTokenizer:
    """As transformers builds Gemma's: runs of spaces and of lines are tokens, which SentencePiece merges first, and which are added once more."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    spec = json.loads(trained.to_str())["model"]
    runs = [sign * count for sign in ("\n", "▁") for count in range(2, 32)]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", *runs, "<table>", *(f"<0x{i:02X}>" for i in range(256))]
    learned = [name for name in [*sorted(spec["vocab"], key=spec["vocab"].get), "\n"] if name not in names]
    vocab = {name: i for i, name in enumerate([*names, *dict.fromkeys(learned)])}
    merges = [(run[:i], run[i:]) for run in runs for i in range(1, len(run))]
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges + [m for merge in spec["merges"] if (m := tuple(merge)) not in merges])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in [*runs, "<table>"]])
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


def phi3() -> PreTrainedTokenizerFast:
    """Special tokens take the spaces and lines behind them."""
    tokenizer = sentencepiece()
    taking = ["</s>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False, rstrip=True) for name in taking], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return tokenizer


def phi4() -> PreTrainedTokenizerFast:
    """Special tokens take the spaces on both sides, which llama.cpp does for none of them."""
    tokenizer = byte_level(split(LLAMA3))
    marks = [AddedToken(name, special=True, normalized=False, lstrip=True, rstrip=True) for name in ("<|im_start|>", "<|im_sep|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    )
    return tokenizer


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level(GPT2),
    "smollm": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
    "qwen2": lambda: byte_level(split(QWEN2), normalizer=normalizers.NFC()),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True, bos=True),
    "dbrx": lambda: byte_level(split(LLAMA3), bos=True),
    "tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
    "default": sentencepiece,
}


def tiny(tokenizer: PreTrainedTokenizerFast, ends: list[int]) -> Any:
    """A one-layer model with a few rows more than the tokenizer has tokens."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=ends,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_and_template_are_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    ends = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(["<|finis|>"]) if kind != "default" else [])]
    told = [Sample(tuple(tokenizer("Say 12 or 345, they'll isn't <tool> it.")["input_ids"]))]
    done = export(tiny(tokenizer, ends), tokenizer, tmp_path, what="base", dtype="f32", samples=told)
    fields = GGUFReader(done.path).fields
    assert fields["tokenizer.ggml.pre"].contents() == kind
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (kind in ("llama-bpe", "dbrx", "default"))
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert ("tokenizer.ggml.eot_token_id" in fields) == (kind != "default")
    rows = {row.name: row for row in done.report.checks}
    assert rows["tokens"].value.split()[0] == rows["tokens"].value.split()[2], "all of them"
    assert int(rows["tokens"].value.split()[2]) > 40
    assert ("NFC" in rows["tokens"].detail) == (kind == "qwen2")
    assert rows["chat template"].value == "6 of 6 equal"


def test_sentencepiece_with_a_space_at_the_start_only_is_compared_behind_special_tokens(tmp_path: Path) -> None:
    tokenizer = sentencepiece(metaspace="first")
    told = [Sample(tuple(tokenizer("Hello you")["input_ids"]))]
    done = export(tiny(tokenizer, [2]), tokenizer, tmp_path, what="base", dtype="f32", samples=told)
    assert GGUFReader(done.path).fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert "behind <s>" in next(row.detail for row in done.report.checks if row.name == "tokens")


SPACES = "if x:\n    return  y\n\n\n" + " " * 13 + "z   <table>  a▁▁b"


def test_gemmas_runs_of_spaces_are_merged_and_written_out_as_spaces(tmp_path: Path) -> None:
    tokenizer = gemma()
    told = [Sample(tuple(tokenizer(SPACES)["input_ids"]))]
    assert {"▁" * 4, "▁" * 13, "\n\n\n", "<table>"} <= set(tokenizer.convert_ids_to_tokens(told[0].prompt))
    done = export(tiny(tokenizer, [1, 6]), tokenizer, tmp_path, what="base", dtype="f32", samples=told)
    rows = {row.name: row.value.split() for row in done.report.checks}
    for name in ("tokens", "text of tokens"):
        assert rows[name][0] == rows[name][2] and int(rows[name][2]) > 90
    assert rows["chat template"][0] == rows["chat template"][2] != "0"


@pytest.mark.parametrize("name", ["sums", "my Phi-3 run"])
def test_phi3s_special_tokens_take_the_spaces_behind_them(name: str, tmp_path: Path) -> None:
    tokenizer = phi3()
    told = [Sample(tuple(tokenizer("<|user|>\n Hello you<|end|>\n<|assistant|>\n")["input_ids"]))]
    done = export(tiny(tokenizer, [2]), tokenizer, tmp_path, what="base", dtype="f32", samples=told, name=name)
    assert GGUFReader(done.path).fields["general.name"].contents() == {"sums": "sums (Phi-3)"}.get(name, name)
    rows = {row.name: row for row in done.report.checks}
    assert rows["chat template"].value == "6 of 6 equal" and not rows["tokens"].detail


def test_others_must_not_be_called_phi_3(tmp_path: Path) -> None:
    """llama.cpp would take spaces from them, and does not load a vocabulary without </s>."""
    tokenizer = byte_level(GPT2)
    told = [Sample(tuple(tokenizer("Hello")["input_ids"]))]
    done = export(tiny(tokenizer, [tokenizer.eos_token_id]), tokenizer, tmp_path, what="base", dtype="f32", samples=told, name="not-phi3")
    assert done.path.name == "not-phi3-base-f32.gguf"
    assert GGUFReader(done.path).fields["general.name"].contents() == "not-Phi 3"


def test_texts_with_spaces_that_a_token_takes_are_left_out_and_told(tmp_path: Path) -> None:
    tokenizer = phi4()
    told = [Sample(tuple(tokenizer("<|im_start|>user<|im_sep|>Hello<|im_end|>")["input_ids"]))]
    done = export(tiny(tokenizer, [tokenizer.eos_token_id]), tokenizer, tmp_path, what="base", dtype="f32", samples=told)
    rows = {row.name: row for row in done.report.checks}
    assert "spaces beside <|im_start|> and its like" in rows["tokens"].detail and rows["chat template"].value == "4 of 4 equal"
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_sep|>", "<|im_sep|>\n")
    with pytest.raises(UserError, match="chat template: 0 of 6 equal"):  # in each of them
        export(tiny(tokenizer, [tokenizer.eos_token_id]), tokenizer, tmp_path, what="base", dtype="f32", samples=told)


def config_for(tokenizer: Any) -> Any:
    return AutoConfig.for_model("llama", vocab_size=len(tokenizer))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)), "pre-tokenizer"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), "pre-tokenizer"),
        (lambda: byte_level(split(QWEN2 + "|x")), "pre-tokenizer"),
        (lambda: byte_level(split(QWEN2), ignore_merges=True), "pre-tokenizer"),
        (lambda: byte_level(split(QWEN2), normalizer=normalizers.Lowercase()), "Lowercase"),
        (lambda: sentencepiece(metaspace="always"), "Metaspace"),
    ],
)
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
