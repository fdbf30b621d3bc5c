"""What a run needs, line by line: from the shape of a model, the work asked of it and the knobs, to bytes in each phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from localrl.memory import activations
from localrl.memory.rolling import rollout_lasting, rollout_passing
from localrl.memory.shape import ModelShape
from localrl.memory.work import PHASES, SKETCH, Choice, DirectionKind, Need, Phase, Work, adapter_count, micro_batch, scratch_weight

MARGIN = 0.04
"""Of everything counted: what the caching allocator loses to fragmentation."""
LIBRARIES = {"cuda": round(0.1 * 2**30), "cpu": round(0.5 * 2**30)}
"""Workspaces of cuBLAS and kernels; on a CPU the interpreter with PyTorch, transformers and bitsandbytes imported."""
HEAP = 4.0
"""On a CPU: what glibc's heap keeps beyond the live bytes of short-lived tensors, as a multiple of them (measured: 1.3 to 5.5)."""
SMALL_STATE = 4096
"""bitsandbytes keeps 32-bit states for tensors smaller than this."""
DIRECTION_BYTES: Mapping[DirectionKind, float] = {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / 256, "two_pass": 4, "lagged": 4}
"""Of one number."""
WHOLE: tuple[DirectionKind, ...] = ("float32", "bfloat16", "int8")
"""Kinds that keep every number of a gradient."""
READING: tuple[Phase, ...] = ("scoring", "backward")


def bill(shape: ModelShape, work: Work, choice: Choice) -> tuple[Need, ...]:
    """Every line, the margin last, one for each phase. The lines of a phase add up to its peak."""
    lasting = [*_weights(shape, work), _directions(shape, work, choice), *rollout_lasting(shape, work, choice), _batch(work)]
    passing = [*rollout_passing(shape, work, choice), *_reading(shape, work, choice), _optimiser_scratch(shape, work)]
    items = [item for item in (*lasting, *passing, _searchers(shape, work, choice)) if item.bytes]
    if work.device == "cpu":
        short_lived = peaks(passing)
        items += [Need("heap that the C library keeps", round(HEAP * size), (phase,)) for phase, size in short_lived.items() if size]
    items += [Need(f"margin ({MARGIN:.0%})", round(MARGIN * size), (phase,)) for phase, size in peaks(items).items()]
    return tuple(items)


def peaks(items: Iterable[Need]) -> dict[Phase, int]:
    """Bytes of each phase."""
    items = tuple(items)
    return {phase: sum(item.bytes for item in items if phase in item.phases) for phase in PHASES}


def state_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Of the optimiser's two moments, for tensors of those sizes.

    >>> state_bytes([100_000], "adamw"), state_bytes([100_000, 100], "adamw_8bit")
    (800000, 203928)
    """
    if "8bit" not in optimizer:
        return 8 * sum(sizes)
    return sum(8 * size if size < SMALL_STATE else 2 * size + 8 * -(-size // 256) for size in sizes)


def _weights(shape: ModelShape, work: Work) -> list[Need]:
    parts = shape.adapter_parts(work.lora_r, work.lora_targets) * (2 if work.critic else 1)
    count = adapter_count(shape, work)
    base = f"base ({8 * work.compute_bytes} bit)" if work.quantization == "none" else f"base ({work.quantization})"
    embedding = 4 * shape.vocab * shape.hidden if work.device == "cpu" else 0          # converted here; for a GPU, before it gets there
    return [
        Need(base, shape.base_bytes(work.quantization, work.compute_bytes), PHASES),
        Need("the largest weight as the file has it", max(shape.largest * (work.compute_bytes + 2), embedding), ("load",)),
        Need("adapters and critic (fp32)" if work.critic else "adapter (fp32)", 4 * count, PHASES),
        Need(f"optimiser state ({work.optimizer})", state_bytes(parts, work.optimizer), PHASES[1:]),
        Need("gradients (fp32)", 4 * count, ("backward", "optimiser")),
        Need("libraries' workspaces" if work.device == "cuda" else "Python and its libraries", LIBRARIES[work.device], PHASES),
    ]


def _directions(shape: ModelShape, work: Work, choice: Choice) -> Need:
    """Buffers of the gradients that are kept apart, while a step learns; of sketches also that of the last update."""
    size, each = DIRECTION_BYTES[choice.directions], adapter_count(shape, work) if choice.directions in WHOLE else SKETCH
    return Need(f"gradients of {work.gradients} directions ({choice.directions})", round(work.gradients * each * size), ("backward", "optimiser"))


def _searchers(shape: ModelShape, work: Work, choice: Choice) -> Need:
    """A searcher has the base, an adapter, its libraries and a wave of its own, all the time."""
    wave = sum(item.bytes for item in rollout_lasting(shape, work, choice))
    passing = sum(item.bytes for item in rollout_passing(shape, work, choice)) * (1 + HEAP if work.device == "cpu" else 1)
    model = shape.base_bytes(work.quantization, work.compute_bytes) + 4 * sum(shape.adapter_parts(work.lora_r, work.lora_targets))
    return Need(f"copies of {work.searchers} searchers", round(work.searchers * (model + LIBRARIES[work.device] + wave + passing)), PHASES)


def _batch(work: Work) -> Need:
    """The step's ids and masks, and about a dozen fp32 columns that reading and credit make of it."""
    columns = 60 + (4 if work.reference else 0) + (8 if work.critic else 0)
    return Need("the step's batch", work.rollouts * (8 * work.max_prompt_length + columns * work.max_completion_length), PHASES[2:])


def _reading(shape: ModelShape, work: Work, choice: Choice) -> list[Need]:
    """A pass is at its fullest either in the output layer or in a decoder layer: the larger counts."""
    tokens, width, on = micro_batch(work, choice), shape.hidden * work.compute_bytes, choice.gradient_checkpointing
    layer, layer_alone = round(tokens * activations.inside(shape, work, on)), round(tokens * activations.forward(shape, work, work.longest))
    output = activations.head(shape, work, choice, True) + 4 * tokens * width
    output_alone = activations.head(shape, work, choice, False) + 2 * tokens * width
    return [
        Need("layer inputs kept" if on else "activations kept", round(tokens * activations.kept(shape, work, on)), ("backward",)),
        Need("the output layer" if output > layer else "the layer at work", max(output, layer), ("backward",)),
        Need("the output layer" if output_alone > layer_alone else "the layer at work", max(output_alone, layer_alone), ("scoring",)),
        Need("one layer's weight, unpacked", scratch_weight(shape, work), READING),
    ]


def _optimiser_scratch(shape: ModelShape, work: Work) -> Need:
    """torch's AdamW on a GPU takes the root of every second moment at once; on a CPU, and in bitsandbytes, one tensor at a time."""
    at_once = work.device == "cuda" and work.optimizer == "adamw"
    largest = max(shape.adapter_parts(work.lora_r, work.lora_targets))
    return Need("optimiser's scratch", 4 * adapter_count(shape, work) if at_once else 16 * largest, ("optimiser",))
