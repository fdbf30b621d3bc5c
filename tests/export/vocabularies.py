"""Small tokenizers of every kind, trained on the project's own texts, and llama.cpp's side of an exported vocabulary."""

from __future__ import annotations

import ctypes
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

from localrl.export.added import model_name
from localrl.export.tokenizer import Vocabulary
from localrl.export.writer import add_keys

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

BITS = (
    "'s", "'S", "'ll", "'LL", "'re", "'Ve", "'d", "'", "a", "Z", "hello", "World", "HTTP", "éÉ", "É", "ß", "ſ", "İ", "ı", "für", "FÜR", "Привет", "Мир",
    "你好", "世界", "こんにちは", "ー", "한국", "שלום", "مرحبا", "ّ", "हिन्दी", "ไทย", "ำ", "ǅ", "ʰ", "ª", "1", "12", "1234567890", "٣", "²", "½", "Ⅷ", "五",
    " ", "  ", "     ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x00", "\x01", "\x1b", "\x1f", "\x7f", "\x85", "\x9f", "\u00a0",
    "\u1680", "\u180e", "\u2028", "\u3000", "\u200b", "\u200d", "\u200e", "\u202e", "\ufeff", "\u00ad", "\ufffd", "\ufffe", "\uffff", "\ue000", "\u0378",
    "\U0010ffff", "🙂", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "❤️", "🏳️‍🌈", "☎", "1️⃣", "\u0301", "\u0323", "e\u0301", "\u20e3",
    ".", ",", "!", "?!", "/", "//", "\\", "-", "_", "(",
    ")", "$", "+", "<", "<|", "|>", ">", "=", "==", "|", "~", "^", "`", "%", "€", "«", "…", "—", "𝕳", "𠜎", "x1", "1a", "don't", "I'LL", "v1.2.3", "a/b",
)  # fmt: skip
"""What pre-tokenizers part on, to be glued together in any order."""


@cache
def corpus() -> list[str]:
    """The project's pages, and bits glued at random: merges then grow across every boundary, and a wrong cut cannot hide."""
    pages = [path.read_text("utf-8") for path in sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))]
    draw = random.Random(0)
    return [line for page in pages for line in page.splitlines()][:800] + ["".join(draw.choices(BITS, k=3)) for _ in range(6000)]


def split(regex: str) -> Any:
    """Cut by a regex, then bytes, as published tokenizers do it."""
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def byte_merges() -> str:
    """A byte-level BPE trained without any cutting."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finis|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1600, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    )
    return str(inner.to_str())


def byte_level(
    pre: Any, *, ignore_merges: bool = False, normalizer: Any = None, bos: bool = False, **names: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1600 tokens with a Llama-3 like template, one added token that is not special, and two that hold spaces."""
    spec = json.loads(byte_merges())
    spec["model"]["ignore_merges"] = ignore_merges
    inner = Tokenizer.from_str(json.dumps(spec))
    inner.pre_tokenizer, inner.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool>", "    ", "\n\n\n\n")])
    if bos:
        begin = ("<|begin|>", inner.token_to_id("<|begin|>"))
        inner.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|begin|>", eos_token="<|eot_id|>", chat_template=TEMPLATE, **names)


