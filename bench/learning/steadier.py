"""GTPO against GRPO on one base, past the point where GRPO falls; and GTPO without each of its three parts."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.learning.trials import Result, Trial, bands, first_at, middle, picture, run_all, steps_to, table

STEPS, RATE = 120, 2.5e-3
LONG = (f"steps={STEPS}", f"optim.learning_rate={RATE}")
TRIALS = (
    Trial("GRPO", (*LONG, "algorithm.name=grpo")),
    Trial("GTPO", (*LONG, "algorithm.name=gtpo")),
    Trial("GTPO without conflict weights", (*LONG, "algorithm.name=gtpo", "algorithm.positive_weight=1", "algorithm.negative_weight=1")),
    Trial("GTPO without entropy penalty", (*LONG, "algorithm.name=gtpo", "algorithm.gamma=0")),
    Trial("GTPO without filter", (*LONG, "algorithm.name=gtpo", "algorithm.threshold=1000")),
)
THRESHOLD = 0.6931


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The table; the picture beside it."""
    found = run_all(TRIALS, seeds, workers, work)
    _, (correct, shape, entropy), save = picture(results / "steadier.png", 3)
    bands(correct, found, lambda r: r.curve("rewards/correct/mean"), "correct (training samples)")
    bands(shape, found, lambda r: r.curve("rewards/format/mean"), "format")
    bands(entropy, found, lambda r: r.curve("entropy"), "entropy (nats a token)")
    entropy.axhline(THRESHOLD, color="#dc2626", linewidth=0.8, linestyle="--")
    save()
    rows = [[
        name,
        steps_to([first_at(r.curve("rewards/format/mean"), 0.8) for r in each]),
        middle([max(smoothed(r, "rewards/correct/mean")) for r in each]),
        middle([statistics.fmean(r.curve("rewards/correct/mean")[-10:]) for r in each]),
        middle([r.held_out("correct") for r in each]),
        middle([max(smoothed(r, "entropy")) for r in each]),
        f"{sum(fell(r) for r in each)} of {len(each)}",
    ] for name, each in found.items()]  # fmt: skip
    head = ("", "steps to 80 % format", "best correct", "correct, last 10 steps", "correct, held out", "highest entropy", "seeds that fell by 0.2")
    return (f"# Steadier\n{STEPS} steps of 8 prompts x 8, learning rate {RATE:g}, {seeds} seeds; median [lowest, highest]; curves smoothed over 9 steps.\n\n"
            f"{table(head, rows)}\n![](steadier.png)\n")


def smoothed(result: Result, name: str) -> list[float]:
    """Over nine steps."""
    from bench.learning.trials import smooth

    return smooth(result.curve(name))


def fell(result: Result) -> bool:
    """It ends 0.2 below its own best."""
    curve = smoothed(result, "rewards/correct/mean")
    return max(curve) - curve[-1] > 0.2
