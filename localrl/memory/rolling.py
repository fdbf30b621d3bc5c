"""What sampling needs: the cache, the weights it reads, and the scratch of a step (`localrl.engines`).

Families that the engine decodes with a loop of its own keep each prompt's keys and values once for its group; all others go through the
model's own forward pass, which copies the prompt into every row, masks (so that keys are expanded to all heads) and lets a layer with a
sliding window forget.
"""

from __future__ import annotations

from localrl.memory import activations
from localrl.memory.shape import ModelShape
from localrl.memory.work import Choice, Need, Work, scratch_weight

OWN_LOOP = ("llama", "mistral", "qwen2", "qwen3")
"""Families of `localrl.engines.decoder`."""
PREFILL_TOKENS = 4096
"""Tokens of prompts that are read at once (`localrl.engines.decoder`)."""
BLOCK = 16
"""Tokens by which the cache of the responses grows (`localrl.engines.cache`)."""
SAMPLED_AT_ONCE = 2**24
"""Logits that the sampler works on at once (`localrl.engines.sampling`)."""


def shares_prompts(shape: ModelShape, work: Work) -> bool:
    """Whether the engine's own loop decodes this model: known family, rotations that do not change, no window that is ever passed."""
    return shape.family in OWN_LOOP and shape.static_rope and (shape.window is None or work.longest <= shape.window)


def prompts_in_wave(work: Work, concurrent: int) -> int:
    """Different prompts in a wave of that many rows, where they are shared least."""
    return -(-concurrent // work.fewest_generations)


def rollout_lasting(shape: ModelShape, work: Work, choice: Choice) -> list[Need]:
    """There through the whole wave."""
    rows, own = choice.concurrent, shares_prompts(shape, work)
    if own:
        tokens = prompts_in_wave(work, rows) * work.max_prompt_length + rows * (work.max_completion_length + BLOCK)
        cache = shape.kv_bytes(tokens, work.cache_bytes)
    else:
        cache = rows * shape.kv_bytes(work.longest, work.compute_bytes, windowed=True)
    copy = shape.quantisable * work.compute_bytes if own and work.unpacked else 0
    head = 4 * shape.vocab * shape.hidden if own and work.device == "cpu" else 0
    return [
        Need("KV cache", cache, ("rollout",)),
        Need("unpacked weights for sampling", copy, ("rollout",)),
        Need("output layer laid out for sampling", head, ("rollout",)),
        Need("what the wave has written", 20 * rows * work.max_completion_length, ("rollout",)),
    ]


def rollout_passing(shape: ModelShape, work: Work, choice: Choice) -> list[Need]:
    """Reading the prompts, a step's attention, and moving the cache come one after the other: the largest counts."""
    rows, own = choice.concurrent, shares_prompts(shape, work)
    prompts, length = prompts_in_wave(work, rows), work.max_prompt_length
    at_once = min(prompts * length, max(PREFILL_TOKENS, length)) if own else prompts * length
    reading = at_once * (activations.forward(shape, work, length) + (0 if own else _masked(shape, work, length)))
    # Scores of prompt and response apart, joined, as fp32 probabilities, and those in the cache's type.
    scores = rows * work.longest * shape.heads * (12 if work.cache_bytes == 2 else 16)
    step = rows * activations.forward(shape, work, 1) + scores + (0 if own else rows * work.longest * _masked(shape, work, 1))
    moving = _moving(shape, work, rows, prompts) if own else rows * shape.kv_bytes(work.longest, work.compute_bytes) // shape.layers
    sampled = min(rows * shape.vocab, SAMPLED_AT_ONCE) * (28 if work.truncated else 12)
    unpacking = 4 * shape.hidden * shape.ffn * work.compute_bytes if own and work.unpacked else 0     # parts, then joined
    return [
        Need("scratch of reading and sampling", round(max(reading, step, moving, unpacking)), ("rollout",)),
        Need("logits and sampling", 4 * rows * shape.vocab + max(sampled, 8 * prompts * shape.vocab), ("rollout",)),
        Need("one layer's weight, unpacked", 0 if own and work.unpacked else scratch_weight(shape, work), ("rollout",)),
    ]


def _moving(shape: ModelShape, work: Work, rows: int, prompts: int) -> int:
    """When finished rows leave: responses move layer by layer, prompts all at once, by which time a sixth of the responses has gone."""
    layer = shape.kv_bytes(rows * work.max_completion_length, work.cache_bytes) // shape.layers
    leaving = shape.kv_bytes(rows * work.max_completion_length // 7, work.cache_bytes)
    return layer + max(0, shape.kv_bytes((prompts - 1) * work.max_prompt_length, work.cache_bytes) - leaving)


def _masked(shape: ModelShape, work: Work, length: int) -> int:
    """A token's share of the mask and of one layer's keys and values expanded to every head."""
    return 2 * shape.queries * work.compute_bytes + (1 + work.compute_bytes) * length
