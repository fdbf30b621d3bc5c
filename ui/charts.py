"""A run's numbers as charts: which metrics stand together, and what each says (`figures.py` draws it, `board.py` shows it).

No metric is hidden: what has no place of its own is among "more". What is special to an algorithm is told by its `pictures`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from localrl.algorithms.base import Algorithm, Picture

from .figures import GREY, TOTAL, Figure, absent, across, band, colours, extent, faint, figure_of, line, short, trace
from .html import text
from .look import COLOURS
from .tail import Curves

GIB = 2**30
NOT_SHOWN = {"step", "timestamp"}

SIGNALS = (
    Picture("Entropy", "Nats a token: how undecided the policy is. It falls with learning; near 0 all answers are alike and exploring ends.", ("entropy",)),
    Picture("Distance from the start", "KL divergence from the untrained model, nats a token. It grows with learning; a sudden rise is a warning.", ("kl",)),
    Picture("Clipped updates", "Share of tokens whose update hit the clip range. Above 0.2 or so the steps are too large.", ("clip_ratio",)),
    Picture("Groups that teach nothing", "Share of prompts whose answers all got the same reward, of those where rewards cancel, and of answers "
            "without any reward. 0 is best.", ("frac_reward_zero_std", "frac_reward_cancelling", "frac_unscored")),
    Picture("Length of answers", "Tokens: mean, shortest and longest of the step.",
            ("completions/mean_length", "completions/min_length", "completions/max_length")),
    Picture("Cut or unfinished answers", "Share of answers that ran into the length limit. At 1 the model never ends by itself.",
            ("completions/clipped_ratio", "completions/unfinished")),
    Picture("Gradient", "Its length before clipping. Steady is good; spikes mean a step that was dominated by a few answers.", ("grad_norm",)),
    Picture("Loss", "What the update minimises. It says little about learning: look at the rewards.", ("loss",)),
    Picture("Learning rate", "As the schedule has it.", ("learning_rate",)),
)
SPEED = (
    Picture("Tokens a second", "How fast it samples and how fast it learns.", ("tokens_per_second/*",)),
    Picture("Waiting", "Share of the sampler's work that went to answers which were already done.", ("rollout/idle_share",)),
)
DERIVED = ("_planned", "_ratio", "_reserved")
RETRIES = "memory/oom_retries"


@dataclass(frozen=True)
class Chart:
    """One chart: what the browser needs, and what it is called."""

    key: str
    title: str
    caption: str
    figure: Figure
    height: int = 260

    def as_dict(self) -> dict[str, Any]:
        """For the browser."""
        return {"key": self.key, "title": self.title, "caption": self.caption, "figure": self.figure, "height": self.height}


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    key: str
    title: str
    charts: tuple[Chart, ...]
    folded: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the browser."""
        return {"key": self.key, "title": self.title, "folded": self.folded, "charts": [chart.as_dict() for chart in self.charts]}


@dataclass
class Drawing:
    """Everything that charts are made from, and which metrics have been used."""

    curves: Curves
    evaluations: Sequence[Mapping[str, Any]] = ()
    rewards: Sequence[str] = ()
    """Names of the rewards, in their order."""
    algorithm: Algorithm | None = None
    used: set[str] = field(default_factory=set)

    def have(self, pattern: str) -> list[str]:
        """Metrics with this name, `*` standing for a part, that were told at least once. They count as shown."""
        like = re.compile("[^/]+".join(map(re.escape, pattern.split("*"))))
        found = [name for name in self.curves.names if like.fullmatch(name) and bool((~absent(self.curves.mean(name))).any())]
        self.used |= set(found)
        return found


def sections(drawing: Drawing) -> list[Section]:
    """The whole board, from what the metrics say there is."""
    own = _own(drawing)
    found = [
        Section("rewards", "Rewards", tuple(_rewards(drawing))),
        Section("signals", "Signals of learning", tuple(_pictures(drawing, SIGNALS, "signal"))),
        Section("algorithm", f"The algorithm: {drawing.algorithm.name}" if drawing.algorithm else "", own),
        Section("cost", "Time and memory", (*_time(drawing), *_pictures(drawing, SPEED, "speed"), *_memory(drawing))),
    ]
    return [section for section in [*found, Section("more", "More numbers", tuple(_more(drawing)), folded=True)] if section.charts]


# -- rewards --------------------------------------------------------------------------------------------------------------------


