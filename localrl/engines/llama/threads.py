"""How many threads are quickest here and now. Tried, not reckoned: llama.cpp's threads spin while they wait for each other, and where
one of them shares its core with another program all of them crawl, so that two may be ten times as slow as one."""

from __future__ import annotations

import math
import os
import statistics
import time

import numpy as np
import psutil

from localrl.engines.llama.binding import Context

SECONDS = 0.2
"""Of one trial, at least; every number of threads has TRIALS."""
TRIALS = 2
HOPELESS = 50
"""A trial that has taken as long as so many of the quickest steps is over."""
GAIN = 1.1
"""More threads have to be so many times as quick as fewer."""
MOST = 16


def candidates() -> list[int]:
    """1, 2, 4, ... and all the physical cores that this process may use, MOST at most."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or 1, own, MOST)
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


def quickest(context: Context, rows: int) -> tuple[int, dict[int, float]]:
    """(threads, seconds of one step of `rows` rows for each number tried). Clears the context."""
    found: dict[int, list[float]] = {count: [] for count in candidates()}
    tokens, sequences = np.zeros(rows, dtype=np.int32), np.arange(rows, dtype=np.int32)
    for count in [*found] * TRIALS if len(found) > 1 else []:
        context.clear()
        context.use_threads(count)
        start, position = time.perf_counter(), 0
        while position < 2 or (time.perf_counter() - start < SECONDS and position < context.length):
            before = time.perf_counter()
            context.decode(tokens, np.full(rows, position, dtype=np.int32), sequences)
            position += 1
            if position > 1:                                         # the first one lays out its buffers
                found[count].append(time.perf_counter() - before)
            if time.perf_counter() - start > HOPELESS * min((t for times in found.values() for t in times), default=math.inf):
                break
    context.clear()
    seconds = {count: statistics.median(times) for count, times in found.items() if times}
    best = 1
    for count in list(seconds)[1:]:
        if seconds[count] * GAIN < seconds[best]:
            best = count
    context.use_threads(best)
    return best, seconds
