"""The plan in a terminal: bars against the card, the knobs and their reasons, the bill, what waits on the host, how fast it will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from localrl.memory.cards import GIB, gib
from localrl.memory.knobs import HEAD_CHUNK
from localrl.memory.plan import SETTING, WHILE, MemoryPlan, way_out
from localrl.memory.speed import Speed, expected
from localrl.memory.work import PHASES, Need, Phase

NARROW = 76
"""Columns of a terminal below which names and reasons take lines of their own."""
WIDE = 96
"""From here on numbers stand apart."""
SHORT: Mapping[Phase, str] = {"load": "load", "rollout": "roll", "scoring": "score", "backward": "back", "optimiser": "optim", "export": "export"}
IDLE: Mapping[str, Any] = {"head_chunk": HEAD_CHUNK, "mlp_tile": 0, "offload": False, "kv_cache": "full", "embedding_on_host": False}
"""Knobs that do nothing, at these values."""


@dataclass(frozen=True)
class Kind:
    """Lines of the bill that share a colour."""

    name: str
    colour: str
    letter: str
    """In its place where there are no colours."""
    starts: tuple[str, ...] = ()
    """Of the names of its lines."""


REST = Kind("libraries, margin", "bright_black", ".", ("libraries", "Python", "heap", "more, as", "copies of", "margin"))
WORK = Kind("at work", "blue", "w")
KINDS = (
    Kind("base", "cyan", "b", ("base",)),
    Kind("adapter, gradients, optimiser", "green", "a", ("adapter", "optimiser state", "gradients", "the last update's sketch", "the step's batch", "credit")),
    Kind("KV cache", "yellow", "k", ("KV cache",)),
    Kind("layer inputs", "magenta", "i", ("layer inputs",)),
    WORK,
    REST,
)
"""From left to right. What one phase alone has and nobody else claims is at work, what is left is the rest."""


def plan_table(plan: MemoryPlan, machine: tuple[int, int] | None = None, passes: int | None = None) -> RenderableType:
    """Everything that the plan knows, for a console of any width.

    `machine`: bytes (free, in all) of the computer's own memory, where it is the one that will train. `passes`: `speed.expected`.
    """
    parts: list[RenderableType] = [_verdict(plan), Text(), Bars(plan), Text(), Knobs(plan), Text(), Bill(plan)]
    if plan.host:
        parts += [Text(), _host(plan, machine)]
    if (speed := expected(plan.shape, plan.work, plan.choice, plan.card, passes)) is not None and plan.fits:
        parts += [Text(), _speed(plan, speed)]
    if taught := _taught(plan):
        parts += [Text(), Text(taught)]
    return Group(*parts, Text(), Text("An estimate. Not counted: " + "; ".join(plan.not_counted) + ".", style="dim"))


def cards_table(plans: Sequence[MemoryPlan], passes: int | None = None) -> RenderableType:
    """The same run on several cards, a row each; what would make it fit stands below, because settings must not be cut."""
    return Cards(tuple(plans), passes)


def as_dict(plan: MemoryPlan, passes: int | None = None) -> dict[str, Any]:
    """Plain values: the plan's own, and `speed` (None: not known), `learned`, `way_out` (None: it fits)."""
    speed = expected(plan.shape, plan.work, plan.choice, plan.card, passes)
    told = None
    if speed is not None:
        rates = {part.name: {**asdict(part), "tokens_per_second": part.tokens_per_second} for part in speed.parts}
        told = {"assumed": speed.assumed, "seconds": speed.seconds, "parts": rates}
    return {**plan.to_dict(), "speed": told, "learned": dict(plan.learned), "way_out": None if plan.fits else way_out(plan)}


def kind_of(plan: MemoryPlan, name: str) -> Kind:
    """Of a line of the plan's bill."""
    for kind in KINDS:
        if name.startswith(kind.starts or ("\0",)):
            return kind
    return WORK if len({phase for item in plan.items if item.name == name for phase in item.phases}) == 1 else REST


