"""Small real models for every test: random weights, a byte-level tokenizer with a chat template, on disk as a person would have them."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

os.environ["LOCALRL_CACHE"] = tempfile.mkdtemp(prefix="localrl-cache-")    # what runs here teach is nobody's business; processes they start inherit it
signal.signal(signal.SIGINT, signal.default_int_handler)               # a shell's background jobs inherit that it is ignored
hypothesis.settings.register_profile("busy", deadline=None)           # a loaded machine is no reason to fail
hypothesis.settings.load_profile("busy")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, no merges, ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML)


def tiny_config(family: str, vocabulary: int, **changes: Any) -> Any:
    """A config of that family with two layers of width 64, grouped queries, and a head wider than hidden / heads where the family has it."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    }  # fmt: skip
    return AutoConfig.for_model(family, **(sizes | changes))


def save_tiny(folder: Path, family: str, **changes: Any) -> Path:
    """A small random model of that family and its tokenizer, into that folder."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer), **changes))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model("llama") -> folder with a small model of that family and its tokenizer; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = f"{family}-{sorted(changes.items())}"
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make
