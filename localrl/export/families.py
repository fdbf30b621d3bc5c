"""Which transformers models can be written as GGUF, and under which names and keys.

A family is a row of a table: the GGUF architecture, the modules of a layer and their tensors, and what llama.cpp's graph of that architecture
has fixed, so that a model of another mind is refused by name before anything is written.

| transformers | GGUF | beside what all have |
|---|---|---|
| llama (Llama 2 / 3, SmolLM, TinyLlama, ...), mistral | llama | rows of q and k interleaved |
| qwen2 (2.5), qwen3 | qwen2, qwen3 | |
| smollm3 | smollm3 | rows of q and k interleaved; every 4th layer without rope |
| gemma2, gemma3_text | gemma2, gemma3 | norms times 1 + w, two more of them; a window in most layers; capped scores and logits |
| phi3 (Phi-3, 3.5, Phi-4, Phi-4-mini) | phi3 | q, k, v in one projection, gate and up in another; longrope; a part of each head rotates |

Rotary embeddings are in `rope.py`. What the graphs do was read in llama.cpp's src/models/<arch>.cpp (load_arch_hparams and graph), and is proven
by the self-check, logit by logit. Left out, because nothing here proves them yet: mixtures of experts, models that see or hear, Gemma 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from localrl.export.rope import FULL, SLIDING, rope_keys, unstretched
from localrl.settings import UserError

Value = int | float | bool | str | list[str] | list[int] | list[float]
"""What a GGUF key may hold."""
Keys = dict[str, Value]

ATTENTION: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
}
MLP: Mapping[str, str] = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
LAYER: Mapping[str, str] = {"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **MLP}
"""Module within a layer -> tensor within a GGUF block, in the order in which they are written. A module that is not there has no tensor."""
GEMMA_LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    **ATTENTION,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    **MLP,
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Gemma 2 and 3 norm what a sublayer gives as well: the norm that others have before the MLP stands behind attention here."""
PHI_LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Fused: rows of q, k and v; of gate and up, in this order in llama.cpp too."""


def plain(config: Any) -> Keys:
    """No keys but those that all have."""
    return {}


@dataclass(frozen=True)
class Family:
    """How one transformers model type is written."""

    arch: str
    """GGUF's name of the architecture: llama.cpp picks its graph by it."""
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    """Module within a layer -> tensor within a GGUF block."""
    interleaved: bool = False
    """llama.cpp rotates neighbouring pairs here, transformers halves: the rows of q and k (and their biases) change places."""
    biases: frozenset[str] = frozenset()
    """Projections that may carry a bias."""
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Setting of the configuration -> its only value in the graph; None and False are the same."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """Rotary types that the graph computes."""
    partial: bool = False
    """A part of each head may stay as it is."""
    local: bool = False
    """Layers with a window have a rope_theta of their own."""
    square: bool = False
    """All heads together have to be as wide as the model."""
    norm_offset: float = 0.0
    """What transformers adds to every norm's weight when it computes, and llama.cpp does not."""
    windows: bool = False
    """llama.cpp gives layers their sliding window. (Else it has none, and a file is good up to the length of the window.)"""
    more: Callable[[Any], Keys] = plain
    """Keys (without the architecture's prefix) beyond those that all have; UserError for what the graph computes differently."""

    @property
    def projections(self) -> frozenset[str]:
        """Modules, by the last part of their names, that can carry LoRA."""
        return frozenset(path.split(".")[-1] for path in self.layer if path.endswith("_proj"))