@dataclass(frozen=True)
class Bars:
    """A bar for each phase, stacked by kinds of lines, with a mark where the card's usable memory ends."""

    plan: MemoryPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = options.ascii_only or console.no_color or console.color_system is None
        plan, width = self.plan, max(10, min(80, options.max_width - 24))
        scale = width / max(plan.card.usable, plan.phases[plan.worst], 1)
        end = round(plan.card.usable * scale)
        for phase in PHASES:
            bar = Text.assemble(*((count * (kind.letter if plain else "█"), kind.colour) for kind, count in self.stack(phase, scale)))
            bar.pad_right(max(0, width - len(bar)))
            over = plan.phases[phase] > plan.card.usable
            size = f" {gib(plan.phases[phase]):>9}{' !' if over else ''}", "red" if over else ""
            yield Text.assemble(f"{phase:<10}", bar[:end], ("|" if plain else "┃", "bold"), bar[end:], size)
        mark, told = "|" if plain else "┃", f"{gib(plan.card.usable)} usable"
        yield Text(f"{told:>{9 + end}} {mark}" if len(told) < 10 + end else f"{mark:>{11 + end}} {told}", style="dim")
        seen = {kind_of(plan, item.name) for item in plan.items}
        names = [Text.assemble((kind.letter if plain else "██", kind.colour), f" {kind.name}") for kind in KINDS if kind in seen]
        yield Columns(names, padding=(0, 2))

    def stack(self, phase: Phase, scale: float) -> Iterator[tuple[Kind, int]]:
        """Of each kind, characters; together as many as the phase's bytes times `scale`."""
        done, used = 0.0, 0
        for kind in KINDS:
            done += scale * sum(item.bytes for item in self.plan.lines(phase) if kind_of(self.plan, item.name) is kind)
            yield kind, round(done) - used
            used = round(done)


@dataclass(frozen=True)
class Knobs:
    """Those that do something or were told, as they would be set, each with its reason; the others in one line."""

    plan: MemoryPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        idle = [knob for knob in self.plan.knobs if knob.reason != "as set" and knob.name in IDLE and knob.value == IDLE[knob.name]]
        rows = [(setting(knob.name, knob.value), knob.reason) for knob in self.plan.knobs if knob not in idle]
        yield Text("What the plan sets, and why", style="bold")
        yield _pairs(rows, options.max_width)
        if idle:
            yield Text("not needed: " + ", ".join(setting(knob.name, knob.value) for knob in idle), style="dim")


@dataclass(frozen=True)
class Bill:
    """The lines of each phase; what a phase alone needs while it works is one line."""

    plan: MemoryPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plan, narrow = self.plan, options.max_width < NARROW
        gap = 1 if options.max_width < WIDE else 2
        size, digits = (GIB, 2) if plan.unit == "GiB" else (2**20, 1)
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
        table.add_column(plan.unit, overflow="fold")
        for phase in PHASES:
            table.add_column(SHORT[phase] if narrow else phase, justify="right", no_wrap=True)
        room = options.max_width - sum(max(5, len(SHORT[phase] if narrow else phase)) + gap for phase in PHASES)
        for name, each in self.rows().items():
            cells = [f"{each[phase] / size:.{digits}f}" if each[phase] else "" for phase in PHASES]
            if any(float(cell or 0) for cell in cells):
                table.add_row(name if len(name) <= room else name.split(" (")[0].split(" that ")[0], *cells)
        peak = [Text(f"{plan.phases[phase] / size:.{digits}f}", style="red" if plan.phases[phase] > plan.card.usable else "") for phase in PHASES]
        table.add_row("peak", *peak, style="bold")
        yield table

    def rows(self) -> dict[str, dict[Phase, int]]:
        """Bytes by line and phase, from left to right as in the bars."""
        order = sorted(self.plan.items, key=lambda item: KINDS.index(kind_of(self.plan, item.name)))
        found: dict[str, dict[Phase, int]] = {}
        for item in order:
            row = found.setdefault(WORK.name if kind_of(self.plan, item.name) is WORK else item.name, dict.fromkeys(PHASES, 0))
            for phase in item.phases:
                row[phase] += item.bytes
        return found


@dataclass(frozen=True)
class Cards:
    """A row for each plan, and below what would make those fit that do not."""

    plans: tuple[MemoryPlan, ...]
    passes: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("card", "fits", "GiB needed", "wave", "a pass", "tokens/s"):
            table.add_column(name, justify="left" if name == "card" else "right", no_wrap=name != "GiB needed")
        if not narrow:
            table.add_column("with")
        notes = []
        for plan in self.plans:
            table.add_row(*self.row(plan), *([] if narrow or not plan.fits else [saved(plan)]))
            if plan.fits and narrow:
                notes.append((f"{plan.card.name}:", saved(plan)))
            if not plan.fits:
                notes.append((f"{plan.card.name}:", f"{gib(plan.phases[plan.worst])} {WHILE[plan.worst]}; {way_out(plan)}"))
        yield table
        if notes:
            yield Text()
            yield _pairs(notes, NARROW)
        yield Text()
        yield Text(self.legend(), style="dim")

    def row(self, plan: MemoryPlan) -> list[RenderableType]:
        """Its cells."""
        needed = f"{plan.phases[plan.worst] / GIB:.1f}/{plan.card.usable / GIB:.1f}"
        if not plan.fits:
            return [plan.card.name, Text("no", style="red"), needed]
        speed = expected(plan.shape, plan.work, plan.choice, plan.card, self.passes)
        rates = f"{speed.rollout.tokens_per_second:,.0f}/{speed.learning.tokens_per_second:,.0f}" if speed else ""
        return [plan.card.name, Text("yes", style="green"), needed, f"{plan.concurrent} of {plan.work.rollouts}", str(plan.micro_batch_tokens), rates]

    def legend(self) -> str:
        """What the columns mean."""
        assumed = {plan.card.name: plan.card.assumed for plan in self.plans if plan.fits and plan.card.assumed}
        cards = f" (of a size, the slowest common card: {', '.join(f'{name} {card}' for name, card in assumed.items())})" if assumed else ""
        return (
            "GiB needed: at the fullest moment, of what is usable. wave: responses written at once. a pass: tokens of one forward and backward pass. "
            f"tokens/s: expected, while it samples / learns{cards}."
        )


