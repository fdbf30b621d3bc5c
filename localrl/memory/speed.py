"""How fast a run will go, from bytes and operations: a roofline, before anything loads.

Sampling waits for memory: each step of a wave reads every weight, and the keys and values of every row. Learning waits for arithmetic:
weights are frozen, so a token costs 2 operations a weight on the way there, 2 on the way back, and 2 more where a layer is computed again.
What a kernel reaches of a card's sheet is a share of it (`BANDWIDTH_SHARE`, `FLOPS_SHARE`); responses are taken to be as long as they may be.

Not counted: launching kernels (small models on fast cards wait for it), reward functions, the update, the embedding's rows from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from localrl.memory.cards import Card
from localrl.memory.fit import shares_prompts
from localrl.memory.shape import ModelShape
from localrl.memory.work import Choice, Work, adapter_count, micro_batch

BANDWIDTH_SHARE = 0.70
FLOPS_SHARE = 0.45
HOST_BANDWIDTH = 12e9
"""Bytes a second between the card and pinned memory: PCIe 4.0 over 8 lanes."""
FUSED_ROWS = 64
"""Up to so many rows bitsandbytes multiplies 4-bit weights as they are (most shapes of an 8B on most cards: 32 to 256); beyond, it unpacks them first."""
SCALES = 2
"""Bytes of the scale that an 8-bit key or value of one head and token has."""


@dataclass(frozen=True)
class Rate:
    """One part of a step."""

    name: str
    tokens: int
    """That it handles in a step."""
    seconds: float
    """A step."""
    reason: str
    """What the time goes to, in a few words."""

    @property
    def tokens_per_second(self) -> float:
        """0 where the part does not occur."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Speed:
    """Expected, of one step."""

    rollout: Rate
    scoring: Rate
    learning: Rate
    assumed: str | None
    """The card whose figures these are, where only a size was named."""

    @property
    def parts(self) -> tuple[Rate, Rate, Rate]:
        """In the order of a step."""
        return self.rollout, self.scoring, self.learning

    @property
    def seconds(self) -> float:
        """A step."""
        return sum(part.seconds for part in self.parts)

    @property
    def dominant(self) -> Rate:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: part.seconds)

    @property
    def sentence(self) -> str:
        """For a person."""
        told = ", ".join(f"{part.name} {part.seconds:.0f} s at {part.tokens_per_second:,.0f} tokens/s" for part in self.parts if part.seconds)
        most = self.dominant
        whose = f" on a card like the {self.assumed}" if self.assumed else ""
        return f"about {self.seconds:.0f} s a step{whose} ({told}); most is {most.name}: {most.reason}"


def expected(shape: ModelShape, work: Work, choice: Choice, card: Card, passes: int | None = None) -> Speed | None:
    """Of a step whose responses are all as long as they may be; None: a CPU, or a card whose figures are not known.

    `passes`: how often the step is read before it is learned from; None: once for the policy's log-probabilities, and once each for a
    reference and a critic.
    """
    if card.device == "cpu" or card.bandwidth is None or card.flops is None:
        return None
    machine = _Machine(card.bandwidth * BANDWIDTH_SHARE, card.flops * FLOPS_SHARE)
    count = 1 + work.reference + work.critic if passes is None else passes
    return Speed(_rollout(shape, work, choice, machine), _scoring(shape, work, choice, machine, count), _learning(shape, work, choice, machine), card.assumed)


def step_bytes(shape: ModelShape, work: Work, choice: Choice, rows: int, context: float) -> tuple[float, float]:
    """What one step of a wave of `rows` reads: (weights, keys and values), the latter for `context` tokens of every row, bytes."""
    head = shape.vocab * shape.hidden * work.compute_bytes
    adapters = 4 * sum(shape.adapter_parts(work.lora_r, work.lora_targets))
    each = shape.kv_bytes(1, work.compute_bytes) * _cache_share(shape, work, choice)
    if shape.window is not None and context > shape.window:
        each *= (shape.layers - shape.windowed_layers * (1 - shape.window / context)) / shape.layers
    return _weights(shape, work, rows) + head + adapters, rows * context * each


@dataclass(frozen=True)
class _Machine:
    """What it really reaches, a second."""

    bandwidth: float
    flops: float


def _weights(shape: ModelShape, work: Work, rows: int) -> float:
    """Bytes that a product of all linear layers with that many rows reads and writes of their weights."""
    if work.unpacked:
        return shape.quantisable * work.compute_bytes
    if work.quantization == "nf4" and rows > FUSED_ROWS:
        return _unpacking(shape.quantisable, work)
    return _packed(work) * shape.quantisable


def _packed(work: Work) -> float:
    return {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "none": float(work.compute_bytes)}[work.quantization]


def _unpacking(numbers: float, work: Work) -> float:
    """Bytes to unpack so many weights: read packed, written, read by the product."""
    return (_packed(work) + 2 * work.compute_bytes) * numbers if work.quantization != "none" else 0.0


def _cache_share(shape: ModelShape, work: Work, choice: Choice) -> float:
    """Of the cache in the compute type."""
    return (shape.head_dim + SCALES) / (shape.head_dim * work.compute_bytes) if choice.kv_cache == "int8" else 1.0


