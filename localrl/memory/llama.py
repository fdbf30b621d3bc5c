"""What llama.cpp takes in memory when it samples: its copy of the base, its keys and values, its buffers. Arithmetic, from its file format."""

from __future__ import annotations

from collections.abc import Mapping

from localrl.memory.shape import ModelShape
from localrl.memory.work import Work
from localrl.sections import Gguf

BITS: Mapping[Gguf, float] = {"q8_0": 8.5, "q4_k_m": 4.9, "f16": 16.0, "f32": 32.0}
"""Of one weight: blocks of 32 with a scale in Q8_0; Q4_K_M has some tensors in Q6_K."""
CELLS, MOST_ROWS = 256, 256
"""A sequence's room is a multiple of so many tokens; so many sequences at most (`localrl.engines.llama.binding`)."""
PASS = 512
"""Tokens of one pass."""


def base_bytes(shape: ModelShape, kind: Gguf) -> int:
    """The file, which is mapped into memory."""
    return round(shape.parameters * BITS[kind] / 8)


def cache_bytes(shape: ModelShape, rows: int, longest: int, eight_bit: bool = False) -> int:
    """Keys and values: every sequence its whole length, the prompt too."""
    cells = min(rows, MOST_ROWS) * -(-longest // CELLS) * CELLS
    return round(shape.kv_bytes(cells, 1) * (8.5 / 8 if eight_bit else 2))


def llama_bytes(shape: ModelShape, kind: Gguf, rows: int, longest: int, eight_bit: bool = False) -> int:
    """All of it, with the logits and a layer's activations of one pass."""
    buffers = 4 * min(rows, MOST_ROWS) * shape.vocab + 4 * PASS * (4 * shape.hidden + 3 * shape.ffn)
    return base_bytes(shape, kind) + cache_bytes(shape, rows, longest, eight_bit) + buffers


def llama_line(shape: ModelShape, work: Work, concurrent: int, eight_bit: bool = False) -> int:
    """Of the bill on a CPU, once for each searcher; on a card it takes only what the others leave."""
    if work.llama is None or work.device != "cpu":
        return 0
    return max(1, work.searchers) * llama_bytes(shape, work.llama, min(concurrent, work.rollouts), work.longest, eight_bit)


def kind_for(shape: ModelShape, rows: int, longest: int, free: int) -> Gguf:
    """What the base is rounded to where nobody asked: Q8_0, whose samples differ least, or Q4_K_M where only that leaves room in `free` bytes."""
    return "q8_0" if llama_bytes(shape, "q8_0", rows, longest) <= free else "q4_k_m"


def gpu_layers(shape: ModelShape, kind: Gguf, rows: int, longest: int, free: int) -> int:
    """How many layers fit into `free` bytes of the card, with their keys and values; one more than there are: the output layer too."""
    head = round(shape.vocab * shape.hidden * BITS[kind] / 8) + 4 * min(rows, MOST_ROWS) * shape.vocab
    each = (base_bytes(shape, kind) - head + cache_bytes(shape, rows, longest)) / shape.layers
    if shape.layers * each + head <= free:
        return shape.layers + 1
    return max(0, min(shape.layers, int(free / each)))
