"""The hand-written forward pass of the Llama, Mistral, Qwen2 and Qwen3 classes, for prompts and for one token a row.

The same arithmetic as transformers', with the parts that cost most on small batches taken out: no module calls around the linear layers
(they may be scratch copies, see `weights`), q, k and v in one product and gate and up in another, rotations looked up in one table, and an
attention (`cache`) that reads a group's prompt once. Its logits equal the model's to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localrl.devices import kind_of
from localrl.engines.cache import Cache, Shape
from localrl.engines.weights import Linear, common_dtype, live, multiply, unpacked
from localrl.pieces import watched

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
PREFILL_TOKENS = 4096
"""Tokens, padding included, of one forward pass over prompts."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, q (n, Hq, D), k and v (n, Hkv, D) -> (n, Hq * D)."""


def bare_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def misfit(model: Any, longest: int) -> str | None:
    """Why this model must go through its own forward pass for sequences of up to `longest` tokens; None: `Decoder` knows it."""
    bare = bare_model(model)
    config = bare.config
    if type(bare).__name__ not in FAMILIES or not type(bare).__module__.startswith("transformers."):
        return f"{type(bare).__name__} is none of {', '.join(FAMILIES)}"
    if bare.model.rotary_emb.rope_type not in STATIC_ROPE:
        return f"its rotations depend on the sequence's length ({bare.model.rotary_emb.rope_type})"
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if sliding else None
    if 2 * len(bare.model.rotary_emb.inv_freq) != bare.model.layers[0].self_attn.head_dim:
        return "it rotates a part of each head only"
    if window is not None and longest > window:
        return f"sequences of up to {longest} tokens pass its sliding window of {window}"
    if len(set(getattr(bare, "hf_device_map", {}).values())) > 1:
        return "it is spread over several devices"
    return None


@dataclass(frozen=True)
class Layer:
    """What one layer computes with."""

    attention_norm: Linear
    qkv: Linear
    qk_norm: Linear | None
    """Of every head of q and k. (n, heads, D) -> the same."""
    out: Linear
    mlp_norm: Linear
    gate_up: Linear
    activation: Linear
    down: Linear


