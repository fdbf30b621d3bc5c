"""TBA from stale samples, and beside a searcher that samples while it learns; GRPO, with and without a correction, on the same stale samples."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from bench.learning.trials import Result, Trial, bands, middle, picture, run_all, table

STEPS = 45
EACH = (f"steps={STEPS}", "optim.learning_rate=1e-3")
TBA = ("algorithm.name=tba", "algorithm.beta=0.05")
PERIODS = (1, 5, 15)


def replayed(period: int) -> tuple[str, ...]:
    """Sample for `period` steps at once, then learn from that for as long: the last batch is `period` - 1 updates old."""
    return (f"replay.sync_every={period}", "replay.capacity=8", "replay.recent=1.0", 'replay.draw="uniform"')


STALE = (
    *(Trial(f"TBA, k={k}", (*EACH, *TBA, *replayed(k))) for k in PERIODS),
    *(Trial(f"GRPO, k={k}", (*EACH, "algorithm.name=grpo", 'algorithm.correction="none"', *replayed(k))) for k in (1, 15)),
    Trial("GRPO truncated, k=15", (*EACH, "algorithm.name=grpo", 'algorithm.correction="truncate"', *replayed(15))),
)
CLOCK = (
    Trial("TBA, in turn", (*EACH, *TBA, "replay.capacity=40", "replay.recent=0.5", "eval.every=9"), alone=True),
    Trial("TBA, one searcher", (*EACH, *TBA, "replay.capacity=40", "replay.recent=0.5", "eval.every=9", "search.processes=1"), alone=True),
)


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The tables; the picture beside them."""
    found, timed = run_all(STALE, seeds, workers, work), run_all(CLOCK, seeds, workers, work)
    _, (tba, grpo, clock), save = picture(results / "stale.png", 3)
    bands(tba, {k: v for k, v in found.items() if k.startswith("TBA")}, lambda r: r.curve("reward"), "TBA: reward of samples learned from")
    bands(grpo, {k: v for k, v in found.items() if k.startswith("GRPO")}, lambda r: r.curve("reward"), "GRPO: reward of samples learned from")
    grpo.legend(frameon=False, fontsize=8)
    bands(clock, timed, lambda r: r.curve("reward"), "reward against the clock", x=lambda r: np.cumsum(r.curve("time/step")).tolist())
    clock.legend(frameon=False, fontsize=8)
    save()
    rows = [[name, middle([r.evaluations[-1]["eval/reward"] for r in each]), middle([r.held_out("correct") for r in each]),
             middle([max(r.curve("sampler/age")) for r in each])] for name, each in found.items()]  # fmt: skip
    first = table(("", "reward, held out", "correct, held out", "oldest samples (updates)"), rows)
    end, begin = (statistics.median(r.evaluations[at]["eval/reward"] for r in timed["TBA, in turn"]) for at in (-1, 0))
    goals = [begin + share * (end - begin) for share in (0.5, 0.9)]
    rows = [[name, middle([sum(r.curve("time/step")) / STEPS for r in each]), *(middle([until(r, goal) for r in each]) for goal in goals),
             f"{sum(until(r, goals[1]) == until(r, goals[1]) for r in each)} of {len(each)}", middle([r.evaluations[-1]["eval/reward"] for r in each])]
            for name, each in timed.items()]  # fmt: skip
    head = ("two cores", "seconds a step", *(f"seconds to a held-out reward of {goal:.2f}" for goal in goals), "seeds that reach the second", "at the end")
    second = table(head, rows)
    ratio = [until(a, goals[0]) / until(b, goals[0]) for a, b in zip(*timed.values(), strict=True)]
    return (f"# Stale and parallel\n{STEPS} steps of 8 prompts x 8, learning rate 1e-3, beta 0.05, {seeds} seeds; median [lowest, highest]. "
            f"k: updates between two times that the sampler gets the weights.\n\n{first}\n{second}\n"
            f"Time in turn over time with a searcher, to the first of these rewards: {middle(ratio)}.\n\n![](stale.png)\n")


def until(result: Result, reward: float) -> float:
    """Seconds of training until a held-out test finds that reward; NaN: none does."""
    clock = [0.0, *np.cumsum(result.curve("time/step")).tolist()]
    return next((clock[row["step"]] for row in result.evaluations if row["eval/reward"] >= reward), float("nan"))
