"""Published models by their numbers, so that predictions can be made without a file of theirs."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch

from localrl.config import load_run
from localrl.memory.cards import Card
from localrl.memory.plan import MemoryPlan
from localrl.memory.shape import ModelShape
from localrl.planning import model_config, plan_on


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


@cache
def config_of(preset: str, layers: int | None = None) -> Any:
    """The transformers config of a preset's model, with more or fewer layers."""
    config = model_config(load_run(preset))
    if layers is not None:
        config.num_hidden_layers = layers
        config.layer_types = None if getattr(config, "layer_types", None) is None else (config.layer_types * layers)[:layers]
    return config


def a_plan(card: str | Card = "16GiB", preset: str = "qwen3-8b-16gb", layers: int | None = None, **changes: Any) -> MemoryPlan:
    """A preset's run on a card, but for what is changed: memory__offload=True. Its lines travel with the presets, so that little is simulated."""
    run = load_run(preset, None, [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items() if value is not None])
    place = Card.of(card, "cuda") if isinstance(card, str) else card
    return plan_on(run, config_of(preset, layers), place, torch.bfloat16 if place.device == "cuda" else torch.float32)
