"""Does a run that llama.cpp samples for end where the exact one does? The demo, whole runs, by turns; then a table.

    python -m bench.gap [folder] [seeds] [steps] [engine settings ...]

An engine is a comma-separated list of overrides; the default is "rollout.engine=torch" and "rollout.engine=llama_cpp". Runs that are there
already are not run again, so that the table can be made from what an interrupted call has left.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from localrl.folder import read_lines

ENGINES = ["rollout.engine=torch", "rollout.engine=llama_cpp"]


def train(folder: Path, overrides: list[str]) -> None:
    """One run, one thread, unless it is there."""
    if (folder / "evaluations.jsonl").exists() and len(read_lines(folder / "evaluations.jsonl")) > 1:
        return
    command = [sys.executable, "-m", "localrl.cli", "train", "--preset", "demo", "eval.every=0", f"log.dir={folder}", *overrides]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def summary(folder: Path) -> dict[str, float]:
    """What one run came to."""
    steps, exams = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl")

    def mean(name: str, rows: list[dict[str, Any]] = steps) -> float:
        return statistics.mean(row.get(name, 0.0) for row in rows)

    return {
        "before": exams[0]["eval/reward"], "after": exams[-1]["eval/reward"], "correct": exams[-1]["eval/rewards/correct/mean"],
        "last": mean("reward", steps[-10:]), "gap": mean("sampler/mean_difference"), "p99": max(row["sampler/p99_difference"] for row in steps),
        "kl": mean("sampler/kl"), "ess": min(row["sampler/ess"] for row in steps),
        "rollout": mean("time/rollout", steps[1:]), "score": mean("time/scoring", steps[1:]), "step": mean("time/step", steps[1:]),
    }  # fmt: skip


def main(place: Path, seeds: int, steps: int, engines: list[str]) -> None:
    """All runs, then a row each and the means."""
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for seed in range(seeds):
        for engine in engines:
            folder = place / f"{'-'.join(part.partition('=')[2] for part in engine.split(','))}-{seed}"
            train(folder, [f"seed={seed}", f"steps={steps}", *engine.split(",")])
            found[engine].append(summary(folder))
    print("| engine | seed | reward before -> after | correct after | reward, last 10 steps | gap: mean, worst p99, k3, least ESS | s: sample, score, all |")
    print("|---|---|---|---|---|---|---|")
    for engine, runs in found.items():
        rows = [(str(seed), run) for seed, run in enumerate(runs)]
        for name, r in [*rows, ("mean", {key: statistics.mean(run[key] for run in runs) for key in runs[0]})]:
            print(f"| {engine} | {name} | {r['before']:.3f} -> {r['after']:.3f} | {r['correct']:.3f} | {r['last']:.3f} | {r['gap']:.1e} / {r['p99']:.1e} / "
                  f"{r['kl']:.1e} / {r['ess']:.4f} | {r['rollout']:.2f}, {r['score']:.2f}, {r['step']:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "gap"), int((sys.argv[2:3] or ["5"])[0]), int((sys.argv[3:4] or ["40"])[0]), sys.argv[4:] or ENGINES)