def _rewards(drawing: Drawing) -> Iterator[Chart]:
    curves = drawing.curves
    if drawing.have("reward"):
        drawing.have("reward_std")
        data = [*band(curves, "reward", "reward_std", COLOURS[0]), *line(curves, "reward", TOTAL, COLOURS[0]),
                *_held_out(drawing.evaluations, "eval/reward", "eval/reward/stderr", "held out", COLOURS[1])]
        yield Chart("reward", "Total reward", "Mean of each step's answers; the band is their spread (one standard deviation). Dots: prompts it never "
                    "trains on, with two standard errors. Up is good.", figure_of(data, legend=True), 320)
    names = [name for name in _in_order(drawing) if drawing.have(f"rewards/{name}/mean")]
    if names:
        data = []
        for name, colour in zip(names, colours(), strict=False):
            drawing.have(f"rewards/{name}/std")
            data += [*(band(curves, f"rewards/{name}/mean", f"rewards/{name}/std", colour, name) if len(names) < 4 else ()),
                     *line(curves, f"rewards/{name}/mean", name, colour),
                     *_held_out(drawing.evaluations, f"eval/rewards/{name}/mean", f"eval/rewards/{name}/stderr", name, colour)]
        yield Chart("rewards", "Each reward", "Mean of each reward over the step's answers, before weights; dots are held out. A click on a name hides it, "
                    "a double click shows it alone.", figure_of(data, legend=True), 320)


def _in_order(drawing: Drawing) -> list[str]:
    """The rewards that there are metrics of; those that the settings name come first."""
    there = [name.split("/")[1] for name in drawing.curves.names if name.startswith("rewards/") and name.endswith("/mean") and name.count("/") == 2]
    return [*(name for name in drawing.rewards if name in there), *(name for name in there if name not in drawing.rewards)]


def _held_out(rows: Sequence[Mapping[str, Any]], mean: str, error: str, name: str, colour: str) -> list[Figure]:
    found = [(row["step"], row[mean], 2 * (row.get(error) or 0.0)) for row in rows if row.get(mean) is not None and "step" in row]
    if not found:
        return []
    steps, values, errors = zip(*found, strict=True)
    return [{
        "type": "scatter", "mode": "markers", "name": text(f"{name}, held out" if name != "held out" else name), "x": [*steps], "y": short(values),
        "error_y": {"type": "data", "array": short(errors), "color": colour, "thickness": 1.5}, "marker": {"color": colour, "size": 8, "symbol": "diamond"},
        "legendgroup": text(name), "showlegend": name == "held out",
    }]  # fmt: skip


# -- pictures -------------------------------------------------------------------------------------------------------------------


def _own(drawing: Drawing) -> tuple[Chart, ...]:
    """What the algorithm declares, and a line for each of its reports that is in no picture."""
    if drawing.algorithm is None:
        return ()
    declared = [*_pictures(drawing, drawing.algorithm.pictures, "own", drawing.algorithm)]
    common = {name for picture in SIGNALS for name in picture.metrics}
    rest = [Picture(_spoken(name), "Reported by the algorithm.", (name,)) for name in drawing.algorithm.reports if name not in drawing.used | common]
    return (*declared, *_pictures(drawing, rest, "report"))


def _pictures(drawing: Drawing, pictures: Sequence[Picture], kind: str, algorithm: Algorithm | None = None) -> Iterator[Chart]:
    for number, picture in enumerate(pictures):
        names = [name for pattern in picture.metrics for name in drawing.have(pattern)]
        if names:
            made = _matrix(drawing, names) if picture.form == "matrix" else _lines(drawing, names, picture, algorithm)
            yield Chart(f"{kind}-{number}", picture.title, picture.caption, made)


def _lines(drawing: Drawing, names: Sequence[str], picture: Picture, algorithm: Algorithm | None) -> Figure:
    data: list[Figure] = []
    for name, colour in zip(names, colours(), strict=False):
        data += extent(drawing.curves, name, colour) if len(names) == 1 else []
        data += line(drawing.curves, name, _label(name, names, drawing.rewards), colour)
    figure = figure_of(data, legend=len(names) > 1)
    for limit in picture.limits:
        value = getattr(algorithm, limit, None)
        if isinstance(value, int | float) and math.isfinite(value):
            figure["layout"]["shapes"] = [*figure["layout"].get("shapes", ()), across(float(value))]
    return figure


def _matrix(drawing: Drawing, names: Sequence[str]) -> Figure:
    """Pairs `i-j` as they are now, in a square; the diagonal is 0."""
    pairs = {(int(m[1]), int(m[2])): name for name in names if (m := re.search(r"/(\d+)-(\d+)/", name))}
    size = 1 + max((max(pair) for pair in pairs), default=0)
    values: list[list[float | None]] = [[0.0 if i == j else None for j in range(size)] for i in range(size)]
    for (i, j), name in pairs.items():
        known = drawing.curves.mean(name)
        known = known[~absent(known)]
        values[i][j] = values[j][i] = round(float(known[-1]), 1) if len(known) else None
    labels = [text(_reward(i, drawing.rewards)) for i in range(size)]
    heat = {
        "type": "heatmap", "z": values, "x": labels, "y": labels, "zmin": 0, "zmax": 180, "zmid": 90,
        "colorscale": [[0, "#16a34a"], [0.5, "#f3f4f6"], [1, "#dc2626"]], "texttemplate": "%{z:.0f}°", "textfont": {"color": "#111827"},
        "colorbar": {"title": {"text": "degrees"}, "thickness": 10}, "xgap": 2, "ygap": 2,
    }  # fmt: skip
    figure = figure_of([heat])
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "type": "category"}
    figure["layout"]["xaxis"] = {"type": "category", "color": GREY}
    figure["layout"]["hovermode"] = "closest"
    return figure


