"""A trial: settings on top of the demo preset, run once for each seed, and what its run folder says afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
COMMON = ("preset=demo", "log.save_steps=1000000", "log.completions=false", "eval.limit=64", "eval.num_generations=4", "rollout.prompts_per_step=8")


@dataclass(frozen=True)
class Trial:
    """One arm of a comparison."""

    name: str
    settings: tuple[str, ...]
    alone: bool = False
    """Its clock is read: nothing else runs beside it."""


@dataclass(frozen=True)
class Result:
    """One seed of one arm."""

    seed: int
    rows: list[dict[str, Any]] = field(repr=False)
    evaluations: list[dict[str, Any]] = field(repr=False)

    def curve(self, name: str) -> list[float]:
        """A metric, step by step; missing values are carried on."""
        values: list[float] = []
        for row in self.rows:
            value = row.get(name)
            values.append(float("nan") if value is None and not values else values[-1] if value is None else float(value))
        return values

    def held_out(self, name: str, which: int = -1) -> float:
        """Of the last evaluation (or another one)."""
        return float(self.evaluations[which][f"eval/rewards/{name}/mean"])


def run_all(trials: Sequence[Trial], seeds: int, workers: int, work: Path) -> dict[str, list[Result]]:
    """Every trial with every seed: those with a clock one by one, arms taking turns, the others side by side."""
    jobs = [(trial, seed) for seed in range(seeds) for trial in trials]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: run_one(*job, work), [job for job in jobs if not job[0].alone]))
    for job in jobs:
        if job[0].alone:
            run_one(*job, work)
    return {trial.name: [read(trial, seed, work) for seed in range(seeds)] for trial in trials}


def folder_of(trial: Trial, seed: int, work: Path) -> Path:
    """Named by the settings, so that changed settings are another trial."""
    key = hashlib.sha256(json.dumps([COMMON, trial.settings, seed]).encode()).hexdigest()[:10]
    return work / f"{trial.name.replace(' ', '-').replace('/', '-')}-{seed}-{key}"


def run_one(trial: Trial, seed: int, work: Path) -> None:
    """In a process of its own; a folder that says "finished" is left alone."""
    folder = folder_of(trial, seed, work)
    state = folder / "state.json"
    if state.exists() and json.loads(state.read_text())["state"] == "finished":
        return
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.broken-{os.getpid()}"))
    work.mkdir(parents=True, exist_ok=True)
    preset, *common = COMMON
    command = [sys.executable, "-m", "localrl.cli", "train", "--preset", preset.split("=")[1], *common, *trial.settings, f"seed={seed}", f'log.dir="{folder}"']
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{trial.name}, seed {seed}: exit {done.returncode}\n{done.stderr[-2000:]}")
    print(f"{trial.name}, seed {seed}: {done.stdout.strip().splitlines()[-2]}", flush=True)


def read(trial: Trial, seed: int, work: Path) -> Result:
    """What the run folder says."""
    folder = folder_of(trial, seed, work)
    rows, evaluations = ([json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in ("metrics", "evaluations"))
    return Result(seed, rows, evaluations)


# -- figures ------------------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float], span: int = 9) -> list[float]:
    """Mean of up to `span` values so far."""
    return [statistics.fmean(values[max(0, i - span + 1) : i + 1]) for i in range(len(values))]


def first_at(values: Sequence[float], least: float) -> int | None:
    """The first step (from 1) whose smoothed value reaches `least`; None: none does."""
    return next((i for i, value in enumerate(smooth(values), 1) if value >= least), None)


def middle(values: Sequence[float]) -> str:
    """Median and range, for a table."""
    known = sorted(v for v in values if v == v)
    if not known:
        return "-"
    digits = 2 if abs(known[-1]) < 100 else 0
    return f"{statistics.median(known):.{digits}f} [{known[0]:.{digits}f}, {known[-1]:.{digits}f}]"


def steps_to(found: Sequence[int | None]) -> str:
    """Median of steps, and in how many seeds it was never reached."""
    known = [x for x in found if x is not None]
    never = len(found) - len(known)
    return (f"{statistics.median(known):.0f}" if known else "never") + (f" ({never} of {len(found)} never)" if never and known else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) + "\n"


COLOURS = ("#6b7280", "#2563eb", "#d97706", "#16a34a", "#9333ea", "#dc2626", "#0891b2")


Curve = Callable[[Result], Sequence[float]]


def bands(axis: Any, results: dict[str, list[Result]], get: Curve, title: str, x: Curve | None = None) -> None:
    """Median over seeds with the range behind it."""
    import numpy as np

    for (name, seeds), colour in zip(results.items(), COLOURS, strict=False):
        curves = [smooth(get(result)) for result in seeds]
        width = min(map(len, curves))
        stack = np.array([curve[:width] for curve in curves])
        at = np.arange(1, width + 1) if x is None else np.median(np.array([x(result)[:width] for result in seeds]), 0)
        axis.fill_between(at, np.nanmin(stack, 0), np.nanmax(stack, 0), color=colour, alpha=0.12, linewidth=0)
        axis.plot(at, np.nanmedian(stack, 0), color=colour, linewidth=1.8, label=name)
    axis.set(title=title, xlabel="step" if x is None else "seconds")
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def picture(path: Path, columns: int, width: float = 4.2) -> tuple[Any, Sequence[Any], Callable[[], None]]:
    """A figure of some axes side by side, and what saves it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]

    def save() -> None:
        axes[0].legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)

    return figure, axes, save
