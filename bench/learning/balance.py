"""Five and ten competing rewards: directed GDPO against published GDPO, Group DPO with fixed weights, and GRPO on the sum.

Which share of each maximum counts as passed is not chosen afterwards: every threshold of a grid is shown.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from bench.learning.memory import learning_peak
from bench.learning.single import learning_seconds
from bench.learning.trials import ROOT, Result, Trial, bands, middle, picture, run_all, table

OWN = f"{ROOT}/bench/learning/rewards.py"
FIVE = ("correct", "format", "brevity", "starts_politely", "working")
TEN = (*FIVE, "words", "one_line", "sentences", "few_symbols", "commas")
BUILT_IN = {"correct": '{function="numeric_answer", name="correct"}', "format": '{function="tagged_format", name="format"}'}
METHODS = {
    "GRPO, sum": ("algorithm.name=grpo",),
    "Group DPO, fixed": ("algorithm.name=group_dpo",),
    "GDPO, published": ("algorithm.name=gdpo",),
    "GDPO, directed": ("algorithm.name=gdpo", 'algorithm.weighting="directed"', 'memory.directions="float32"'),
}
GRID = (0.4, 0.5, 0.6, 0.65, 0.7)
STEPS = {5: 60, 10: 40}
"""By number of rewards."""


def trials(names: tuple[str, ...]) -> list[Trial]:
    """One for each method."""
    functions = ", ".join(BUILT_IN.get(name, f'"{OWN}:{name}"') for name in names)
    common = (f"steps={STEPS[len(names)]}", "optim.learning_rate=1e-3", "rollout.prompts_per_step=16", f"rewards.functions=[{functions}]")
    return [Trial(f"{method} K={len(names)}", (*common, *settings)) for method, settings in METHODS.items()]


def ema(values: list[float], span: int = 20) -> np.ndarray:
    """Exponential moving average over about `span` steps."""
    kept, out = values[0], []
    for value in values:
        kept += (value - kept) * 2 / (span + 1)
        out.append(kept)
    return np.array(out)


def oscillation(result: Result, names: tuple[str, ...]) -> float:
    """Total variation a step of each smoothed reward, its straight line taken off, in the last two thirds; mean over rewards."""
    found = []
    for name in names:
        curve = ema(result.curve(f"rewards/{name}/mean"))[len(result.rows) // 3 :]
        at = np.arange(len(curve))
        found.append(np.abs(np.diff(curve - np.polyval(np.polyfit(at, curve, 1), at))).mean())
    return float(np.mean(found))


def stable_at(result: Result, names: tuple[str, ...], span: int = 20) -> int | None:
    """The first step after which every smoothed reward stays within 0.05 for `span` steps."""
    curves = np.array([ema(result.curve(f"rewards/{name}/mean")) for name in names])
    return next((i + 1 for i in range(len(result.rows) - span) if (np.ptp(curves[:, i : i + span], 1) <= 0.05).all()), None)


def passes(result: Result, names: tuple[str, ...], q: float) -> bool:
    """At some step every reward, smoothed, is above q of its maximum (1)."""
    curves = np.array([ema(result.curve(f"rewards/{name}/mean")) for name in names])
    return bool((curves.min(0) >= q).any())


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The tables; the picture beside them."""
    parts, _, axes, save = [], *picture(results / "balance.png", 4, 3.6)
    for place, names in enumerate((FIVE, TEN)):
        arms = trials(names)
        found = run_all(arms, seeds, workers, work)
        bands(axes[2 * place], found, lambda r, n=names: worst(r, n), f"K={len(names)}: the worst reward")
        bands(axes[2 * place + 1], found, lambda r, n=names: mean(r, n), f"K={len(names)}: mean of all")
        seconds = {name: min(map(learning_seconds, each)) for name, each in found.items()}      # the quietest of the seeds
        peaks = {arm.name: learning_peak(arm.settings) for arm in arms}
        plain = arms[2].name
        rows = []
        for name, each in found.items():
            steady = [s for r in each if (s := stable_at(r, names)) is not None]
            rows.append([name, *(f"{sum(passes(r, names, q) for r in each)}/{len(each)}" for q in GRID), middle([worst(r, names)[-1] for r in each]),
                         middle([mean(r, names)[-1] for r in each]), f"{1000 * statistics.median(oscillation(r, names) for r in each):.1f}",
                         f"{statistics.median(steady):.0f} ({len(steady)}/{len(each)})" if steady else "never",
                         f"{seconds[name] / seconds[plain]:.2f}", f"{peaks[name] / peaks[plain]:.2f}"])  # fmt: skip
        head = ("", *(f"all >= {q}" for q in GRID), "worst reward", "mean reward", "oscillation (1e-3)", "stable from step", "time", "memory")
        directed = [row["steering/dispersion"] for r in found[arms[3].name] for row in r.rows]
        kept = sum(d >= 0.7 - 1e-9 for d in directed) / len(directed)
        note = f"Dispersion was at least 0.7 after steering in {kept:.0%} of all steps."
        parts.append(f"## {len(names)} rewards: {', '.join(names)}\n{table(head, rows)}\n{note}\n")
    save()
    text = (f"{STEPS[5]} steps (ten rewards: {STEPS[10]}) of 16 prompts x 8, learning rate 1e-3, {seeds} seeds, every weight 1; training samples, "
            "exponential mean over 20 steps; time (scoring, learning, update, a token) and memory (live bytes of learning) against published GDPO.")
    return f"# Balance\n{text}\n\n" + "\n".join(parts) + "\n![](balance.png)\n"


def worst(result: Result, names: tuple[str, ...]) -> list[float]:
    """The least of all rewards, step by step."""
    return np.array([ema(result.curve(f"rewards/{name}/mean")) for name in names]).min(0).tolist()  # type: ignore[no-any-return]


def mean(result: Result, names: tuple[str, ...]) -> list[float]:
    """Mean over rewards, step by step."""
    return np.array([ema(result.curve(f"rewards/{name}/mean")) for name in names]).mean(0).tolist()  # type: ignore[no-any-return]
