"""How the plan sets what it was not told: each knob as large as fits and is of use, with the reason in a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from localrl.memory import activations
from localrl.memory.bill import bill, peaks
from localrl.memory.cards import Card, gib
from localrl.memory.shape import ModelShape
from localrl.memory.work import Choice, DirectionKind, Work

HEAD_CHUNK = 1024
"""Long enough that multiplying, not reading the output layer, is what a chunk costs."""
ENOUGH_TOKENS = 16_384
"""On a GPU: unpacking every weight costs less than 2 % of a pass of that size, so a larger one gains nothing."""
ENOUGH_CPU_BYTES = 64 * 2**20
"""On a CPU a pass runs no faster for being larger than a thousand tokens (measured), so its activations stay about this small."""
PLAIN_SHARE = 0.5
"""Without checkpointing a pass of 8192 tokens must fit into this share of the card."""
PLAIN_CPU_BYTES = 128 * 2**20
"""On a CPU, without checkpointing, a pass may keep this much."""
PLAIN_CPU_TOKENS = 256
"""On a CPU a pass of so few tokens costs 7 % more a token than one of a thousand (25 M parameters, NF4), computing every layer twice costs 45 %."""


@dataclass(frozen=True)
class Knob:
    """A setting that the plan has decided, or was given."""

    name: str
    value: Any
    reason: str


Fits = Callable[..., bool]
Chosen = tuple[Any, str]


def _head_chunk(card: Card, shape: ModelShape, work: Work, fits: Fits, settled: Mapping[str, Any]) -> Chosen:
    for chunk in (HEAD_CHUNK, 512, 256):
        scratch = activations.head(shape, work, Choice(1, work.longest, True, chunk), backward=True)
        if scratch <= card.usable // 50 or chunk == 256:
            break
    return chunk, f"{gib(scratch)} of scratch, where all logits of one longest row would take {gib(4 * work.longest * shape.vocab)}"


def _checkpointing(card: Card, shape: ModelShape, work: Work, fits: Fits, settled: Mapping[str, Any]) -> Chosen:
    tokens = max(work.longest, min(work.rollouts * work.longest, PLAIN_CPU_TOKENS if work.device == "cpu" else 8192))
    kept = round(tokens * activations.kept(shape, work, checkpointing=False))
    roomy = kept <= PLAIN_CPU_BYTES if work.device == "cpu" else kept <= PLAIN_SHARE * card.usable
    if roomy and fits("backward", gradient_checkpointing=False, micro_batch_tokens=tokens):
        return False, f"{tokens} tokens keep {gib(kept)} without it, and computing no layer twice saves up to a third of learning"
    return True, f"{tokens} tokens would keep {gib(kept)} without it, {gib(round(tokens * activations.kept(shape, work, checkpointing=True)))} with"


def _micro_batch(card: Card, shape: ModelShape, work: Work, fits: Fits, settled: Mapping[str, Any]) -> Chosen:
    step = work.rollouts * work.longest
    enough, why = ENOUGH_TOKENS, "a larger pass gains nothing: unpacking the weights is no longer what it waits for"
    if work.device == "cpu":
        on = settled["gradient_checkpointing"]
        each = activations.kept(shape, work, on) + activations.inside(shape, work, on)
        enough = min(4096, max(1024, int(ENOUGH_CPU_BYTES / each))) if on else max(PLAIN_CPU_TOKENS, min(1024, int(PLAIN_CPU_BYTES / each)))
        why = "a larger pass is no faster on a CPU and takes more memory"
    most = min(step, max(enough, work.longest))
    found = largest(work.longest, most, lambda tokens: fits("scoring", micro_batch_tokens=tokens) and fits("backward", micro_batch_tokens=tokens))
    if found == step:
        return found, "a whole step at once"
    if found == most:
        return found, why if most > work.longest else "one longest row at a time; " + why
    if found > 2048:
        found = max(work.longest, found // 256 * 256)
    return found, "the largest that fits, for few passes" if found > work.longest else "one longest row at a time"


def _concurrent(card: Card, shape: ModelShape, work: Work, fits: Fits, settled: Mapping[str, Any]) -> Chosen:
    step, group = work.rollouts, work.num_generations
    found = largest(1, step, lambda rows: fits("rollout", concurrent=rows))
    if found == step:
        return found, "the whole step in one wave"
    if found > group:
        found = found // group * group                              # whole groups: their prompt is read and kept once
    waves = -(-step // found)
    return found, f"the largest wave that fits, {waves} of them a step"


def _directions(card: Card, shape: ModelShape, work: Work, fits: Fits, settled: Mapping[str, Any]) -> Chosen:
    """The most exact form whose cost is in proportion: whole numbers up to 3 % of the peak, 8 bits up to 10 %, else sketches."""
    without = max(peaks(bill(shape, replace(work, gradients=0), Choice(**settled))).values())
    limits: dict[DirectionKind, float] = {"float32": 0.03, "bfloat16": 0.05, "int8": 0.1}
    for kind, share in limits.items():
        more = max(peaks(bill(shape, work, Choice(**settled, directions=kind))).values()) / without - 1
        if more <= share and fits("backward", directions=kind):
            return kind, f"{work.gradients} gradients kept apart, {more:.1%} more at the peak"
    return "lagged", f"{work.gradients} gradients kept apart would take {more:.0%} more at the peak: sketches do, with the last step's weights"


def largest(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The largest number from low to high that is good, if goodness ends somewhere and stays so; low if none is.

    >>> largest(3, 100, lambda n: n * n < 200), largest(3, 100, lambda n: False)
    (14, 3)
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


KNOBS: Mapping[str, Callable[[Card, ModelShape, Work, Fits, Mapping[str, Any]], Chosen]] = {
    "head_chunk": _head_chunk,
    "gradient_checkpointing": _checkpointing,
    "micro_batch_tokens": _micro_batch,
    "concurrent": _concurrent,
    "directions": _directions,
}
"""In the order in which they are chosen, each knowing those before it."""
