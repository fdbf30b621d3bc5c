"""Bytes of a token while a model reads it: forward alone, or forward and backward.

Fused attention without a mask; in half precision PEFT's own fp32 adapters, in fp32 those of `localrl.policy.lora`. The coefficients were
fitted to real passes under a storage tracker (Llama, Qwen3, Gemma 2 and 3, Phi 3; both types; with and without checkpointing), and a
test repeats the comparison. A peak is the largest of several sums, so one line through it is a tenth too high for some models.
"""

from __future__ import annotations

from localrl.memory.shape import ModelShape
from localrl.memory.work import Choice, Work, micro_batch

TILE = 4096
"""Vocabulary columns whose logits exist at a time (`localrl.policy.head.TILE`)."""


def kept(shape: ModelShape, work: Work, checkpointing: bool) -> float:
    """What all layers together keep until the backward pass: their inputs, or everything. Policy and critic are read one after the other."""
    held = _held_by_int8(shape, work)
    layer = shape.hidden * work.compute_bytes if checkpointing else _saved(shape, work)
    return shape.layers * (layer + held)


def inside(shape: ModelShape, work: Work, checkpointing: bool) -> float:
    """What comes on top in the layer that the backward pass is in."""
    again = _in_layer(shape, work)
    return again if checkpointing else max(22.0 * shape.hidden, again - _saved(shape, work))


def forward(shape: ModelShape, work: Work, length: int) -> float:
    """Peak of one layer without gradient, for sequences of that length."""
    h, i, q, k = shape.hidden, shape.ffn, shape.queries, shape.keys
    own = 12 * h + max(12 * i, 10 * q + 4 * k) if work.compute_bytes == 2 else 16 * h + max(12 * i, 16 * q + 4 * k)
    return own + _int32(shape, work) + _extras(shape, 8) + _scores(shape, length, 6.5)


def head(shape: ModelShape, work: Work, choice: Choice, backward: bool) -> int:
    """Scratch of the chunked output layer for one micro-batch, whole: `localrl.policy.head.workspace`, which a test holds it against."""
    tokens = micro_batch(work, choice)
    rows, columns = min(tokens, choice.head_chunk), min(shape.vocab, TILE)
    logit = 8 + 4 * (backward and shape.softcapped) + 2 * (backward and work.mixed)
    casts = 0 if work.mixed or work.compute_bytes == 4 else 4 * shape.hidden * (columns + rows)
    return rows * columns * logit + casts + 4 * shape.hidden * rows * (1 + work.mixed) * backward + 100 * tokens


def _in_layer(shape: ModelShape, work: Work) -> float:
    """Peak of computing a layer again and going back through it."""
    h, i, q, k = shape.hidden, shape.ffn, shape.queries, shape.keys
    flash = 9 * q if work.device == "cuda" else 0                   # there the fused attention's way back sums dq in fp32
    own = 42 * h + 12 * i + 9 * q if work.compute_bytes == 2 else 22 * h + 24 * i + 9 * q + 8 * k
    return own + flash + _int32(shape, work) + _extras(shape, 5) + _scores(shape, work.longest, 12)


def _saved(shape: ModelShape, work: Work) -> float:
    """What one layer keeps for its backward pass without checkpointing."""
    h, i, q, k = shape.hidden, shape.ffn, shape.queries, shape.keys
    own = 28 * h + 12 * i + 9 * q + 4 * k if work.compute_bytes == 2 else 18 * h + 15.5 * i + 9.5 * q + 6 * k
    return own + _extras(shape, 3) + _scores(shape, work.longest, 9)


def _extras(shape: ModelShape, fused_mlp: int) -> float:
    """Norms beyond two, norms of heads, and gate and up in one layer (their halves are copied)."""
    heads = 4 * (shape.queries + shape.keys) if shape.head_norms else 0
    fused = fused_mlp * shape.ffn if any(linear.name == "gate_up_proj" for linear in shape.linears) else 0
    return 4 * max(0, shape.norms - 2) * shape.hidden + heads + fused


def _scores(shape: ModelShape, length: int, each: float) -> float:
    """Attention scores of a token, where no fused kernel avoids them."""
    return each * shape.heads * length if shape.eager else 0


def _int32(shape: ModelShape, work: Work) -> int:
    """The int8 product before it is scaled back. In fp32 the adapters' own step multiplies with unpacked weights instead."""
    return 4 * max(linear.outputs for linear in shape.linears) if work.quantization == "int8" and work.compute_bytes == 2 else 0


def _held_by_int8(shape: ModelShape, work: Work) -> int:
    """bitsandbytes' int8 product keeps its input where checkpointing cannot drop it; layers that share an input share the copy."""
    return 2 * (2 * shape.hidden + shape.queries + shape.ffn) if work.quantization == "int8" and work.compute_bytes == 2 else 0