@cache
def spaced_merges(prefix: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE over U+2581 for spaces, trained here, with byte tokens in front: (vocabulary, merges)."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    lines = [line.replace("\0", "") for line in corpus()]
    counts = Counter("".join(lines).replace(" ", ""))
    letters = ["▁", *sorted(counts, key=lambda c: (-counts[c], c))[:149]]  # named, for among equals the trainer draws
    plain = trainers.BpeTrainer(vocab_size=1400, limit_alphabet=150, initial_alphabet=letters, max_token_length=12, show_progress=False)
    trained.train_from_iterator(lines, plain)
    spec = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {name: i for i, name in enumerate([*names, *sorted(spec["vocab"], key=spec["vocab"].get)])}
    return vocabulary, [tuple(merge) for merge in spec["merges"]]


def every_pair(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """As converted from SentencePiece: whatever two tokens make a third is a merge, by the third's place."""
    order = list(dict.fromkeys(left + right for left, right in merges))
    return [(t[:i], t[i:]) for t in order for i in range(1, len(t)) if t[:i] in vocabulary and t[i:] in vocabulary]


def sentencepiece(
    form: str = "prepend", *, converted: bool = False, rstrip: bool = False, added: tuple[AddedToken, ...] = (), merges: Any = None,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A SentencePiece-like BPE with byte fallback. `form`: prepend (Llama 2, Phi-3), gemma, or Metaspace's prepend_scheme."""
    vocabulary, trained = spaced_merges(form == "prepend")
    pairs = merges or (every_pair(vocabulary, trained) if converted else trained)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [decoders.Strip(" ", 1, 0)] if form in ("prepend", "first") else []
    if form == "gemma":
        inner.normalizer, inner.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    elif form == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    phi = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"] if rstrip else []
    inner.add_special_tokens(["<unk>", "<s>"])
    inner.add_special_tokens([AddedToken(text, rstrip=rstrip and text != "<|endoftext|>", normalized=False) for text in ("</s>", *phi)])
    inner.add_tokens(list(added))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    if rstrip:
        template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>\n"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)


def gemma() -> GemmaTokenizer:
    """As transformers builds Gemma's: runs of spaces and of lines are tokens, which SentencePiece merges first, and which are added once more."""
    vocabulary, trained = spaced_merges(False)
    runs = [sign * count for sign in ("\n", "▁") for count in range(2, 32)]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", *runs, "<table>", *(f"<0x{i:02X}>" for i in range(256))]
    learned = [name for name in [*vocabulary, "\n"] if name not in {*names, "<s>", "</s>"}]
    merges = [(run[:i], run[i:]) for run in runs for i in range(1, len(run))]
    every = {name: i for i, name in enumerate([*names, *dict.fromkeys(learned)])}
    pairs = every_pair(every, [merge for merge in trained if "".join(merge) not in runs])
    tokenizer = GemmaTokenizer(vocab=every, merges=merges + pairs)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in [*runs, "<table>"]])
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


def phi4() -> PreTrainedTokenizerFast:
    """Special tokens take the spaces on both sides, which llama.cpp does for none of them."""
    tokenizer = byte_level(split(CL100K), bos=True)
    marks = [AddedToken(name, special=True, normalized=False, lstrip=True, rstrip=True) for name in ("<|im_start|>", "<|im_sep|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    )
    return tokenizer


SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
KINDS: dict[str, tuple[str, Callable[[], PreTrainedTokenizerFast]]] = {
    "gpt2": ("gpt-2", lambda: byte_level(GPT2)),
    "smollm": ("smollm", lambda: byte_level(SMOLLM)),
    "qwen2": ("qwen2", lambda: byte_level(split(QWEN2), normalizer=normalizers.NFC())),
    "qwen3.5": ("qwen35", lambda: byte_level(split(QWEN35))),
    "llama3": ("llama-bpe", lambda: byte_level(split(LLAMA3), ignore_merges=True, bos=True)),
    "phi4": ("dbrx", phi4),
    "tekken": ("tekken", lambda: byte_level(split(TEKKEN), ignore_merges=True)),
    "gpt4o": ("gpt-4o", lambda: byte_level(split(GPT4O))),
    "llama2": ("default", lambda: sentencepiece(converted=True)),
    "llama2-trained": ("default", sentencepiece),
    "mistral": ("default", lambda: sentencepiece("first", converted=True)),
    "gemma": ("default", gemma),
    "phi3": ("default", lambda: sentencepiece(converted=True, rstrip=True)),
}
"""Kind -> (the name of its pre-tokenizer in the file, how to make one)."""


class LlamaVocabulary:
    """llama.cpp's side: the vocabulary of a file, without its weights."""

    def __init__(self, path: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.room = (llama_cpp.llama_token * 8192)()

    @classmethod
    def of(cls, vocabulary: Vocabulary, folder: Path) -> LlamaVocabulary:
        """From a file that holds nothing else."""
        path = folder / "vocabulary.gguf"
        writer = GGUFWriter(path, "llama")
        add_keys(writer, {"general.name": model_name("x", vocabulary.takes_spaces)} | dict(vocabulary.keys))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return cls(path)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands, special tokens within it read as such."""
        raw = text.encode()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), self.room, len(self.room), False, True)
        assert count >= 0
        return list(self.room[:count])

    def decode(self, ids: list[int]) -> str:
        """The pieces of tokens, one behind the other."""
        buffer = ctypes.create_string_buffer(256)
        raw = b""
        for i in ids:
            size = llama_cpp.llama_token_to_piece(self.vocab, i, buffer, 256, 0, True)
            raw += buffer.raw[:size]
        return raw.decode()

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_model_free(self.model)