def setting(name: str, value: object) -> str:
    """A knob as one would set it.

    >>> setting("offload", True), setting("concurrent", 24)
    ('memory.offload=true', 'rollout.concurrent=24')
    """
    return f"{SETTING[name]}={str(value).lower() if isinstance(value, bool) else value}"


def saved(plan: MemoryPlan) -> str:
    """What the plan does to save memory, in a few words."""
    choice = plan.choice
    told = {
        "checkpointing": choice.gradient_checkpointing, f"MLP tile {choice.mlp_tile}": choice.mlp_tile > 0,
        "offload": choice.offload, "8-bit KV": choice.kv_cache == "int8", "embedding on host": choice.embedding_on_host,
    }  # fmt: skip
    return ", ".join(name for name, on in told.items() if on) or "nothing"


def _verdict(plan: MemoryPlan) -> Text:
    card, most = plan.card, f"{gib(plan.phases[plan.worst])} at most, {WHILE[plan.worst]}"
    beside = "free now" if card.device == "cpu" else "usable, the rest is the driver's and the desktop's"
    title = f"{card.name}: {gib(card.usable)} of {gib(card.total)} {beside}\n"
    if plan.fits:
        return Text.assemble((title, "bold"), (f"It fits: {most}.", "green"))
    way = way_out(plan)
    return Text.assemble((title, "bold"), (f"It does not fit: {most}.\n", "red"), f"{way[0].upper()}{way[1:]}.")


def _host(plan: MemoryPlan, machine: tuple[int, int] | None) -> RenderableType:
    """What waits in the computer's own memory, at its fullest moment against what that has."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    for need in plan.host:
        lines.add_row("  " + need.name, gib(need.bytes), _when(need))
    most = max(sum(need.bytes for need in plan.host if phase in need.phases) for phase in PHASES)
    told: list[RenderableType] = [Text("In the computer's own memory instead", style="bold"), lines]
    if plan.card.pinned is not None:
        told.append(Text(f"  about {gib(plan.card.pinned)} of it may be pinned", style="dim"))
    if machine is not None:
        free, total = machine
        style = "red" if most > free else ""
        told.append(Text(f"  this computer has {gib(free)} free of {gib(total)}{'' if most <= free else ': too little'}", style=style))
    return Group(*told)


def _when(need: Need) -> str:
    return "all the time" if len(need.phases) == len(PHASES) else ", ".join(WHILE[phase] for phase in need.phases)


def _speed(plan: MemoryPlan, speed: Speed) -> RenderableType:
    """Of a step whose responses are all as long as they may be."""
    whose = f" on a card like the {speed.assumed}" if speed.assumed else ""
    work = plan.work
    step = f"{work.rollouts} responses of {work.max_completion_length} tokens, {work.longest} with their prompts; rewards and the update come on top"
    title = Group(Text(f"Expected{whose}: {duration(speed.seconds)} a step", style="bold"), Padding(Text(step, style="dim"), (0, 0, 0, 2)))
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify)
    for part in speed.parts:
        if part.seconds:
            table.add_row(f"  {part.name}", f"{part.tokens_per_second:,.0f} tokens/s", duration(part.seconds), f"mostly {part.reason}")
    return Group(title, table)


def duration(seconds: float) -> str:
    """For people.

    >>> duration(3.21), duration(45), duration(400), duration(9000)
    ('3.2 s', '45 s', '6.7 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _taught(plan: MemoryPlan) -> str:
    """What past runs have measured, where it is not what was planned."""
    told = ", ".join(f"{phase} {factor:.2f}" for phase, factor in plan.learned.items() if factor != 1)
    return f"Past runs of this model on this card measured, as a multiple of the plan: {told}. What exceeds 1 is counted above." if told else ""


def _pairs(rows: Sequence[tuple[str, str]], width: int) -> RenderableType:
    """Names and what is said of them: beside each other, or one below the other."""
    if width < NARROW:
        return Group(*(part for name, told in rows for part in (Text("  " + name), Padding(Text(told, style="dim"), (0, 0, 0, 6)))))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, told in rows:
        table.add_row("  " + name, told)
    return table
