"""What a run needs, line by line, in each phase: the peaks of the simulation, told apart into what a person can name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from localrl.memory.cards import Card
from localrl.memory.fit import Fits, Mode, prompts_in_wave, rollout_variables, training_variables
from localrl.memory.llama import llama_line
from localrl.memory.shape import Linear, ModelShape
from localrl.memory.work import PHASES, SKETCH, Choice, DirectionKind, Need, Phase, Work, adapter_count, micro_batch, passes

DIRECTION_BYTES: Mapping[DirectionKind, float] = {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / 256}
"""Of one number, where every number of a gradient is kept."""
WHOLE = tuple(DIRECTION_BYTES)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense")
"""Linear layers whose names begin with "self_attn", and so come after the MLP's."""
EXPORT_BLOCK = 2**24
"""Numbers of a tensor that an export holds in float32 at a time (`localrl.export.weights`)."""


def bill(
    card: Card, shape: ModelShape, work: Work, choice: Choice, fits: Fits, learned: Mapping[Phase, float] | None = None
) -> tuple[Need, ...]:
    """Every line on the card, the margin last, one for each phase. The lines of a phase add up to its peak.

    `learned`: what earlier runs measured, as a multiple of what was planned; what exceeds 1 is a line of its own.
    """
    items = [item for item in _tensors(shape, work, choice, fits) if item.bytes]
    tensors = peaks(items)
    items += [Need("more, as earlier runs measured", round((factor - 1) * tensors[phase]), (phase,)) for phase, factor in (learned or {}).items() if factor > 1]
    lasting = {item.name for item in items if len(item.phases) > 2}
    short_lived = peaks(item for item in items if item.name not in lasting)
    items.append(Need("libraries' workspaces" if card.device == "cuda" else "Python and its libraries", card.overheads.libraries, PHASES))
    items += [Need("heap that the C library keeps", round(card.overheads.heap * size), (phase,)) for phase, size in short_lived.items()]
    items.append(_searchers(card, shape, work, choice, fits))
    items.append(Need("llama.cpp's base and KV cache", llama_line(shape, work, choice.concurrent, choice.kv_cache == "int8"), PHASES))
    margin = card.overheads.fragmentation
    items += [Need(f"margin ({margin:.0%})", round(margin * size), (phase,)) for phase, size in peaks(items).items()]
    return tuple(item for item in items if item.bytes)


def on_host(shape: ModelShape, work: Work, choice: Choice) -> tuple[Need, ...]:
    """What the knobs move from the card to the host's memory."""
    inputs = shape.layers * shape.hidden * work.compute_bytes * micro_batch(work, choice) if choice.offload else 0
    embedding = shape.vocab * shape.hidden * work.compute_bytes if choice.embedding_on_host else 0
    needs = Need("layer inputs (pinned)", inputs, ("backward",)), Need("embedding", embedding, PHASES)
    return tuple(need for need in needs if need.bytes)


def peaks(items: Iterable[Need]) -> dict[Phase, int]:
    """Bytes of each phase."""
    items = tuple(items)
    return {phase: sum(item.bytes for item in items if phase in item.phases) for phase in PHASES}


def _tensors(shape: ModelShape, work: Work, choice: Choice, fits: Fits) -> list[Need]:
    """Everything that is a tensor of the run's own, as simulated, in lines."""
    lines, at = fits.training(work, Mode.of(choice)), training_variables(shape, work, choice)
    loaded, kept, gradients = (lines[part].at(at) for part in ("loaded", "kept", "gradients"))
    adapters = 4 * adapter_count(shape, work)
    moved = shape.vocab * shape.hidden * work.compute_bytes if choice.embedding_on_host else 0
    loading = max(loaded - adapters + _unconverted(shape, work), lines["tried"].at(at))
    base = f"base ({8 * work.compute_bytes} bit)" if work.quantization == "none" else f"base ({work.quantization})"
    inputs = 0 if choice.offload or not choice.gradient_checkpointing else shape.layers * shape.hidden * work.compute_bytes * micro_batch(work, choice)
    backward = lines["first" if passes(work, choice) == 1 else "backward"].at(at) - gradients
    cache, sketches = _cache(shape, work, choice), 4 * work.gradients * SKETCH
    rollout = fits.rollout(work, choice.kv_cache).at(rollout_variables(shape, work, choice)) - loaded
    return [
        Need(base, loaded - adapters - moved, PHASES),
        Need("adapters and critic (fp32)" if work.critic else "adapter (fp32)", adapters, PHASES),
        Need(f"optimiser state ({work.optimizer})", kept - loaded - sketches, PHASES[:-1]),
        Need("a weight that is quantised, or the output layer tried out", max(0, loading - (kept - moved)), ("load",)),
        Need("gradients (fp32)", gradients - kept, ("optimiser",) if choice.directions in WHOLE and work.gradients else ("backward", "optimiser")),
        *_directions(shape, work, choice),
        *_batch(work),
        Need("KV cache", min(cache, rollout), ("rollout",)),
        Need("reading prompts, sampling, moving the cache", rollout - min(cache, rollout), ("rollout",)),
        Need("a layer or the output layer at work", lines["scoring"].at(at) - gradients, ("scoring",)),
        Need("layer inputs", min(inputs, backward), ("backward",)),
        Need("a layer or the output layer, forth and back", backward - min(inputs, backward), ("backward",)),
        Need("the optimiser at work", lines["optimiser"].at(at) - gradients, ("optimiser",)),
        Need("one tensor in float32", _exported(shape, work), ("export",)),
        Need("the same as it is written", _written(shape) if work.device == "cpu" else 0, ("export",)),
    ]


