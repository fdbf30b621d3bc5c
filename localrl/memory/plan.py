"""The plan: which knobs, why, what each phase then needs, and a refusal with a way out where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

from localrl.memory.bill import bill, on_host, peaks
from localrl.memory.cards import CARD_SHARE, CONTEXT, GIB, Card, gib
from localrl.memory.fit import Fits
from localrl.memory.knobs import Knob, Search, choose_all, largest
from localrl.memory.shape import ModelShape
from localrl.memory.work import PHASES, Choice, DirectionKind, Need, Phase, Work, micro_batch
from localrl.settings import UserError

if TYPE_CHECKING:
    from torch import Tensor

WHILE: Mapping[Phase, str] = {
    "load": "while it loads",
    "rollout": "while it rolls out",
    "scoring": "while it scores",
    "backward": "while it learns",
    "optimiser": "while it updates",
    "export": "while it is exported",
}
SETTING: Mapping[str, str] = {
    "concurrent": "rollout.concurrent",
    "micro_batch_tokens": "memory.micro_batch_tokens",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "head_chunk": "memory.head_chunk",
    "directions": "memory.directions",
    "mlp_tile": "memory.mlp_tile",
    "offload": "memory.offload",
    "kv_cache": "memory.kv_cache",
    "embedding_on_host": "memory.embedding_on_host",
    "optimizer": "optim.optimizer",
    "quantization": "model.quantization",
    "max_completion_length": "rollout.max_completion_length",
}
"""Where the settings say what a sentence of ours recommends."""


class DoesNotFit(UserError):
    """The card is too small for what is asked; the sentence names the phase, its largest lines, and a way out."""


@dataclass(frozen=True)
class MemoryPlan:
    """Immutable: what was asked, on which card, with which knobs, and what that needs."""

    card: Card
    shape: ModelShape
    work: Work
    knobs: tuple[Knob, ...]
    asked: Mapping[str, Any]
    """The knobs as they came, None where the plan was free."""
    sources: Fits = field(repr=False, compare=False)
    """Where the bytes come from."""
    learned: Mapping[Phase, float] = field(default_factory=dict)
    """What earlier runs measured here, as a multiple of what was planned."""

    @cached_property
    def items(self) -> tuple[Need, ...]:
        """Every line of the bill, the margin among them."""
        return bill(self.card, self.shape, self.work, self.choice, self.sources, self.learned)

    @cached_property
    def host(self) -> tuple[Need, ...]:
        """What waits in the host's memory instead of the card's."""
        return on_host(self.shape, self.work, self.choice)

    @cached_property
    def phases(self) -> dict[Phase, int]:
        """Peak bytes of each phase: the sum of its lines."""
        return peaks(self.items)

    @cached_property
    def choice(self) -> Choice:
        """The knobs' values."""
        known = {knob.name: knob.value for knob in self.knobs}
        return Choice(**known)

    @property
    def concurrent(self) -> int:
        """Sequences decoded at once."""
        return self.choice.concurrent

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward and backward pass."""
        return self.choice.micro_batch_tokens

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a layer keeps its input alone and is computed again."""
        return self.choice.gradient_checkpointing

    @property
    def head_chunk(self) -> int:
        """Tokens whose logits exist at a time."""
        return self.choice.head_chunk

    @property
    def directions(self) -> DirectionKind:
        """How the gradients of several directions are kept."""
        return self.choice.directions

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=lambda phase: self.phases[phase])

    @property
    def fits(self) -> bool:
        """Every phase is within what the card has."""
        return self.phases[self.worst] <= self.card.usable

    @property
    def not_counted(self) -> tuple[str, ...]:
        """What these numbers leave out, in words."""
        host = () if self.card.device == "cpu" else ("the computer's own memory (the process takes 2 to 4 GiB, loading reads through the page cache)",)
        return (
            *self.shape.not_counted,
            *host,
            "reward functions' worker processes",
            "other programs that start to use the same memory during the run",
        )

    def lines(self, phase: Phase) -> list[Need]:
        """What makes up a phase, the largest first."""
        return sorted((item for item in self.items if phase in item.phases), key=lambda item: -item.bytes)

    def check(self) -> None:
        """Raises DoesNotFit, in one sentence, if a phase needs more than the card has."""
        if self.fits:
            return
        phase = self.worst
        needs, has = self.phases[phase], self.card.usable
        lines = [item for item in self.lines(phase) if not item.name.startswith("margin")]
        largest = ", ".join(f"{item.name} {item.bytes / GIB:.1f}" for item in lines[:4])
        raise DoesNotFit(f"needs {gib(needs)} {WHILE[phase]}, {self._owner} has {gib(has)}: {largest}, ...; {way_out(self)}")

    @property
    def _owner(self) -> str:
        return "the machine" if self.card.device == "cpu" else "the card"

    def split(self, sequence_length: Tensor) -> list[Tensor]:
        """The rows of each micro-batch, longest first, each row in exactly one; as few as hold no more than is planned for, but a longer row goes alone.

        sequence_length (B,) int64 -> int64 tensors on its device. Rows are laid end to end, so it is the sum of their lengths that counts, and
        rows of like length stand together.
        """
        order = sequence_length.argsort(descending=True, stable=True)
        lengths = sequence_length[order].tolist()
        return [order[start:end] for start, end in packed(lengths, micro_batch(self.work, self.choice))]

    @property
    def unit(self) -> str:
        """In which `rows` counts."""
        return "GiB" if self.phases[self.worst] >= 2 * GIB else "MiB"

    def rows(self) -> list[tuple[str, ...]]:
        """A table in `unit`: each line of the bill, then the peaks; columns are the name and the phases, blank where a line is absent."""
        size, digits = (GIB, 2) if self.unit == "GiB" else (2**20, 1)

        def cells(each: Mapping[Phase, int]) -> list[str]:
            return [f"{each[phase] / size:.{digits}f}" if each[phase] else "" for phase in PHASES]

        names = dict.fromkeys(item.name for item in self.items)
        table = [(name, *cells(peaks(item for item in self.items if item.name == name))) for name in names]
        return [*table, ("peak", *cells(self.phases))]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "fits": self.fits,
            "card": {"name": self.card.name, "device": self.card.device, "total": self.card.total, "usable": self.card.usable},
            "phases": dict(self.phases),
            "knobs": {knob.name: {"value": knob.value, "reason": knob.reason} for knob in self.knobs},
            "items": [{"name": item.name, "bytes": item.bytes, "phases": list(item.phases)} for item in self.items],
            "host": [{"name": item.name, "bytes": item.bytes, "phases": list(item.phases)} for item in self.host],
            "not_counted": list(self.not_counted),
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2)