class Decoder:
    """One model, read for one call of `generate`. `unpack`: with a scratch copy of its weights; `fixed`: steps that can be captured;
    `eight_bit`: keys and values in 8 bits."""

    def __init__(self, model: Any, unpack: bool, longest: int, fixed: bool = False, eight_bit: bool = False) -> None:
        bare = bare_model(model)
        inner, head, config, first = bare.model, bare.lm_head, bare.config, bare.model.layers[0].self_attn
        plain = type(inner.embed_tokens) is nn.Embedding
        self.device, self.own, self.unpack = inner.norm.weight.device, inner.embed_tokens.weight.dtype, unpack
        self.fixed, self.eight_bit = fixed, eight_bit
        self.embed: Linear = partial(_look_up, inner.embed_tokens.weight.detach()) if plain else inner.embed_tokens          # past hooks
        self.apart = plain and type(head) is nn.Linear
        """Past its making, it calls none of the model's modules."""
        on_cpu = kind_of(self.device) == "cpu"
        self.dtype = torch.float32 if unpack and on_cpu else self.own
        """Of hidden states. On CPUs fp32 is quicker for all but the large products, and no further from a bf16 training path than bf16 is."""
        self.shape = Shape(
            layers=config.num_hidden_layers, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            width=first.head_dim, scale=first.scaling, dtype=torch.float32 if on_cpu else self.own,
        )  # fmt: skip
        projections = [m for layer in inner.layers for m in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
        self.pairs = unpack and self.dtype == torch.float32 and common_dtype(projections, self.own) is not None
        """Dimensions i and i + D/2 of q and k stand side by side, so that a rotation is one complex product."""
        self.layers = [self._layer(layer.self_attn, layer.mlp, layer) for layer in watched("layer", inner.layers[: config.num_hidden_layers])]
        self.norm, self.head = rms_norm(inner.norm, self.dtype), fp32_head(head, unpack)
        cos, sin = inner.rotary_emb(torch.zeros(1, dtype=self.dtype, device=self.device), torch.arange(longest, device=self.device)[None])
        half = self.shape.width // 2
        turn = (torch.complex(cos[0, :, :half], sin[0, :, :half]),) if self.pairs else (cos[0], sin[0])
        self.turn = [part[:, None] for part in turn]                 # (longest, 1, D) twice, or (longest, 1, D / 2) complex

    def _layer(self, attention: Any, mlp: Any, layer: Any) -> Layer:
        shape = self.shape
        order = _paired(shape.heads, shape.kv_heads, shape.width).to(self.device) if self.pairs else None
        return Layer(
            attention_norm=rms_norm(layer.input_layernorm, self.dtype),
            qkv=self._linear([attention.q_proj, attention.k_proj, attention.v_proj], order),
            qk_norm=_qk_norm(attention, shape, order, self.dtype),
            out=self._linear([attention.o_proj]),
            mlp_norm=rms_norm(layer.post_attention_layernorm, self.dtype),
            gate_up=self._linear([mlp.gate_proj, mlp.up_proj]),
            activation=mlp.act_fn,
            down=self._linear([mlp.down_proj]),
        )

    def _linear(self, modules: Sequence[nn.Module], order: Tensor | None = None) -> Linear:
        dtype = common_dtype(modules, self.own) if self.unpack else None
        self.apart &= dtype is not None
        return live(modules) if dtype is None else unpacked(modules, dtype, order)

    def prefill(self, contexts: Sequence[Sequence[int]], owner: Sequence[int], room: int) -> tuple[Tensor, Cache]:
        """Read U contexts for n rows that each continue one: `owner` (n,) says which, `room` how many more tokens they will be given.

        -> logits of every row's first new token (n, V) float32, and the rows' cache. Contexts of like length should stand together.
        """
        lengths = [len(context) for context in contexts]
        cache = Cache(self.shape, lengths, owner, room, self.device, self.fixed, self.eight_bit)
        read = [self._read(contexts[start:end], start, cache) for start, end in watched("prompts", _chunks(lengths))]
        logits = read[0] if len(read) == 1 else torch.cat(read)
        del read
        if list(owner) == list(range(len(contexts))):
            return logits, cache
        return logits.index_select(0, torch.tensor(owner, device=self.device)), cache

    def _read(self, contexts: Sequence[Sequence[int]], start: int, cache: Cache) -> Tensor:
        """Contexts as rows, right-padded: attention is causal, so padding reaches no real token and no mask is needed. -> (u, V)."""
        count, width = len(contexts), max(len(c) for c in contexts)
        tokens = torch.tensor([[*c, *[0] * (width - len(c))] for c in contexts], device=self.device)
        positions = torch.arange(width, device=self.device).repeat(count)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.to(self.shape.dtype).unflatten(0, (count, width)).transpose(1, 2) for part in (q, k, v))      # (u, heads, P, D)
            cache.keep_prompt(index, start, k, v)
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.shape.scale, enable_gqa=q.shape[1] != k.shape[1])
            return read.transpose(1, 2).reshape(count * width, -1)

        x = self._layers(self.embed(tokens.flatten()).to(self.dtype), positions, attend)
        last = torch.arange(count, device=self.device) * width + torch.tensor([len(c) - 1 for c in contexts], device=self.device)
        return self.head(self.norm(x[last]))

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One token more for every row. (n,) int64 -> logits of the next (n, V) float32."""
        cache.advance()
        # Rows past their own end run on, wasted, beside rows with more left to write: their place may lie beyond every real one.
        positions = cache.position.clamp(max=len(self.turn[0]) - 1)
        return self.head(self.norm(self._layers(self.embed(tokens).to(self.dtype), positions, cache.attend)))

    def _layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(n, H) at `positions` (n,) -> (n, H) before the last norm."""
        shape = self.shape
        rotated = shape.heads + shape.kv_heads
        turn = [part.index_select(0, positions) for part in self.turn]
        for index, layer in enumerate(watched("layer", self.layers)):
            heads = layer.qkv(layer.attention_norm(x)).view(x.shape[0], rotated + shape.kv_heads, shape.width)
            qk = heads[:, :rotated]
            if layer.qk_norm is not None:
                qk = layer.qk_norm(qk)
            qk = _turn_pairs(qk, turn[0]) if self.pairs else _turn_halves(qk, turn[0], turn[1])
            read = attend(index, qk[:, : shape.heads], qk[:, shape.heads :], heads[:, rotated:])
            x.add_(layer.out(read.to(x.dtype)))
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, -1)
            x.add_(layer.down(layer.activation(gate).mul_(up)))
        return x