def _rollout(shape: ModelShape, work: Work, choice: Choice, machine: _Machine) -> Rate:
    """Every wave reads its prompts, then writes a token a row and step: reads the weights or multiplies with them, whichever takes longer,
    and reads the cache."""
    shares = shares_prompts(shape, work)
    spent = dict.fromkeys(("reading the weights", "multiplying", "reading keys and values", "reading the prompts"), 0.0)
    waves = [min(choice.concurrent, work.rollouts - done) for done in range(0, work.rollouts, choice.concurrent)]
    for rows in waves:
        prompts = -(-rows // work.num_generations) if shares else rows
        context = work.max_completion_length / 2 + prompts / rows * work.max_prompt_length         # rows of one prompt read its keys together
        weights, cache = (size / machine.bandwidth for size in step_bytes(shape, work, choice, rows, context))
        multiplying = rows * _operations(shape, work, 1, passes=1, head=2) / machine.flops
        spent["reading the weights" if weights > multiplying else "multiplying"] += work.max_completion_length * max(weights, multiplying)
        spent["reading keys and values"] += work.max_completion_length * cache
        operations = _operations(shape, work, work.max_prompt_length, passes=1, head=0)
        spent["reading the prompts"] += prompts * work.max_prompt_length * operations / machine.flops
    most = max(spent, key=lambda name: spent[name])
    how = f"{len(waves)} waves of {waves[0]}" if len(waves) > 1 else f"1 wave of {waves[0]}"
    return Rate("rollout", work.rollouts * work.max_completion_length, sum(spent.values()), f"{most}, {how}")


def _scoring(shape: ModelShape, work: Work, choice: Choice, machine: _Machine, count: int) -> Rate:
    """Forward alone."""
    tokens = work.rollouts * work.longest * count
    multiplying = tokens * _operations(shape, work, work.longest, passes=1, head=2) / machine.flops
    unpacking = count * _micro_batches(work, choice) * _unpacked_once(shape, work, choice, 1, 1) / machine.bandwidth
    return Rate("scoring", tokens, multiplying + unpacking, _why(multiplying, unpacking, 0.0))


def _learning(shape: ModelShape, work: Work, choice: Choice, machine: _Machine) -> Rate:
    """Forward, again where it is checkpointed, and back; of the critic too, and a second time where two passes make a direction."""
    turns = 2 if work.gradients and choice.directions == "two_pass" else 1
    readings = 1 + work.critic
    tokens = work.rollouts * work.longest
    passes = 2 + choice.gradient_checkpointing
    mlp_passes = passes + (choice.mlp_tile > 0)                      # a tile is computed again on its own way back
    operations = _operations(shape, work, work.longest, passes=passes, head=6 / readings, mlp_passes=mlp_passes)
    multiplying = turns * readings * tokens * operations / machine.flops
    unpacked = _unpacked_once(shape, work, choice, passes, mlp_passes)
    unpacking = turns * readings * _micro_batches(work, choice) * unpacked / machine.bandwidth
    moved = 2 * turns * readings * tokens * shape.layers * shape.hidden * work.compute_bytes if choice.offload else 0
    waiting = max(0.0, moved / HOST_BANDWIDTH - multiplying - unpacking)
    return Rate("learning", tokens, multiplying + unpacking + waiting, _why(multiplying, unpacking, waiting))


def _operations(shape: ModelShape, work: Work, length: int, *, passes: int, head: float, mlp_passes: int | None = None) -> float:
    """Of one token of a row of `length`: 2 a weight and pass, `head` for each of the output layer's, the adapters' own, and attention.

    More than one pass: the last is the way back. Attention has two products on the way there and five back, where it computes its scores again.
    """
    mlp, back = _mlp(shape), int(passes > 1)
    products = 2 * (passes * (shape.quantisable - mlp) + (mlp_passes or passes) * mlp)
    full, near = shape.layers - shape.windowed_layers, min(length, shape.window or length)
    seen = full * length / 2 + shape.windowed_layers * (near - near * near / (2 * length))          # tokens, on average, in all layers
    attention = 2 * shape.queries * seen * (2 * (passes - back) + 5 * back)
    return products + head * shape.vocab * shape.hidden + 2 * (1 + 2 * back) * adapter_count(shape, work) + attention


def _unpacked_once(shape: ModelShape, work: Work, choice: Choice, passes: int, mlp_passes: int) -> float:
    """Bytes to unpack every weight in each pass of one micro-batch; the MLP's for each of its tiles."""
    tiles = -(-micro_batch(work, choice) // choice.mlp_tile) if choice.mlp_tile else 1
    return _unpacking(passes * (shape.quantisable - _mlp(shape)) + mlp_passes * tiles * _mlp(shape), work)


def _mlp(shape: ModelShape) -> int:
    """Weights of all layers that are tiled with the MLP."""
    return shape.layers * sum(linear.numbers for linear in shape.linears if linear.name not in _ATTENTION)


def _micro_batches(work: Work, choice: Choice) -> int:
    """Of a step of longest rows."""
    return -(-work.rollouts // (micro_batch(work, choice) // work.longest))


def _why(multiplying: float, unpacking: float, waiting: float) -> str:
    return max((multiplying, "multiplying"), (unpacking, "unpacking weights: larger passes would help"), (waiting, "moving layers' inputs to the host"))[1]


_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense"})
