"""A trial as HTML: what went wrong, each reward with its histogram, how they agree, probes, and the advantages side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from localrl.evaluate import total
from localrl.lab.numbers import Advantages, Summary, advantages, correlations, grouped, probed, signal, summaries, warnings
from localrl.lab.trial import Trial

from .html import Markup, complaint, notice, table, text
from .look import COLOURS

CSS = """
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .3rem; } p { margin: .3rem 0; }
.told { color: var(--body-text-color-subdued); }
.complaint, .notice { margin: .4rem 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .6rem .8rem; min-width: 0; overflow-wrap: anywhere; }
.card h3 { margin: 0; } .card svg { width: 100%; height: 60px; display: block; margin: .4rem 0 0; }
.ends { display: flex; justify-content: space-between; font-size: .8rem; }
.ends, td { font-variant-numeric: tabular-nums; }
td .answer { max-height: 7rem; min-width: 14rem; overflow: auto; }
.lever { position: relative; display: block; width: 110px; height: 8px; margin: .3rem 0 0; border-radius: 2px;
  background: linear-gradient(to right, transparent 54px, #808a99 54px, #808a99 56px, transparent 56px), var(--border-color-primary); }
.lever > span { position: absolute; top: 0; height: 100%; border-radius: 2px; }
"""


def number(value: float) -> str:
    """
    >>> number(0.25), number(math.nan)
    ('0.25', '-')
    """
    return "-" if math.isnan(value) else f"{value:.3g}"


def verdict(trial: Trial, weights: Sequence[float]) -> str:
    """What a person should know first."""
    stats = signal(trial, weights)
    groups = len(grouped(trial))
    told = (f"<p>{text(trial.source)}. Total reward <b>{number(stats['reward'])}</b> on average (spread {number(stats['reward_std'])}). "
            f"<b>{stats['frac_reward_zero_std']:.0%}</b> of {groups} groups teach nothing, because all answers to the prompt earn the same; "
            f"in <b>{stats['frac_reward_cancelling']:.0%}</b> rewards differ but cancel.</p>")
    return told + "".join(map(complaint, trial.troubles.values())) + "".join(map(notice, warnings(trial, weights)))


def cards(trial: Trial) -> str:
    """A card each reward."""
    inner = "".join(_card(found, COLOURS[at % len(COLOURS)]) for at, found in enumerate(summaries(trial)))
    return ('<h3>What each reward says</h3><p class="told">Bars: how many completions got how much. One bar alone teaches nothing.</p>'
            f'<div class="cards">{inner}</div>')


def _card(found: Summary, colour: str) -> str:
    if found.trouble:
        said = f'<p class="bad">{text(found.trouble)}</p>'
    elif not found.values:
        said = '<p class="told">It says nothing of any of these.</p>'
    else:
        said = bars(found, colour)
    missing = f", missing for {found.missing}" if found.missing else ""
    return (f'<div class="card"><h3>{text(found.name)}</h3><div class="told">mean {number(found.mean)}, spread {number(found.std)}{missing}<br>'
            f"the same for a whole group: {found.flat:.0%}; one call took {1000 * found.seconds:.0f} ms</div>{said}</div>")


def bars(found: Summary, colour: str) -> str:
    """A histogram; its numbers are in its title."""
    bins = found.histogram()
    most, width = max(count for *_, count in bins), 240 / len(bins)
    inner = "".join(
        f'<rect x="{at * width + 1:.1f}" y="{60 - 58 * count / most:.1f}" width="{width - 2:.1f}" height="{58 * count / most:.1f}" fill="{colour}">'
        f"<title>{number(low)} to {number(high)}: {count}</title></rect>"
        for at, (low, high, count) in enumerate(bins)
    )
    said = ", ".join(f"{number(low)} to {number(high)}: {count}" for low, high, count in bins if count)
    return (f'<svg viewBox="0 0 240 60" preserveAspectRatio="none" role="img" aria-label="Histogram of {text(found.name)}. {text(said)}">{inner}</svg>'
            f'<div class="ends"><span>{number(bins[0][0])}</span><span>{number(bins[-1][1])}</span></div>')


def agreement(trial: Trial) -> str:
    """Correlations of each two rewards."""
    if len(trial.names) < 2:
        return '<p class="told">Agreement is between two rewards or more.</p>'
    rows = [[name, *("-" if r is None else f"{r:+.2f}" for r in row)] for name, row in zip(trial.names, correlations(trial), strict=True)]
    said = "Correlation over all completions: +1 they say the same, 0 nothing of each other, -1 they ask for opposites; -: one of them does not vary."
    return table(["", *trial.names], rows, range(1, len(trial.names) + 1), said)


def fakes(trial: Trial, weights: Sequence[float]) -> str:
    """Probes beside real answers."""
    found = probed(trial, weights)
    if not found:
        return '<p class="told">No probes: no reward could be asked about them.</p>'
    rows = [[p.kind, *map(number, p.rewards), number(p.total), Markup('<span class="bad">more than real answers</span>') if p.beats else "less"] for p in found]
    return table(["probe", *trial.names, "total", "against real answers"], rows, range(1, len(trial.names) + 2),
                 "Answers that deserve nothing. What earns more than real answers is what a model will learn instead.")


def levers(trial: Trial, weights: Sequence[float], group: int) -> str:
    """One prompt's completions, with what each algorithm makes of them."""
    found = advantages(trial, weights)
    groups = grouped(trial)
    group = group if 0 <= group < len(groups) else 0
    own = groups[group]
    place_of = {id(r): place for place, r in enumerate(trial.rollouts)}
    at = [place_of[id(r)] for r in own]
    largest = max((abs(v) for each in found for v in each.values), default=0.0) or 1.0
    heads = ["completion", *trial.names, "total", *(each.label for each in found)]
    rows = [
        [Markup(f'<div class="answer" tabindex="0"><pre class="text">{text(r.text) or "(nothing)"}</pre></div>'), *map(number, r.rewards),
         number(total(r.rewards, weights)), *(_lever(each.values[place], largest) if each.values else "-" for each in found)]
        for place, r in zip(at, own, strict=True)
    ]  # fmt: skip
    said = "Advantage: how strongly the update pushes towards an answer (right, blue) or away from it (left, orange)."
    return _weights(trial, weights, found) + table(heads, rows, range(1, len(trial.names) + 2), said)


def _weights(trial: Trial, weights: Sequence[float], found: Sequence[Advantages]) -> str:
    """What becomes of the weights, where an algorithm moves them; and why there is nothing."""
    said = []
    for each in found:
        if each.note:
            said.append(f"<p class='told'>{text(each.label)}: {text(each.note)}.</p>")
        if each.values and each.weights != tuple(weights):
            moved = ", ".join(f"{n} {number(a)} to {number(b)}" for n, a, b in zip(trial.names, weights, each.weights, strict=True))
            said.append(f"<p><b>{text(each.label)}</b> moves the weights: {text(moved)}.</p>")
    return "".join(said)


def _lever(value: float, largest: float) -> Markup:
    width = 55 * abs(value) / largest
    left, colour = (55, "#2563eb") if value >= 0 else (55 - width, "#d97706")
    return Markup(f'{value:+.2f}<span class="lever" aria-hidden="true"><span style="left:{left:.1f}px;width:{width:.1f}px;background:{colour}"></span></span>')


def prompts(trial: Trial) -> list[tuple[str, int]]:
    """(shown, number) of each group, for a list to pick from."""
    found = []
    for at, group in enumerate(grouped(trial)):
        content = group[0].request.prompt.content
        asked = " ".join((content if isinstance(content, str) else content[-1]["content"]).split())
        found.append((f"{at + 1}: {asked[:70]}", at))
    return found