# -- time and memory ------------------------------------------------------------------------------------------------------------


def _time(drawing: Drawing) -> Iterator[Chart]:
    names = [name for name in drawing.have("time/*") if name != "time/step"]
    if names:
        data = [
            {**one, "stackgroup": "time", "fillcolor": faint(colour, 0.55), "line": {"color": colour, "width": 1}}
            for name, colour in zip(names, colours(), strict=False)
            for one in trace(drawing.curves, name, _spoken(name), colour)
        ]
        yield Chart("time", "Where a step's time goes", "Seconds of each phase, stacked: the widest band is what to speed up.", figure_of(data, legend=True))


def _memory(drawing: Drawing) -> Iterator[Chart]:
    curves = drawing.curves
    retries = drawing.have(RETRIES)
    there = [name for name in drawing.have("memory/*") if name != RETRIES]
    phases = [name for name in there if not name.endswith(DERIVED)]
    if phases:
        data = []
        for name, colour in zip(phases, colours(), strict=False):
            data += line(curves, name, _spoken(name), colour, scale=1 / GIB, smooth=False)
            if (planned := f"{name}_planned") in there:
                plan = trace(curves, planned, f"{_spoken(name)}, planned", colour, scale=1 / GIB)
                data += [{**one, "line": {"color": colour, "width": 1, "dash": "dot"}, "showlegend": False} for one in plan]
        yield Chart("memory", "Memory against plan", "GiB at each phase's peak; dotted: what the plan expected of it. Lines should stay below their dots.",
                    figure_of(data, legend=True))
    ratios = [name for name in there if name.endswith("_ratio")]
    if ratios:
        data = [
            one for name, colour in zip(ratios, colours(), strict=False)
            for one in line(curves, name, _spoken(name.removesuffix("_ratio")), colour, smooth=False)
        ]  # fmt: skip
        figure = figure_of(data, legend=True)
        figure["layout"]["shapes"] = [across(1.0)]
        yield Chart("memory-ratio", "Measured over planned", "1: exactly as planned. Above it the plan was too small, far below it room is wasted.", figure)
    if retries:
        yield Chart("oom", "Passes repeated for lack of memory", "How often a pass was made smaller and done again, so far. 0 is good; rising means that "
                    "the plan is too tight.",
                    figure_of([*line(curves, RETRIES, "repeats", COLOURS[4], smooth=False)]), 200)


# -- the rest -------------------------------------------------------------------------------------------------------------------


def _more(drawing: Drawing) -> Iterator[Chart]:
    """What has no place of its own, those with a prefix in common together, some lines a chart."""
    left = sorted((n for n in drawing.curves.names if n not in drawing.used | NOT_SHOWN), key=lambda n: (_prefix(n), n))
    for prefix, group in groupby(left, _prefix):
        names = [name for name in group if drawing.have(name)]
        for start in range(0, len(names), len(COLOURS)):
            part = names[start : start + len(COLOURS)]
            title = prefix.replace("_", " ") + (f" ({start // len(COLOURS) + 1})" if len(names) > len(COLOURS) else "")
            yield Chart(f"more-{prefix}-{start}", title, ", ".join(part), _lines(drawing, part, Picture("", "", ()), None))


def _prefix(name: str) -> str:
    """What a metric's name shares with those that belong to it.

    >>> _prefix("sampler/kl"), _prefix("rewards/a/seconds"), _prefix("odd")
    ('sampler', 'rewards: seconds', 'others')
    """
    parts = name.split("/")
    return "others" if len(parts) == 1 else f"{parts[0]}: {parts[-1]}" if len(parts) > 2 else parts[0]


# -- names ----------------------------------------------------------------------------------------------------------------------


CALLED = {"frac_reward_zero_std": "all the same", "frac_reward_cancelling": "cancelling", "frac_unscored": "no reward", "completions/clipped_ratio": "cut",
          "completions/unfinished": "go on"}
"""Metrics whose names say little to somebody who sees them first."""


def _label(name: str, among: Sequence[str], rewards: Sequence[str]) -> str:
    """What tells a metric from those beside it; a number in the middle is a reward's.

    >>> _label("steering/1/weight", ["steering/0/weight", "steering/1/weight"], ["right", "short"])
    'short'
    >>> _label("tba/age", ["tba/age", "buffer/size"], [])
    'tba age'
    """
    if name in CALLED:
        return CALLED[name]
    parts = name.split("/")
    numbers = [part for part in parts[1:-1] if re.fullmatch(r"\d+(-\d+)?", part)]
    if numbers:
        return " and ".join(_reward(int(n), rewards) for n in numbers[0].split("-"))
    if len({other.split("/")[0] for other in among}) == 1 and len(parts) > 1:
        parts = parts[1:]
    return " ".join(parts).replace("_", " ")


def _reward(number: int, rewards: Sequence[str]) -> str:
    return rewards[number] if number < len(rewards) else f"direction {number + 1}"


def _spoken(name: str) -> str:
    return name.split("/")[-1].replace("_", " ")
