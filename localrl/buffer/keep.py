"""What replay keeps of one prompt, and how it draws from that. Pure functions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from localrl.batch import Rollout


class Kept(NamedTuple):
    """A rollout in the buffer."""

    rollout: Rollout
    total: float
    """Its weighted rewards."""
    arrived: int
    """The step in which it came."""


def merge(kept: Iterable[Kept], new: Iterable[Kept], capacity: int) -> tuple[Kept, ...]:
    """The newest `capacity` different responses, oldest policy first; of equal ones the newest stays.

    >>> from localrl.batch import Prompt, Request
    >>> def k(token, version):
    ...     return Kept(Rollout(Request(Prompt(0, (1,), "")), (token,), "", True, version), 0.0, version)
    >>> [(x.rollout.tokens, x.rollout.version) for x in merge([k(5, 0), k(6, 0)], [k(5, 2), k(7, 2)], 2)]
    [((5,), 2), ((7,), 2)]
    """
    newest: dict[tuple[int, ...], Kept] = {}
    for item in (*kept, *new):
        known = newest.get(item.rollout.tokens)
        if known is None or known.rollout.version <= item.rollout.version:
            newest.pop(item.rollout.tokens, None)
            newest[item.rollout.tokens] = item
    return tuple(sorted(newest.values(), key=lambda item: item.rollout.version)[-capacity:])


def probabilities(kept: Sequence[Kept], inverse_temperature: float) -> list[float]:
    """Of the first draw: proportional to exp(inverse_temperature * total); they sum to 1."""
    top = max(item.total for item in kept)
    weights = [math.exp(inverse_temperature * (item.total - top)) for item in kept]
    return [weight / sum(weights) for weight in weights]


def pick(kept: Sequence[Kept], count: int, inverse_temperature: float, chance: random.Random) -> list[Rollout]:
    """`count` rollouts by `probabilities`, one after the other without replacement if there are enough, else with."""
    if len(kept) < count:
        return [item.rollout for item in chance.choices(kept, probabilities(kept, inverse_temperature), k=count)]
    # The `count` earliest of exponential clocks with these rates are a draw without replacement, and logarithms cannot underflow.
    clocks = [math.log(chance.expovariate(1.0) or math.ulp(0.0)) - inverse_temperature * item.total for item in kept]
    first = sorted(range(len(kept)), key=clocks.__getitem__)[:count]
    return [kept[i].rollout for i in first]


def take_turn(prompts: Iterable[int], used: set[int], taken: set[int], chance: random.Random) -> int:
    """A prompt that had no turn yet; when all had one, turns start afresh. Within a step (`taken`) none comes twice if there is another."""
    prompts = list(prompts)
    free = [prompt for prompt in prompts if prompt not in taken] or prompts
    waiting = [prompt for prompt in free if prompt not in used]
    if not waiting:
        used.difference_update(prompts)
        waiting = free
    chosen = chance.choice(waiting)
    used.add(chosen)
    taken.add(chosen)
    return chosen
