"""How the plan sets what it was not told: a ladder, its rungs in the order of what they cost in time, each knob with the reason in a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from localrl.memory.bill import bill, on_host, peaks
from localrl.memory.cards import Card, gib
from localrl.memory.fit import Fits, Mode, training_variables
from localrl.memory.shape import ModelShape
from localrl.memory.work import Choice, DirectionKind, Phase, Work, micro_batch

HEAD_CHUNK = 1024
"""Long enough that multiplying, not reading the output layer, is what a chunk costs."""
LOGIT = 10
"""Bytes that a logit of the chunk costs, with what is made of it on the way back."""
HEAD_TILE = 4096
"""Vocabulary columns whose logits exist at a time (`localrl.policy.head.TILE`)."""
GOAL_TOKENS = 8192
"""On a GPU: unpacking every weight costs less than 4 % of a pass of that size. A rung of the ladder that allows it is low enough."""
ENOUGH_TOKENS = 16_384
"""On a GPU a larger pass gains nothing."""
TILES = (4096, 1024)
"""Tokens of the MLP at a time: the second unpacks its weights four times as often."""
ENOUGH_CPU_BYTES = 64 * 2**20
"""On a CPU a pass runs no faster for being larger than a thousand tokens (measured), so its activations stay about this small."""
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


Chosen = tuple[Any, str]


@dataclass(frozen=True)
class Rung:
    """One way to train, and what it is called."""

    gradient_checkpointing: bool
    mlp_tile: int
    offload: bool


RUNGS = (
    Rung(False, 0, False), Rung(True, 0, False), *(Rung(True, tile, False) for tile in TILES), *(Rung(True, tile, True) for tile in TILES),
)  # fmt: skip
"""Computing no layer twice; each layer's input kept; its MLP in tiles; the inputs in the host's memory."""


@dataclass(frozen=True)
class Search:
    """What is asked, on which card, and what was told."""

    card: Card
    shape: ModelShape
    work: Work
    asked: Mapping[str, Any]
    fits: Fits
    learned: Mapping[Phase, float] = field(default_factory=dict)

    @property
    def least(self) -> Choice:
        """The smallest value of every knob."""
        last = RUNGS[-1] if self.card.device == "cuda" else Rung(True, TILES[-1], False)
        return self.given(Choice(1, self.work.longest, True, 256, "lagged", last.mlp_tile, last.offload))

    def given(self, choice: Choice) -> Choice:
        """With what was told in its place."""
        return replace(choice, **{name: value for name, value in self.asked.items() if value is not None and name != "optimizer"})

    def fit(self, phase: Phase, choice: Choice) -> bool:
        """Whether the phase fits with these knobs, what is pinned on the host included."""
        inputs = sum(need.bytes for need in on_host(self.shape, self.work, choice) if phase in need.phases and "pinned" in need.name)
        return self.peaks(choice)[phase] <= self.card.usable and (self.card.pinned is None or inputs <= self.card.pinned)

    def peaks(self, choice: Choice) -> dict[Phase, int]:
        """Bytes of each phase."""
        return peaks(bill(self.card, self.shape, self.work, choice, self.fits, self.learned))

    def largest(self, name: str, low: int, high: int, choice: Choice, *phases: Phase) -> int | None:
        """The largest value of one knob with which the phases fit; None: not even the smallest does."""

        def good(value: int) -> bool:
            changed: dict[str, Any] = {name: value}
            return all(self.fit(phase, replace(choice, **changed)) for phase in phases)

        return largest(low, high, good) if good(low) else None


def choose_all(search: Search) -> tuple[Knob, ...]:
    """Every knob, with its reason."""
    choice, knobs = search.least, []
    for names, chooser in (
        (("head_chunk",), _head_chunk),
        (("gradient_checkpointing", "mlp_tile", "offload", "micro_batch_tokens"), _climb),
        (("directions",), _directions),
        (("kv_cache", "concurrent"), _sampling),
        (("embedding_on_host",), _embedding),
    ):
        found = chooser(search, choice)
        for name in names:
            value, reason = (search.asked[name], "as set") if search.asked.get(name) is not None else found[name]
            choice = replace(choice, **{name: value})
            if name != "directions" or search.work.gradients:
                knobs.append(Knob(name, value, reason))
    return tuple(knobs)


def _head_chunk(search: Search, choice: Choice) -> dict[str, Chosen]:
    shape, work = search.shape, search.work
    for chunk in (HEAD_CHUNK, 512, 256):
        scratch = min(chunk, work.rollouts * work.max_completion_length) * (min(shape.vocab, HEAD_TILE) * LOGIT + 8 * shape.hidden)
        if scratch <= search.card.usable // 50 or chunk == 256:
            break
    return {"head_chunk": (chunk, f"{gib(scratch)} of scratch, where all logits of one longest row would take {gib(4 * work.longest * shape.vocab)}")}


def _climb(search: Search, choice: Choice) -> dict[str, Chosen]:
    """The first rung on which a pass is as large as is of use; if there is none, the one with the largest pass."""
    work, asked, best = search.work, search.asked.get("micro_batch_tokens"), None
    step = work.rollouts * work.longest

    def size(found: int) -> int:
        """Passes are of one size, and of whole rows."""
        return micro_batch(work, replace(choice, micro_batch_tokens=found))

    for rung in _rungs(search):
        here = replace(choice, **vars(rung))
        goal, enough = _useful(search, here)
        if goal is None:
            continue
        most = asked or min(step, max(enough, work.longest))
        found = search.largest("micro_batch_tokens", work.longest, most, here, "scoring", "backward")
        if found is not None and (best is None or size(found) > size(best[1])):
            best = rung, found, most
        if found is not None and size(found) >= (size(most) if asked else min(goal, size(most))):
            break
    rung, found, most = best or (_rungs(search)[-1], work.longest, work.longest)
    return {**_why(search, rung), "micro_batch_tokens": (size(found), _enough(search, size(found), size(found) >= size(most), step))}


def _rungs(search: Search) -> list[Rung]:
    """Those that agree with what was told. On a CPU the host's memory is the card's, so nothing is moved there; sizes of tiles follow what was told."""
    told = {name: search.asked.get(name) for name in ("gradient_checkpointing", "mlp_tile", "offload")}
    rungs = [replace(rung, mlp_tile=told["mlp_tile"]) if told["mlp_tile"] and rung.mlp_tile else rung for rung in RUNGS]
    if search.card.device == "cpu" and not told["offload"]:
        rungs = [rung for rung in rungs if not rung.offload]
    agreeing = [rung for rung in dict.fromkeys(rungs) if all(value is None or getattr(rung, name) == value for name, value in told.items())]
    known: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    return agreeing or [replace(Rung(True, 0, False), **known)]


def _useful(search: Search, choice: Choice) -> tuple[int | None, int]:
    """(tokens of a pass with which this rung is low enough, None: it is out of the question; tokens beyond which nothing is gained)."""
    work, on = search.work, choice.gradient_checkpointing
    if search.card.device == "cuda":
        if not on and _at_least_kept(search) > search.card.usable and search.asked.get("gradient_checkpointing") is None:
            return None, 0
        return GOAL_TOKENS, ENOUGH_TOKENS
    each = _each(search, choice)
    if on:
        return 0, min(4096, max(1024, int(ENOUGH_CPU_BYTES / each)))
    if each * max(work.longest, min(work.rollouts * work.longest, PLAIN_CPU_TOKENS)) > PLAIN_CPU_BYTES and search.asked.get("gradient_checkpointing") is None:
        return None, 0
    return 0, max(PLAIN_CPU_TOKENS, min(1024, int(PLAIN_CPU_BYTES / each)))


def _at_least_kept(search: Search) -> int:
    """Of a pass that is of use, without checkpointing; less than it really is: enough to know that it need not be simulated."""
    shape, work = search.shape, search.work
    tokens = max(work.longest, min(GOAL_TOKENS, work.rollouts * work.longest))
    return tokens * shape.layers * work.compute_bytes * (4 * shape.hidden + 2 * shape.ffn)


def _each(search: Search, choice: Choice) -> float:
    """Bytes of one more token of a pass."""
    backward = search.fits.training(search.work, Mode.of(choice))["backward"]
    one, more = (
        backward.at(training_variables(search.shape, search.work, replace(choice, micro_batch_tokens=search.work.longest * k))) for k in (1, 2)
    )
    return max(1.0, (more - one) / search.work.longest) if search.work.rollouts > 1 else max(1.0, one / search.work.longest)


def _why(search: Search, rung: Rung) -> dict[str, Chosen]:
    work = search.work
    on, off = (gib(round(search.shape.layers * work.longest * search.shape.hidden * work.compute_bytes * k)) for k in (1, 8))
    saves = "computing no layer twice saves up to a third of learning"
    checkpointing = f"keeps {on} of the longest row, without it at least {off}" if rung.gradient_checkpointing else f"it fits, and {saves}"
    tile = f"a layer's widest part for {rung.mlp_tile} tokens at a time" if rung.mlp_tile else "a layer's widest part at once: nothing is unpacked twice"
    offload = f"{on} of the longest row's layer inputs wait in the host's memory" if rung.offload else "layer inputs fit where they are made"
    return {
        "gradient_checkpointing": (rung.gradient_checkpointing, checkpointing), "mlp_tile": (rung.mlp_tile, tile), "offload": (rung.offload, offload),
    }  # fmt: skip


def _enough(search: Search, size: int, most: bool, step: int) -> str:
    longest = search.work.longest
    if size >= step:
        return "a whole step at once"
    one = "one longest row at a time" if size == longest else ""
    if not most:
        return one or "the largest that fits, for few passes"
    on_cpu = "a larger pass is no faster on a CPU and takes more memory"
    why = on_cpu if search.card.device == "cpu" else "a larger pass gains nothing: unpacking the weights is no longer what it waits for"
    return f"{one}; {why}" if one else why


def _sampling(search: Search, choice: Choice) -> dict[str, Chosen]:
    """Whole groups at once if one fits: their prompt is read and kept once. 8-bit keys and values only where not even one row fits with full ones."""
    step, group = search.work.rollouts, search.work.num_generations
    for kind in ("full", "int8"):
        here = search.given(replace(choice, kv_cache=kind))
        found = search.largest("concurrent", 1, step, here, "rollout")
        if found is not None or search.asked.get("kv_cache") is not None:
            break
    else:
        kind = "full"
    why = "keys and values as they are" if kind == "full" else "not one response fits with full keys and values"
    if found is None or found == 1:
        told = "one response at a time" if step > 1 else "the whole step in one wave"
        return {"kv_cache": (kind, why), "concurrent": (1, told)}
    if group < found < step:
        found = found // group * group
    waves = -(-step // found)
    told = "the whole step in one wave" if waves == 1 else f"the largest wave that fits, {waves} of them a step"
    return {"kv_cache": (kind, why), "concurrent": (found, told)}


def _embedding(search: Search, choice: Choice) -> dict[str, Chosen]:
    """Stays on the card unless told: whoever asks tries it as the last resort."""
    if search.shape.tied:
        return {"embedding_on_host": (False, "it is the output layer too")}
    size = gib(search.shape.vocab * search.shape.hidden * search.work.compute_bytes)
    return {"embedding_on_host": (False, "the host's memory is the card's" if search.card.device == "cpu" else f"its {size} stay on the card")}


def _directions(search: Search, choice: Choice) -> dict[str, Chosen]:
    """The most exact form whose cost is in proportion: whole numbers up to 3 % of the peak, 8 bits up to 10 %, else sketches."""
    work = search.work
    if not work.gradients:
        return {"directions": (choice.directions, "")}
    without = max(replace(search, work=replace(work, gradients=0)).peaks(choice).values())
    limits: dict[DirectionKind, float] = {"float32": 0.03, "bfloat16": 0.05, "int8": 0.1}
    for kind, share in limits.items():
        here = replace(choice, directions=kind)
        more = max(search.peaks(here).values()) / without - 1
        if more <= share and search.fit("backward", here):
            return {"directions": (kind, f"{work.gradients} gradients kept apart, {more:.1%} more at the peak")}
    told = f"{work.gradients} gradients kept apart would take {more:.0%} more at the peak: sketches do, with the last step's weights"
    return {"directions": ("lagged", told)}


def largest(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The largest number from low to high that is good, if goodness ends somewhere and stays so; low if none is.

    >>> largest(3, 100, lambda n: n * n < 200), largest(3, 100, lambda n: False)
    (14, 3)
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
