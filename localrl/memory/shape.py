"""What a model is made of, read from its `config.json`: enough to count its weights, its cache and its activations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localrl.memory.families import FAMILIES, SAME_BUILD, Family
from localrl.settings import UserError, nearest

Quantization = Literal["nf4", "int8", "none"]
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotations that do not depend on how long a sequence is."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Linear:
    """One linear layer of every decoder layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def numbers(self) -> int:
        """Entries of the weight, the bias not among them."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only transformer. Counts are of parameters, not bytes, unless they say so."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """The output layer is the embedding."""
    linears: tuple[Linear, ...]
    """Of one decoder layer: what bitsandbytes quantises and LoRA adapts."""
    other: int
    """Embedding, output layer, norms, biases: what is never quantised."""
    window: int | None = None
    """Tokens that a layer with a sliding window looks back; None: there is no such layer."""
    windowed_layers: int = 0
    norms: int = 2
    """Norms of hidden width in a layer."""
    head_norms: bool = False
    """Queries and keys have norms of their own."""
    eager: bool = False
    """Attention scores (heads, tokens, tokens) exist."""
    softcapped: bool = False
    """Logits are squashed by a soft cap."""
    static_rope: bool = True
    """Rotations do not depend on how long a sequence is."""
    not_counted: tuple[str, ...] = ()
    """Parts of the checkpoint that these numbers leave out."""

    @classmethod
    def read(cls, config: Mapping[str, Any] | str | Path) -> ModelShape:
        """From a transformers config: its values, its `config.json`, or the folder that holds it.

        Raises UserError for what cannot be read, is no dense decoder, or is quantised already by something else than bitsandbytes.

        >>> shape = ModelShape.read(dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        ...     num_attention_heads=32, num_key_value_heads=8, vocab_size=128256))
        >>> shape.quantisable, shape.other, shape.kv_bytes(1)
        (6979321856, 1050939392, 131072)
        """
        values = config if isinstance(config, Mapping) else _load(Path(config))
        return _read(values)

    @property
    def quantisable(self) -> int:
        """Parameters that bitsandbytes quantises: every linear layer's weight but the output layer's."""
        return self.layers * sum(linear.numbers for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.quantisable + self.other

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def largest(self) -> int:
        """Entries of the largest weight that is quantised."""
        return max(linear.numbers for linear in self.linears)

    def base_bytes(self, quantization: Quantization, compute_bytes: int) -> int:
        """Of the loaded base. nf4 with double quantisation: half a byte, an 8-bit scale for 64, an fp32 scale for 256 of those."""
        weight = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "none": float(compute_bytes)}[quantization]
        rows = 4 * self.layers * sum(linear.outputs for linear in self.linears) if quantization == "int8" else 0
        return round(self.quantisable * weight) + rows + self.other * compute_bytes

    def kv_bytes(self, tokens: int, compute_bytes: int = 2, *, windowed: bool = False) -> int:
        """Of the cache of one sequence. `windowed`: layers with a sliding window keep no more than the window."""
        short = min(tokens, self.window) if windowed and self.window else tokens
        full = self.layers - self.windowed_layers
        return 2 * self.keys * compute_bytes * (full * tokens + self.windowed_layers * short)

    def adapter_parts(self, r: int, targets: str | Sequence[str]) -> list[int]:
        """Entries of every LoRA matrix, A and B of each target in each layer. "all-linear": every linear layer but the output layer.

        Raises UserError for a target that is none of the layers'.
        """
        names = [linear.name for linear in self.linears]
        wanted = names if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
        for target in wanted:
            if target not in names:
                raise UserError(f"adapter target '{target}' is no linear layer of a {self.family}: {nearest(target, names)}")
        one = [size for linear in self.linears if linear.name in wanted for size in (r * linear.inputs, r * linear.outputs)]
        return one * self.layers


def _load(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config.json at {path}: name the model's folder or its config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not a model's settings")
    return values


def _read(values: Mapping[str, Any]) -> ModelShape:
    text = values.get("text_config") or values
    kind = str(text.get("model_type") or values.get("model_type") or "")
    kind = SAME_BUILD.get(kind, kind)
    _refuse_experts(text, kind)
    _refuse_quantised(values)
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(f"model type '{kind}' is not one whose memory can be predicted: {nearest(kind, FAMILIES)}")
    number = _Numbers({**(family.defaults or {}), **{k: v for k, v in text.items() if v is not None}}, kind)
    heads = number("num_attention_heads")
    hidden = number("hidden_size")
    head_dim = number("head_dim", family.head_dim or hidden // heads)
    kv_heads = number("num_key_value_heads", heads)
    ffn, vocab, layers = number("intermediate_size"), number("vocab_size"), number("num_hidden_layers")
    tied = bool(text.get("tie_word_embeddings", values.get("tie_word_embeddings", family.tied)))
    linears = (*_attention(family, text, hidden, heads * head_dim, kv_heads * head_dim), *_mlp(family, text, hidden, ffn))
    window, windowed = _windows(family, text, layers)
    return ModelShape(
        family=kind, layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab, tied=tied,
        linears=linears, other=_other(family, text, linears, layers, hidden, head_dim, vocab, tied),
        window=window, windowed_layers=windowed,
        norms=family.norms, head_norms=family.head_norms, eager=family.eager,
        softcapped=bool(text.get("final_logit_softcapping", kind == "gemma2")), static_rope=_rope(text) in STATIC_ROPE,
        not_counted=("the image tower of the checkpoint",) if "vision_config" in values else (),
    )  # fmt: skip


@dataclass(frozen=True)
class _Numbers:
    values: Mapping[str, Any]
    kind: str

    def __call__(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"the config of this {self.kind} lacks '{key}': take the config.json that belongs to the weights")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"the config of this {self.kind} has {key} = {value!r}: a whole number above 0 is wanted")
        return value


def _refuse_experts(text: Mapping[str, Any], kind: str) -> None:
    count = max((value for key in _EXPERTS if isinstance(value := text.get(key), int)), default=0)
    if count > 1 or "moe" in kind or kind in ("mixtral", "gpt_oss"):
        many = f"its {count} experts" if count > 1 else "its experts"
        raise UserError(f"'{kind}' is a mixture of experts, and bitsandbytes does not quantise {many}: take a dense model")


def _refuse_quantised(values: Mapping[str, Any]) -> None:
    told = values.get("quantization_config")
    if told is None:
        return
    method = str(told.get("quant_method", "unknown")) if isinstance(told, Mapping) else "unknown"
    if method != "bitsandbytes":
        raise UserError(f"the checkpoint is already quantised by '{method}', which localrl cannot train: take the original checkpoint")


def _attention(family: Family, text: Mapping[str, Any], hidden: int, queries: int, keys: int) -> tuple[Linear, ...]:
    every = family.attention_biases == "all" or (family.attention_biases == "setting" and bool(text.get("attention_bias", False)))
    inner = every or family.attention_biases == "qkv"
    last = "dense" if family.mlp == "plain" else "o_proj"
    if family.fused_attention:
        return (Linear("qkv_proj", hidden, queries + 2 * keys), Linear("o_proj", queries, hidden))
    return (
        Linear("q_proj", hidden, queries, inner),
        Linear("k_proj", hidden, keys, inner),
        Linear("v_proj", hidden, keys, inner),
        Linear(last, queries, hidden, every),
    )


def _mlp(family: Family, text: Mapping[str, Any], hidden: int, ffn: int) -> tuple[Linear, ...]:
    bias = family.mlp_biases and bool(text.get("mlp_bias", False))
    if family.mlp == "plain":
        return (Linear("fc1", hidden, ffn, True), Linear("fc2", ffn, hidden, True))
    if family.mlp == "fused":
        return (Linear("gate_up_proj", hidden, 2 * ffn), Linear("down_proj", ffn, hidden))
    return (Linear("gate_proj", hidden, ffn, bias), Linear("up_proj", hidden, ffn, bias), Linear("down_proj", ffn, hidden, bias))


def _other(
    family: Family, text: Mapping[str, Any], linears: Sequence[Linear], layers: int, hidden: int, head_dim: int, vocab: int, tied: bool
) -> int:
    norm = 2 * hidden if family.layer_norm else hidden
    inside = family.norms * norm + sum(linear.outputs for linear in linears if linear.bias)
    if family.head_norms:
        inside += 2 * head_dim
    if family.layer_norm and text.get("qk_layernorm"):              # of a head's width, with bias
        inside += 4 * head_dim
    output = (0 if tied else vocab * hidden) + (vocab if family.layer_norm else 0)
    return vocab * hidden + output + norm + layers * inside


def _rope(text: Mapping[str, Any]) -> str:
    told = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return str(told.get("rope_type", told.get("type", "default"))) if isinstance(told, Mapping) else "default"


def _windows(family: Family, text: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """(tokens, layers): the sliding window and how many layers have one."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or window < 1 or text.get("use_sliding_window") is False:
        return None, 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list | tuple):
        count = sum(kind == "sliding_attention" for kind in kinds)
    elif isinstance(first := text.get("max_window_layers"), int):
        count = max(0, layers - first)
    else:
        every = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", family.full_attention_every))
        count = layers - (layers // every if isinstance(every, int) and every > 0 else 0)
    return (window, count) if count else (None, 0)
