"""Published models by their numbers, so that predictions can be made without a file of theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrl.memory.plan import MemoryPlan, make_plan
from localrl.memory.shape import ModelShape


def _shape(kind: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, **more: Any) -> ModelShape:
    sizes = {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
    }  # fmt: skip
    return ModelShape.read({"model_type": kind, **sizes, **more})


MODELS = {
    "Llama-3.1-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128, 128_256),
    "Qwen3-8B": _shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151_936),
    "Qwen3-4B": _shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, tie_word_embeddings=True),
    "Qwen2.5-7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152_064),
    "Qwen3-14B": _shape("qwen3", 5120, 17408, 40, 40, 8, 128, 151_936),
    "Gemma-3-12B": _shape("gemma3_text", 3840, 15360, 48, 16, 8, 256, 262_208, sliding_window=1024),
    "SmolLM2-1.7B": _shape("llama", 2048, 8192, 24, 32, 32, 64, 49_152, tie_word_embeddings=True),
}


def untied(shape: ModelShape) -> ModelShape:
    """The same with an output layer of its own."""
    return replace(shape, tied=False, other=shape.other + shape.vocab * shape.hidden) if shape.tied else shape


def a_plan(shape: ModelShape, **changes: Any) -> MemoryPlan:
    """An ordinary run of that model on a card of 16 GiB, but for what is changed."""
    usual = {
        "card_bytes": "16GiB", "quantization": "nf4", "compute_bytes": 2, "lora_r": 16, "lora_targets": "all-linear", "critic": False,
        "optimizer": "adamw_8bit", "prompts_per_step": 8, "num_generations": 8, "max_prompt_length": 512, "max_completion_length": 1536,
        "fewest_generations": 8,
    }  # fmt: skip
    return make_plan(shape, **{**usual, **changes})