def packed(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Consecutive parts (start, end), each with a sum of at most `most`, or one alone; of about the same sum, none more than are needed.

    >>> packed([400, 380, 40, 40, 30], 800), packed([60, 50, 40], 100), packed([9, 9, 9, 9], 28)
    ([(0, 1), (1, 5)], [(0, 1), (1, 3)], [(0, 2), (2, 4)])
    """
    low, high = max(lengths, default=0), max(most, max(lengths, default=0))
    needed = len(_filled(lengths, high))
    even = largest(-high, -low, lambda bound: len(_filled(lengths, -bound)) <= needed)
    return _filled(lengths, -even)


def _filled(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """One after the other, each as full as may be."""
    cuts, start, total = [], 0, 0
    for place, length in enumerate(lengths):
        if place > start and total + length > most:
            cuts.append((start, place))
            start, total = place, 0
        total += length
    return [*cuts, (start, len(lengths))] if lengths else []


def choose(card: Card, shape: ModelShape, work: Work, asked: Mapping[str, Any], fits: Fits, learned: Mapping[Phase, float] | None = None) -> MemoryPlan:
    """Choose every knob that is None in `asked`, honour the others, and count. Never refuses: `MemoryPlan.check` does.

    The embedding goes to the host if nothing else makes it fit. UserError: an adapter target that the model has not.
    """
    shape.adapter_parts(work.lora_r, work.lora_targets)

    def plan(told: Mapping[str, Any]) -> MemoryPlan:
        knobs = choose_all(Search(card, shape, work, told, fits, learned or {}))
        return MemoryPlan(card, shape, work, knobs, asked, fits, learned or {})

    found = plan(asked)
    if not found.fits and not shape.tied and card.device == "cuda" and asked.get("embedding_on_host") is None:
        moved = plan({**asked, "embedding_on_host": True})
        if moved.fits:
            why = f"without its {gib(shape.vocab * shape.hidden * work.compute_bytes)} the rest fits"
            return replace(moved, knobs=tuple(replace(k, reason=why) if k.name == "embedding_on_host" else k for k in moved.knobs))
    return found


def way_out(plan: MemoryPlan) -> str:
    """Part of a sentence: the fewest changes of settings found that make it fit, or the card that it takes."""
    told = [name for name, value in plan.asked.items() if value is not None]
    for count in range(1, len(told) + 1):
        for names in combinations(told, count):
            freed = _changed(plan, {}, {**plan.asked, **dict.fromkeys(names)})
            if freed.fits:
                return _try(plan, freed)
    free = dict.fromkeys(plan.asked)
    lean: list[dict[str, Any]] = []
    if "8bit" not in plan.work.optimizer:
        lean.append({"optimizer": "adamw_8bit"})
    if plan.work.quantization != "nf4":
        lean += [{"quantization": "nf4"}, *({**change, "quantization": "nf4"} for change in lean[:1])]
    for change in lean:
        if (better := _changed(plan, change, free)).fits:
            return _try(plan, better)
    for change in ({}, *lean):
        if (shorter := _shorter(_changed(plan, change, free))) is not None:
            return _try(plan, shorter)
    total = gib(smallest_card(_changed(plan, lean[-1] if lean else {}, free)))
    place = f"{total} of free memory" if plan.card.device == "cpu" else f"a card of {total}"
    return f"no setting makes this model fit, it takes {place}: take a smaller model"


def _changed(plan: MemoryPlan, work: Mapping[str, Any], asked: Mapping[str, Any]) -> MemoryPlan:
    return choose(plan.card, plan.shape, replace(plan.work, **work), asked, plan.sources, plan.learned)


def _shorter(plan: MemoryPlan) -> MemoryPlan | None:
    """The same with the longest responses that fit, in steps of 64 tokens."""

    def at(count: int) -> MemoryPlan:
        return _changed(plan, {"max_completion_length": 64 * count}, plan.asked)

    steps = (plan.work.max_completion_length - 1) // 64
    if steps < 1 or not at(1).fits:
        return None
    return at(largest(1, steps, lambda count: at(count).fits))


def smallest_card(plan: MemoryPlan) -> int:
    """Total bytes that would do for responses of 64 tokens."""
    short = _changed(plan, {"max_completion_length": min(64, plan.work.max_completion_length)}, plan.asked)
    need = short.phases[short.worst]
    return need if plan.card.device == "cpu" else round((need + CONTEXT) / CARD_SHARE)


def _try(old: MemoryPlan, new: MemoryPlan) -> str:
    """What was set and is another now: knobs that were left free are the plan's own affair."""
    found = vars(new.choice)
    changes = {name: found[name] for name, value in old.asked.items() if value is not None and value != found[name]}
    changes |= {name: value for name, value in asdict(new.work).items() if value != getattr(old.work, name)}
    told = " ".join(f"{SETTING[name]}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items())
    return f"try {told} ({gib(new.phases[new.worst])})"
