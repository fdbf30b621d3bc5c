"""Model types whose memory can be predicted: a row each, for what their code does and their config does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What the config of one model type does not say, because its code does."""

    tied: bool = False
    """Whether the output layer is the embedding, where `tie_word_embeddings` is left out."""
    head_dim: int | None = None
    """Width of a head where `head_dim` is left out; None: hidden size / heads."""
    mlp: Literal["gated", "fused", "plain"] = "gated"
    """gate, up and down; gate and up in one layer; or only up and down (fc1, fc2)."""
    fused_attention: bool = False
    """Query, key and value are one layer."""
    attention_biases: Literal["setting", "qkv", "all", "none"] = "none"
    """Which projections carry a bias; setting: all, if `attention_bias` says so."""
    mlp_biases: bool = False
    """`mlp_bias` is read."""
    norms: int = 2
    """Norms of hidden width in a layer."""
    head_norms: bool = False
    """Queries and keys have a norm as wide as a head."""
    layer_norm: bool = False
    """LayerNorm with bias instead of RMSNorm, and an output layer with a bias."""
    full_attention_every: int = 1
    """Where `layer_types` is left out: every n-th layer sees all tokens, the others `sliding_window`; 1: every layer; 0: none does."""
    eager: bool = False
    """transformers computes its attention without a fused kernel: (heads, tokens, tokens) scores exist."""
    defaults: Mapping[str, int] | None = None
    """Values of keys that published configs leave out."""


_GEMMA3 = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(attention_biases="setting", mlp_biases=True),
    "mistral": Family(full_attention_every=0),
    "qwen2": Family(attention_biases="qkv"),
    "qwen3": Family(head_dim=128, attention_biases="setting", head_norms=True),
    "smollm3": Family(tied=True, attention_biases="setting", mlp_biases=True),
    "granite": Family(attention_biases="setting", mlp_biases=True),
    "gemma": Family(tied=True, head_dim=256, attention_biases="setting"),
    "gemma2": Family(tied=True, head_dim=256, attention_biases="setting", norms=4, full_attention_every=2, eager=True),
    "gemma3_text": Family(
        tied=True, head_dim=256, attention_biases="setting", norms=4, head_norms=True, full_attention_every=6, defaults=_GEMMA3
    ),
    "phi": Family(mlp="plain", attention_biases="all", norms=1, layer_norm=True),
    "phi3": Family(mlp="fused", fused_attention=True, full_attention_every=0),
}
"""Model types that can be read. A new one is a row, and a test compares every row with transformers' own model."""

SAME_BUILD: Mapping[str, str] = {"gemma3": "gemma3_text"}
