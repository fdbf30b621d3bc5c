"""Which transformers models can be written as GGUF, and under which names and keys.

A family is a row of a table: the GGUF architecture and whether llama.cpp wants the rows of the query and key projections interleaved.
Supported: Llama 2 / 3 and what shares their code (SmolLM, TinyLlama, ...), Mistral, Qwen2, Qwen2.5, Qwen3.

Left out, because nothing here proves them yet: mixtures of experts, Gemma (norm + 1, soft caps), Phi (fused projections, longrope), SmolLM3
(layers without rope). They are refused by name, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from localrl.settings import UserError

Value = int | float | bool | str | list[str] | list[int] | list[float]
"""What a GGUF key may hold."""


@dataclass(frozen=True)
class Family:
    """How one transformers model type is written."""

    arch: str
    """GGUF's name of the architecture: llama.cpp picks its graph by it."""
    interleaved: bool
    """llama.cpp rotates neighbouring pairs here, transformers halves: the rows of q and k (and their biases) change places."""
    biases: frozenset[str] = frozenset()
    """Projections that may carry a bias."""


ATTENTION = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"})
MLP = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", interleaved=True, biases=ATTENTION | MLP),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2", interleaved=False, biases=ATTENTION - {"self_attn.o_proj"}),
    "qwen3": Family("qwen3", interleaved=False),
}

LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module within a layer -> tensor within a GGUF block, in the order in which they are written."""


def family_of(config: Any) -> Family:
    """The family of a transformers configuration; UserError for what llama.cpp would compute differently.

    >>> from transformers import Qwen3Config
    >>> family_of(Qwen3Config()).arch
    'qwen3'
    """
    kind = str(config.model_type)
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"a model of type '{kind}' cannot be written as GGUF, only {known}: keep the checkpoint's PEFT adapter instead")
    if config.hidden_act != "silu":
        raise UserError(f"hidden_act = '{config.hidden_act}' is not in llama.cpp's {family.arch} graph, only 'silu': keep the PEFT adapter")
    if getattr(config, "attention_bias", False) and "self_attn.o_proj" not in family.biases:
        raise UserError(f"attention_bias = true is not in llama.cpp's {family.arch} graph, only false: keep the PEFT adapter")
    heads, width = config.num_attention_heads, head_width(config)
    if family.arch == "qwen2" and heads * width != config.hidden_size:
        raise UserError(f"head_dim {width} x {heads} heads is not hidden_size {config.hidden_size}, as a qwen2 GGUF must: keep the PEFT adapter")
    rope_scaling(config)
    return family


def head_width(config: Any) -> int:
    """Dimensions of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary settings as one mapping with `rope_type` and `rope_theta`, wherever this version of transformers keeps them."""
    rope = dict(getattr(config, "rope_scaling", None) or {}) | dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return rope


def rope_scaling(config: Any) -> dict[str, Value]:
    """GGUF keys (without the architecture's prefix) of the rotary scaling; UserError where llama.cpp's would differ."""
    rope = rope_of(config)
    kind = rope["rope_type"]
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor = {rope['partial_rotary_factor']} cannot be written as GGUF here, only 1: keep the PEFT adapter")
    if kind in ("default", "llama3"):  # llama3's factors travel as a tensor, see rope_factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        odd = {k: rope[k] for k, usual in YARN.items() if rope.get(k) not in (None, usual)}
        if odd:
            raise UserError(f"yarn with {odd} has no counterpart in llama.cpp, only {YARN}: keep the PEFT adapter")
        original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]), "rope.scaling.original_context_length": original}
    raise UserError(f"rope_type = '{kind}' cannot be written as GGUF, only default, linear, llama3 and yarn: keep the PEFT adapter")


YARN: Mapping[str, Any] = {
    "beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True,
}  # fmt: skip
"""yarn's settings as llama.cpp has them fixed."""


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """What each rotary frequency is divided by, for Llama 3's scaling: (head_dim / 2,) float32, or None.

    >>> from transformers import LlamaConfig
    >>> rope_factors(LlamaConfig()) is None
    True
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width = head_width(config)
    wave = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float64) / width)
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth = np.clip((original / wave - low) / (high - low), 0.0, 1.0)  # 1: a short wave, kept; 0: a long one, stretched
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def context_length(config: Any) -> int:
    """Tokens for which llama.cpp computes what transformers does: it has no sliding window here, so the window is the limit."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))


def hyperparameters(config: Any, rows: int) -> dict[str, Value]:
    """Everything llama.cpp must know to build the graph. `rows`: of the embedding, at least the tokenizer's length."""
    width = head_width(config)
    keys: dict[str, Value] = {
        "vocab_size": rows,
        "context_length": context_length(config),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads or config.num_attention_heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(rope_of(config)["rope_theta"]),
        **rope_scaling(config),
    }
    return {f"{family_of(config).arch}.{key}": value for key, value in keys.items()}


def row_order(config: Any, module: str, rows: int) -> torch.Tensor | None:
    """Which row of a projection llama.cpp wants where, or None: as they are. `module` is a key of LAYER. -> (rows,) int64.

    >>> from transformers import LlamaConfig
    >>> tiny = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    >>> row_order(tiny, "self_attn.q_proj", 8).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if not family_of(config).interleaved or module not in ("self_attn.q_proj", "self_attn.k_proj"):
        return None
    heads = rows // head_width(config)
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)
