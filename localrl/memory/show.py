"""The plan in a terminal: a table of the bill, a bar for each phase against the card, the knobs and their reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from localrl.memory.cards import gib
from localrl.memory.plan import WHILE, MemoryPlan, way_out
from localrl.memory.work import PHASES

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_red")
"""Of the largest lines; what is left is grey."""


def plan_table(plan: MemoryPlan) -> RenderableType:
    """Everything that the plan knows, for a console of any width."""
    parts: list[RenderableType] = [_bill(plan), Text(), Bars(plan), Text(), _knobs(plan), Text()]
    if plan.fits:
        verdict = Text(f"fits: {gib(plan.phases[plan.worst])} at most, {WHILE[plan.worst]}, of {gib(plan.card.usable)}", style="green")
    else:
        verdict = Text(f"does not fit: {gib(plan.phases[plan.worst])} {WHILE[plan.worst]}, of {gib(plan.card.usable)}; {way_out(plan)}", style="red")
    return Group(*parts, verdict, Text("an estimate; not counted: " + "; ".join(plan.not_counted), style="dim"))


def cards_table(plans: Sequence[MemoryPlan]) -> RenderableType:
    """The same run on several cards, a row each; what would make it fit stands below, because settings must not be cut."""
    table = Table("card", "usable", "needs", "while", "wave", "tokens a pass", "fits", title="the same run on other cards", title_justify="left")
    ways = []
    for plan in plans:
        fits = Text("yes", style="green") if plan.fits else Text("no", style="red")
        wave, phase = f"{plan.concurrent} of {plan.work.rollouts}", WHILE[plan.worst].removeprefix("while ")
        table.add_row(
            plan.card.name, gib(plan.card.usable), gib(plan.phases[plan.worst]), phase, wave, str(plan.micro_batch_tokens), fits
        )
        if not plan.fits:
            ways.append(Text(f"{plan.card.name}: {way_out(plan)}"))
    return Group(table, *ways)


@dataclass(frozen=True)
class Bars:
    """A bar for each phase, stacked by lines, with a mark where the card's usable memory ends."""

    plan: MemoryPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plan = self.plan
        full, edge = ("#", "|") if options.ascii_only else ("█", "▏")
        width = max(10, min(60, options.max_width - 26))
        scale = width / max(plan.card.usable, plan.phases[plan.worst], 1)
        colours = self.colours()
        end = round(plan.card.usable * scale)
        for phase in PHASES:
            bar, done, used = Text(), 0.0, 0
            for item in sorted(plan.lines(phase), key=lambda item: list(colours).index(item.name) if item.name in colours else len(colours)):
                done += item.bytes * scale
                bar.append(full * (round(done) - used), style=colours.get(item.name, "bright_black"))
                used = round(done)
            if used < end:
                bar.append(" " * (end - used))
            over = plan.phases[phase] > plan.card.usable
            yield Text.assemble(f"{phase:<10}", bar, edge, (f" {gib(plan.phases[phase]):>9}", "red" if over else ""))
        legend = Text()
        for name, colour in {**colours, "the rest": "bright_black"}.items():
            legend.append(full * 2, style=colour).append(f" {name}  ")
        yield legend

    def colours(self) -> dict[str, str]:
        """The largest lines of any phase, largest first, each with its colour."""
        largest: dict[str, int] = {}
        for item in self.plan.items:
            if not item.name.startswith("margin"):
                largest[item.name] = max(item.bytes, largest.get(item.name, 0))
        names = sorted(largest, key=lambda name: -largest[name])[: len(COLOURS)]
        return dict(zip(names, cycle(COLOURS), strict=False))


def _bill(plan: MemoryPlan) -> Table:
    card = plan.card
    beside = "" if card.device == "cpu" else ", the rest is the driver's and the desktop's"
    table = Table(plan.unit, title=f"{card.name}: {gib(card.usable)} of {gib(card.total)} usable{beside}", title_justify="left")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    *lines, last = plan.rows()
    for line in lines:
        if any(line[1:]):
            table.add_row(*line)
    table.add_section()
    style = "bold green" if plan.fits else "bold red"
    table.add_row(*(Text(cell, style=style) for cell in last))
    return table


def _knobs(plan: MemoryPlan) -> Table:
    table = Table("knob", "value", "why", title_justify="left")
    for knob in plan.knobs:
        value = {True: "on", False: "off"}[knob.value] if isinstance(knob.value, bool) else str(knob.value)
        table.add_row(knob.name, value, knob.reason)
    return table