def no_rope_keys(config: Any) -> Keys:
    """SmolLM3: every 4th layer has no rope, which is fixed in llama.cpp."""
    found, wanted = list(config.no_rope_layers), [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    if found[: len(wanted)] != wanted:
        raise UserError(f"no_rope_layers = {found} is not in llama.cpp's smollm3 graph, only every 4th layer without (1, 1, 1, 0, ...): keep the PEFT adapter")
    return {}


def gemma2_keys(config: Any) -> Keys:
    """Every second layer sees all; scores and logits are capped."""
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if missing := [name for name, cap in caps.items() if not cap]:
        raise UserError(f"{missing[0]} = {caps[missing[0]]} is not in llama.cpp's gemma2 graph, which always caps: keep the PEFT adapter")
    check_windows(config, "gemma2", every=2)
    check_scale(config, "gemma2", largest=46)
    return {"attention.sliding_window": int(config.sliding_window), **{name: float(cap) for name, cap in caps.items()}}


def gemma3_keys(config: Any) -> Keys:
    """Every sixth layer sees all (or each of them); only logits may be capped."""
    check_scale(config, "gemma3", largest=62)
    keys: Keys = {}
    if SLIDING in config.layer_types:  # without the key no layer has a window
        check_windows(config, "gemma3", every=6)
        keys["attention.sliding_window"] = int(config.sliding_window)
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def check_windows(config: Any, arch: str, *, every: int) -> None:
    """UserError unless every n-th layer sees all and the others have a window, as it is fixed in llama.cpp."""
    full = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    if full != list(range(every - 1, config.num_hidden_layers, every)):
        raise UserError(f"layer_types has full attention in {full}, llama.cpp's {arch} graph only in the last of every {every}: keep the PEFT adapter")
    if not config.sliding_window:
        raise UserError(f"sliding_window = {config.sliding_window} with sliding layers is not in llama.cpp's {arch} graph: keep the PEFT adapter")


def check_scale(config: Any, arch: str, *, largest: int) -> None:
    """UserError unless scores are divided as llama.cpp does: by the root of head_dim, in the 27B (which has `largest` layers) of hidden_size / heads."""
    wanted = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == largest else head_width(config)
    if config.query_pre_attn_scalar != wanted:
        raise UserError(
            f"query_pre_attn_scalar = {config.query_pre_attn_scalar} is not in llama.cpp's {arch} graph, only {wanted} with {config.num_hidden_layers} layers: "
            "keep the PEFT adapter"
        )


def phi3_keys(config: Any) -> Keys:
    """The window is written as others do, but llama.cpp knows none here; 0: there is none."""
    return {"attention.sliding_window": int(config.sliding_window or 0)}


QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
SILU: Mapping[str, Any] = {"hidden_act": "silu"}
GELU: Mapping[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": False}
GEMMA: Mapping[str, Any] = {"layer": GEMMA_LAYER, "ropes": ("default", "linear"), "norm_offset": 1.0, "windows": True}
ALL_ROPES = ("default", "linear", "llama3", "yarn")

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", interleaved=True, biases=QKV | {"self_attn.o_proj"} | set(MLP), ropes=ALL_ROPES),
    "mistral": Family("llama", interleaved=True, ropes=ALL_ROPES),
    "qwen2": Family("qwen2", biases=QKV, square=True),
    "qwen3": Family("qwen3", fixed={**SILU, "attention_bias": False}),
    "smollm3": Family("smollm3", interleaved=True, fixed={**SILU, "attention_bias": False, "mlp_bias": False}, more=no_rope_keys),
    "gemma2": Family("gemma2", fixed={**GELU, "tie_word_embeddings": True}, more=gemma2_keys, **GEMMA),
    "gemma3_text": Family("gemma3", fixed={**GELU, "attn_logit_softcapping": None}, local=True, more=gemma3_keys, **GEMMA),
    "phi3": Family("phi3", layer=PHI_LAYER, ropes=("default", "longrope"), partial=True, square=True, more=phi3_keys),
}


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
    for setting, value in family.fixed.items():
        found = getattr(config, setting, None)
        if (found or None) != (value or None):
            raise UserError(f"{setting} = {found!r} is not in llama.cpp's {family.arch} graph, only {value!r}: keep the PEFT adapter")
    heads, width = config.num_attention_heads, head_width(config)
    if family.square and heads * width != config.hidden_size:
        raise UserError(f"head_dim {width} x {heads} heads is not hidden_size {config.hidden_size}, as a {family.arch} GGUF must: keep the PEFT adapter")
    if strange := set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}:
        raise UserError(f"layers of type '{min(strange)}' are not in llama.cpp's {family.arch} graph: keep the PEFT adapter")
    special_keys(config, family)
    return family


def special_keys(config: Any, family: Family) -> Keys:
    """GGUF keys (without prefix) of everything that not all models have. UserError for what the graph computes differently."""
    rope = rope_keys(config, head_width(config), family.arch, family.ropes, partial=family.partial, local=family.local)
    return {**rope, **family.more(config)}


def head_width(config: Any) -> int:
    """Dimensions of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """Tokens for which a file is good: the model's own, but where llama.cpp has no sliding window the window is the limit."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True) or FAMILIES[config.model_type].windows:
        return longest
    return min(longest, int(window)) if SLIDING in (getattr(config, "layer_types", None) or [SLIDING]) else longest


def same_length(config: Any) -> int:
    """Up to how many tokens of room llama.cpp computes what transformers does: `context_length`, with longrope the original length."""
    return min(context_length(config), unstretched(config) or context_length(config))


def hyperparameters(config: Any, rows: int) -> dict[str, Value]:
    """Everything llama.cpp must know to build the graph. `rows`: of the embedding, at least the tokenizer's length."""
    width, family = head_width(config), family_of(config)
    keys: Keys = {
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
        **special_keys(config, family),
    }
    return {f"{family.arch}.{key}": value for key, value in keys.items()}


def row_order(config: Any, module: str, rows: int) -> torch.Tensor | None:
    """Which row of a projection llama.cpp wants where, or None: as they are. `module` is a key of the family's `layer`. -> (rows,) int64.

    >>> from transformers import LlamaConfig
    >>> tiny = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    >>> row_order(tiny, "self_attn.q_proj", 8).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if not family_of(config).interleaved or module not in ("self_attn.q_proj", "self_attn.k_proj"):
        return None
    heads = rows // head_width(config)
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)
