"""From the events of a few simulations to `Lines`: every event's size is a sum of features, and the sums that can be the largest are kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from math import prod

import numpy as np
from numpy.typing import NDArray

from localrl.memory.lines import Feature, Lines, Variables
from localrl.simulate.counter import Event, Place

Array = NDArray[np.float64]
EXACT = 0.01
"""Largest difference of an event from its sum, as a share of the largest event, that blocks and rounding may cause."""

NEAR = 0.05
"""An event that is never this close to the fullest one of its simulation need not be a sum of the features: it is left out."""


class NotLinear(RuntimeWarning):
    """An event's size is no sum of these features: the simulation has a regime that they do not know."""


def doubt(what: str) -> None:
    """A warning: a plan that may be off is worth more than none, and running out of memory is survived."""
    warnings.warn(f"this model's memory can be predicted roughly only ({what})", NotLinear, stacklevel=3)


def lines_of(points: Sequence[tuple[Variables, Sequence[Event]]], features: Sequence[Feature], box: Callable[[np.random.Generator], Variables]) -> Lines:
    """`points`: variables and events of each simulation; `box` draws work as it may be asked. Raises NotLinear."""
    design = np.array([_values(features, variables) for variables, _ in points])
    scale = np.abs(design).max(0)
    sizes = _aligned([events for _, events in points])              # (points, events)
    solution, *_ = np.linalg.lstsq(design / scale, sizes, rcond=None)
    lacking = sizes - design / scale @ solution                     # (points, events)
    off = np.abs(lacking).max(0) / sizes.max()                      # (events,)
    matters = (sizes > (1 - NEAR) * sizes.max(1, keepdims=True)).any(0)
    if off[matters].max() > EXACT:
        doubt(f"sizes are off by {off[matters].max():.2%} of the largest")
    pieces = (solution / scale[:, None]).T                          # (events, features)
    pieces[:, list(features).index(())] += lacking.max(0).clip(min=0)                                # never less than what was seen
    pieces = pieces[matters | (off < EXACT / 100)]
    lines = Lines(tuple(features), tuple(tuple(float(c) for c in piece) for piece in _largest(pieces, features, box)))
    _check_peaks(points, lines)
    return lines


def _check_peaks(points: Sequence[tuple[Variables, Sequence[Event]]], lines: Lines) -> None:
    """The fullest moment of every simulation is among the events that all have in common."""
    for variables, events in points:
        peak, found = max(events, key=lambda event: event.live), lines.at(variables)
        if found < (1 - EXACT) * peak.live:
            doubt(f"the peak of {dict(variables)} is {1 - found / peak.live:.1%} higher: {peak.name} in {peak.place}")


def straight(points: Sequence[tuple[Variables, int]], features: Sequence[Feature]) -> Lines:
    """One sum through as many points as it has features."""
    design = np.array([_values(features, variables) for variables, _ in points])
    solution = np.linalg.solve(design, np.array([size for _, size in points], dtype=np.float64))
    return Lines(tuple(features), (tuple(float(c) for c in solution),))


def _values(features: Sequence[Feature], variables: Variables) -> list[float]:
    return [float(prod(variables[name] for name in feature)) for feature in features]


def _aligned(runs: Sequence[Sequence[Event]]) -> Array:
    """Sizes of the events that all simulations have in common: in each place, the same operators in the same order."""
    grouped: list[Mapping[Place, list[Event]]] = [_by_place(run) for run in runs]
    columns: list[list[int]] = []
    for place in grouped[0]:
        if not all(place in group for group in grouped):
            continue
        first, *others = (group[place] for group in grouped)
        matches = [_matches(first, other) for other in others]
        columns += [[event.live, *(match[i] for match in matches)] for i, event in enumerate(first) if all(i in match for match in matches)]
    return np.array(columns, dtype=np.float64).T


def _matches(one: Sequence[Event], other: Sequence[Event]) -> dict[int, int]:
    """Which events of one are which of the other: their number in one, and their size in the other."""
    names, others = [event.name for event in one], [event.name for event in other]
    if names == others:
        return {i: event.live for i, event in enumerate(other)}
    blocks = SequenceMatcher(None, names, others, autojunk=False).get_matching_blocks()
    return {block.a + i: other[block.b + i].live for block in blocks for i in range(block.size)}


def _by_place(run: Sequence[Event]) -> dict[Place, list[Event]]:
    found: dict[Place, list[Event]] = {}
    for event in run:
        if all(piece != "middle" for _, piece in event.place):
            found.setdefault(event.place, []).append(event)
    return found


def _largest(pieces: Array, features: Sequence[Feature], box: Callable[[np.random.Generator], Variables]) -> Array:
    """Those that are the largest somewhere in the box, within a thousandth."""
    draw = np.random.default_rng(0)
    points = np.array([_values(features, box(draw)) for _ in range(512)])
    kept: list[int] = []
    totals = points @ pieces.T                                      # (512, events)
    covered = np.full(len(points), -np.inf)
    while True:
        lacking = totals.max(1) - covered * 1.0005
        worst = int(lacking.argmax())
        if lacking[worst] <= 0:
            return pieces[kept]
        kept.append(int(totals[worst].argmax()))
        covered = np.maximum(covered, totals[:, kept[-1]])