def _cache(shape: ModelShape, work: Work, choice: Choice) -> int:
    """Keys and values of a wave when its responses are as long as they may be."""
    each = 1 + work.cache_bytes / shape.head_dim if choice.kv_cache == "int8" else work.cache_bytes
    tokens = prompts_in_wave(work, choice.concurrent) * work.max_prompt_length + choice.concurrent * work.max_completion_length
    return round(shape.kv_bytes(tokens, 1) * each)


def _unconverted(shape: ModelShape, work: Work) -> int:
    """What the base takes beyond its own bytes at the fullest moment of loading, when a large weight of the last layer is being quantised; less than 0 if
    it never does. Weights come by name, one after the other, from a file in half precision."""
    if work.quantization == "none":
        return -shape.base_bytes("none", work.compute_bytes)
    most, after = -shape.base_bytes(work.quantization, work.compute_bytes), 0.0
    for linear in sorted(shape.linears, key=lambda linear: (linear.name in ATTENTION, linear.name), reverse=True):
        after += linear.numbers * (0.5 + 1 / 64 + 4 / 2**14) if work.quantization == "nf4" else linear.numbers + 4 * linear.outputs
        most = max(most, round(_quantising(linear, work) - after))
    return most


def _quantising(linear: Linear, work: Work) -> float:
    """Bytes of one weight on its way, with what comes of it. On a CPU as measured; on a GPU as bitsandbytes' source has it."""
    if work.device == "cuda":
        return linear.numbers * (work.compute_bytes + (0.5 + 9 / 64 if work.quantization == "nf4" else 3)) + 8 * linear.outputs
    if work.quantization == "nf4":                                  # in fp32, scaled, its place in the table of 16 (int32, uint8), packed twice
        return linear.numbers * (14 + 1 / 16)
    return linear.numbers * (10 + (work.compute_bytes if work.compute_bytes != 2 else 0)) + 8 * linear.outputs


def _exported(shape: ModelShape, work: Work) -> int:
    """The largest tensor, in blocks in float32: read, scaled, and what the adapter adds; 4-bit weights are de-quantised whole; and the block before."""
    most = 0
    adapted = [linear.name for linear in shape.linears] if work.lora_targets == "all-linear" else work.lora_targets
    for linear in shape.linears:
        block = min(linear.numbers, EXPORT_BLOCK)
        size = (12 if linear.name in adapted else 8) * block + (4 * linear.numbers if work.quantization == "nf4" else 0)
        most = max(most, size + (4 * block if linear.numbers > block else 0))
    embedding = min(shape.vocab * shape.hidden, EXPORT_BLOCK)
    return max(most, (8 if shape.vocab * shape.hidden == embedding else 12) * embedding)


def _written(shape: ModelShape) -> int:
    """numpy's: the largest tensor in float32 at most, and the sizes of a block's numbers."""
    largest = max(shape.largest, shape.vocab * shape.hidden)
    return 4 * largest + 4 * min(largest, EXPORT_BLOCK)


def _directions(shape: ModelShape, work: Work, choice: Choice) -> tuple[Need, ...]:
    """What is kept of the gradients of several directions: whole while a step learns, or a sketch of each, always. And the last update's sketch."""
    if not work.gradients:
        return ()
    name, update = f"gradients of {work.gradients} directions ({choice.directions})", Need("the last update's sketch", 4 * SKETCH, ("backward", "optimiser"))
    if choice.directions in WHOLE:
        kept = round(work.gradients * adapter_count(shape, work) * DIRECTION_BYTES[choice.directions])
        return Need(name, kept, ("backward",)), update
    return Need(name, 4 * work.gradients * SKETCH, PHASES[:-1]), update


def _batch(work: Work) -> tuple[Need, ...]:
    """The step's ids, masks and the sampler's log-probabilities; the columns that are read of it; and about three columns of credit."""
    tokens = work.rollouts * work.max_completion_length
    batch = 8 * work.rollouts * work.max_prompt_length + 14 * tokens
    return (
        Need("the step's batch", batch + 4 * work.columns * tokens, ("scoring", "backward", "optimiser")),
        Need("credit", 12 * tokens, ("backward", "optimiser")),
    )


def _searchers(card: Card, shape: ModelShape, work: Work, choice: Choice, fits: Fits) -> Need:
    """A searcher has the base, an adapter, its libraries and a wave of its own, all the time."""
    rollout = fits.rollout(work, choice.kv_cache).at(rollout_variables(shape, work, choice))
    heap = card.overheads.heap * (rollout - shape.base_bytes(work.quantization, work.compute_bytes))
    return Need(f"copies of {work.searchers} searchers", round(work.searchers * (rollout + heap + card.overheads.libraries)), PHASES)