def _look_up(weight: Tensor, tokens: Tensor) -> Tensor:
    """(V, H), wherever it lies, and (n,) -> (n, H) where the tokens are."""
    return F.embedding(tokens.to(weight.device), weight).to(tokens.device)


def rms_norm(module: Any, dtype: torch.dtype, weight: Tensor | None = None) -> Linear:
    """Root-mean-square norm over the last dimension, of hidden states of `dtype`, with the module's epsilon and its weight or this one."""
    weight = module.weight.detach() if weight is None else weight
    size, epsilon = weight.shape[-1], module.variance_epsilon
    if dtype != torch.float32 or kind_of(weight.device) != "cpu":
        return lambda x: weight * F.rms_norm(x, (size,), None, epsilon)          # two roundings, as transformers has them
    scaled, floor = weight.float() * size**0.5, torch.tensor((size * epsilon) ** 0.5)

    def norm(x: Tensor) -> Tensor:
        # x / sqrt(mean(x^2) + epsilon) = sqrt(size) x / hypot(|x|, sqrt(size epsilon)): a third of the time of torch's own on a CPU
        return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)).mul_(scaled)

    return norm


def fp32_head(layer: nn.Module, unpack: bool) -> Linear:
    """The output layer with fp32 logits: rounded to bf16 they would be another distribution. (n, H) -> (n, V) float32."""
    if type(layer) is not nn.Linear:
        return lambda x: layer(x).float()
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach().float()
    if weight.dtype == torch.float32 and not unpack:
        return lambda x: F.linear(x.float(), weight, bias)
    if kind_of(weight.device) == "cuda":
        product: Linear = lambda x: torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)  # noqa: E731
        return product if bias is None else lambda x: product(x) + bias
    product = multiply(weight.float(), bias)
    return lambda x: product(x.float())


def _qk_norm(attention: Any, shape: Shape, order: Tensor | None, dtype: torch.dtype) -> Linear | None:
    if not hasattr(attention, "q_norm"):
        return None
    q, k = (norm.weight.detach() for norm in (attention.q_norm, attention.k_norm))
    weight = torch.cat([q.expand(shape.heads, -1), k.expand(shape.kv_heads, -1)])
    if order is not None:
        weight = weight.flatten()[order[: weight.numel()]].view_as(weight)
    return rms_norm(attention.q_norm, dtype, weight)


def _paired(heads: int, kv_heads: int, width: int) -> Tensor:
    """The old number of each output of q, k, v, once the halves of every head of q and k are interleaved.

    >>> _paired(1, 0, 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    outputs = torch.arange((heads + 2 * kv_heads) * width)
    turned = (heads + kv_heads) * width
    return torch.cat([outputs[:turned].view(-1, 2, width // 2).transpose(1, 2).flatten(), outputs[turned:]])


def _turn_pairs(qk: Tensor, turn: Tensor) -> Tensor:
    """(n, heads, D) times (n, 1, D/2) complex."""
    count, heads, width = qk.shape
    return torch.view_as_real(torch.view_as_complex(qk.view(count, heads, -1, 2)) * turn).view(count, heads, width)


def _turn_halves(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, heads, D), (n, 1, D), (n, 1, D)."""
    first, second = qk.chunk(2, -1)
    return qk * cos + torch.cat((-second, first), -1) * sin


def _chunks(lengths: list[int]) -> list[tuple[int, int]]:
    """Runs of contexts that are read at once: PREFILL_TOKENS, padding included, or one.

    >>> _chunks([3000, 2000, 1000, 10])
    [(0, 1), (1, 3), (3, 4)]
    """
    ends, start, widest = [], 0, 0
    for index, length in enumerate(lengths):
        widest = max(widest, length)
        if index > start and widest * (index + 1 - start) > PREFILL_TOKENS:
            ends.append((start, index))
            start, widest = index, length
    return [*ends, (start, len(lengths))]
