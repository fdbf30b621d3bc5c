"""The plan: which knobs, why, what each phase then needs, and a refusal with a way out where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

from localrl.memory.bill import bill, peaks
from localrl.memory.cards import CARD_SHARE, CONTEXT, GIB, Card, Device, gib
from localrl.memory.knobs import KNOBS, Knob, largest
from localrl.memory.shape import ModelShape, Quantization
from localrl.memory.work import PHASES, Choice, DirectionKind, Need, Phase, Work
from localrl.settings import UserError

if TYPE_CHECKING:
    from torch import Tensor

WHILE: Mapping[Phase, str] = {
    "load": "while it loads",
    "rollout": "while it rolls out",
    "scoring": "while it scores",
    "backward": "while it learns",
    "optimiser": "while it updates",
}
SETTING: Mapping[str, str] = {
    "concurrent": "rollout.concurrent",
    "micro_batch_tokens": "memory.micro_batch_tokens",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "head_chunk": "memory.head_chunk",
    "directions": "memory.directions",
    "optimizer": "optim.optimizer",
    "quantization": "model.quantization",
    "max_completion_length": "rollout.max_completion_length",
}
"""Where the settings say what a sentence of ours recommends."""

PASS_TOKENS = 256
"""What a forward and backward pass costs besides its tokens, in tokens: every weight is unpacked once."""


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

    @cached_property
    def items(self) -> tuple[Need, ...]:
        """Every line of the bill, the margin among them."""
        return bill(self.shape, self.work, self.choice)

    @cached_property
    def phases(self) -> dict[Phase, int]:
        """Peak bytes of each phase: the sum of its lines."""
        return peaks(self.items)

    @cached_property
    def choice(self) -> Choice:
        """The knobs' values."""
        return Choice(**{knob.name: knob.value for knob in self.knobs})

    @property
    def concurrent(self) -> int:
        """Sequences decoded at once."""
        return self.choice.concurrent

    @property
    def micro_batch_tokens(self) -> int:
        """Padded tokens of one forward and backward pass."""
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
            "export (it needs an fp32 copy of one layer at a time, and disk space for the file)",
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
        """The rows of each micro-batch, longest first, each row in exactly one: the cheapest way to cut the sorted rows.

        sequence_length (B,) int64 -> int64 tensors on its device. rows * longest <= `micro_batch_tokens`, but a longer row goes alone. A pass
        costs its padded tokens and as much again as `PASS_TOKENS` of them, so that a few long rows do not have short ones padded to their length.
        """
        order = sequence_length.argsort(descending=True, stable=True)
        return [order[start:end] for start, end in cheapest_cuts(sequence_length[order].tolist(), self.micro_batch_tokens)]

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
            "not_counted": list(self.not_counted),
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2)


def cheapest_cuts(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Consecutive parts of `lengths` (falling), (start, end) each: the least sum of rows * longest + PASS_TOKENS, with rows * longest <= `most`.

    >>> cheapest_cuts([400, 380, 40, 40, 30], 4096), cheapest_cuts([60, 50, 40], 4096), cheapest_cuts([60, 50, 40], 100)
    ([(0, 2), (2, 5)], [(0, 3)], [(0, 1), (1, 3)])
    """
    count = len(lengths)
    best, end_of = [0] * (count + 1), [0] * count                  # from a row to the end: cost, and where its part ends
    for start in reversed(range(count)):
        widest = min(count, start + max(1, most // max(1, lengths[start])))
        costs = ((end - start) * lengths[start] + PASS_TOKENS + best[end] for end in range(start + 1, widest + 1))
        best[start], end_of[start] = min((cost, -end) for end, cost in enumerate(costs, start + 1))
        end_of[start] = -end_of[start]
    cuts, start = [], 0
    while start < count:
        cuts.append((start, end_of[start]))
        start = end_of[start]
    return cuts


def make_plan(
    shape: ModelShape,
    *,
    card_bytes: int | str | None,
    quantization: Quantization,
    compute_bytes: int,
    lora_r: int,
    lora_targets: str | Sequence[str],
    critic: bool,
    optimizer: str,
    prompts_per_step: int,
    num_generations: int,
    max_prompt_length: int,
    max_completion_length: int,
    gradient_checkpointing: bool | None = None,
    micro_batch_tokens: int | None = None,
    concurrent: int | None = None,
    head_chunk: int | None = None,
    reference: bool = False,
    device: Device = "cuda",
    unpacked: bool | None = None,
    fewest_generations: int = 1,
    truncated: bool = False,
    searchers: int = 0,
    gradients: int = 0,
    directions: DirectionKind | None = None,
) -> MemoryPlan:
    """Choose every knob that is None, honour the others, and count. Never refuses: `MemoryPlan.check` does.

    `card_bytes`: bytes, "16GiB", "RTX 4080", or None for what this machine has free. `unpacked`: rollouts copy the linear layers
    (None: on a CPU). `fewest_generations`: samples of one prompt in the call that shares prompts least, an evaluation's; 1 is the safe
    answer. `truncated`: top-p or top-k. `searchers`: processes with a copy of the model. `gradients`: how many are kept apart until the step is over.
    UserError: an unknown card or adapter target, no CUDA device where one is asked for.
    """
    work = Work(
        quantization, compute_bytes, lora_r, lora_targets if isinstance(lora_targets, str) else tuple(lora_targets), critic, optimizer,
        prompts_per_step, num_generations, max_prompt_length, max_completion_length, reference, device,
        device == "cpu" if unpacked is None else unpacked, min(fewest_generations, num_generations), truncated, searchers, gradients,
    )  # fmt: skip
    shape.adapter_parts(lora_r, work.lora_targets)
    asked = {
        "concurrent": concurrent,
        "micro_batch_tokens": micro_batch_tokens,
        "gradient_checkpointing": gradient_checkpointing,
        "head_chunk": head_chunk,
        "directions": directions,
    }
    return choose(Card.of(card_bytes, device), shape, work, asked)


def choose(card: Card, shape: ModelShape, work: Work, asked: Mapping[str, Any]) -> MemoryPlan:
    """The knobs one after the other, each judged with the smallest values of those that follow."""
    least = Choice(1, work.longest, True, 256)
    knobs: list[Knob] = []
    for name, chooser in KNOBS.items():
        if name == "directions" and not work.gradients:
            continue
        settled = {knob.name: knob.value for knob in knobs}

        def fits(phase: Phase, settled: Mapping[str, Any] = settled, **values: Any) -> bool:
            return peaks(bill(shape, work, replace(least, **{**settled, **values})))[phase] <= card.usable

        value, reason = chooser(card, shape, work, fits, settled) if asked[name] is None else (asked[name], "as set")
        knobs.append(Knob(name, value, reason))
    return MemoryPlan(card, shape, work, tuple(knobs), asked)


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
    return choose(plan.card, plan.shape, replace(plan.work, **work), asked)


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
    changes = {name: getattr(new, name) for name, value in old.asked.items() if value is not None and value != getattr(new, name)}
    changes |= {name: value for name, value in asdict(new.work).items() if value != getattr(old.work, name)}
    told = " ".join(f"{SETTING[name]}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items())
    return f"try {told} ({gib(new.phases[new.worst])})"
