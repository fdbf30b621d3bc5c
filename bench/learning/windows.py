"""T-PPO against PPO where a few responses are ten times as long as the others: slots that wait, tokens trained a second, time to the same reward."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from bench.learning.longtail import LIMIT, build
from bench.learning.trials import ROOT, Result, Trial, middle, picture, run_all, table

SLOTS, WINDOW = 16, 64


def trials(base: Path) -> tuple[Trial, ...]:
    """The same settings, the same number of steps; only the window differs."""
    wish = f'"{ROOT}/bench/learning/longtail.py:as_asked"'
    common = (
        f'model.path="{base}"', f'data.path="{base / "train.jsonl"}"', f'data.eval_path="{base / "eval.jsonl"}"',
        f'rewards.functions=[{{function="numeric_answer", name="correct"}}, {{function="tagged_format", name="format"}}, {wish}]',
        f"rollout.max_completion_length={LIMIT}", f"rollout.prompts_per_step={SLOTS}", "rollout.num_generations=1", "optim.learning_rate=1e-3",
        "optim.critic_learning_rate=4e-3", "algorithm.name=tppo", "algorithm.critic_warmup=10", "algorithm.ignore_tail=4", "algorithm.lm_coef=0",
        "memory.micro_batch_tokens=4096", "eval.num_generations=1", "eval.limit=128",
    )  # fmt: skip
    return (
        Trial("PPO", (*common, f"rollout.window={LIMIT}", "steps=60", "eval.every=12"), alone=True),
        Trial("T-PPO", (*common, f"rollout.window={WINDOW}", "steps=60", "eval.every=12"), alone=True),
    )


def seconds(result: Result) -> list[float]:
    """Since the start, after every step; evaluation not counted."""
    return np.cumsum([row["time/step"] for row in result.rows]).tolist()  # type: ignore[no-any-return]


def tests(result: Result) -> tuple[list[float], list[float]]:
    """Held-out reward against those seconds."""
    clock = [0.0, *seconds(result)]
    return [clock[row["step"]] for row in result.evaluations], [row["eval/reward"] for row in result.evaluations]


def time_to(result: Result, reward: float) -> float:
    """Seconds until the held-out reward is there (linear between tests); NaN if it never is."""
    at, value = tests(result)
    for i, found in enumerate(value):
        if found >= reward:
            return at[i] if i == 0 else at[i - 1] + (at[i] - at[i - 1]) * (reward - value[i - 1]) / (found - value[i - 1])
    return float("nan")


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The table; the picture beside it."""
    base = build(work / "longtail")
    found = run_all(trials(base), seeds, workers, work)
    _, (reward, lengths), save = picture(results / "windows.png", 2)
    for (name, each), colour in zip(found.items(), ("#6b7280", "#2563eb"), strict=True):
        for i, result in enumerate(each):
            at, value = tests(result)
            reward.plot(at, value, color=colour, alpha=0.7, marker="o", markersize=3, label=name if not i else None)
    reward.set(title="held-out reward", xlabel="seconds of training")
    lengths.hist([row["completions/max_length"] for r in found["PPO"] for row in r.rows], bins=30, color="#6b7280", label="longest of a step")
    lengths.hist([row["completions/mean_length"] for r in found["PPO"] for row in r.rows], bins=30, color="#d97706", label="mean of a step")
    lengths.set(title="response lengths, PPO (tokens)")
    lengths.legend(frameon=False, fontsize=8)
    save()
    start, end = (statistics.median(r.evaluations[i]["eval/reward"] for r in found["PPO"]) for i in (0, -1))
    goal = start + 0.8 * (end - start)
    rows = []
    for name, each in found.items():
        idle = [1 - sum(row["rollout/tokens"] for row in r.rows) / sum((row["rollout/passes"] + 1) * SLOTS for row in r.rows) for r in each]
        rate = [sum(row["rollout/tokens"] for row in r.rows) / sum(row["time/step"] for row in r.rows) for r in each]
        rows.append([name, middle(idle), middle(rate), middle([time_to(r, goal) for r in each]), middle([r.evaluations[-1]["eval/reward"] for r in each]),
                     f"{sum(r.evaluations[-1]['eval/reward'] < start for r in each)} of {len(each)}"])  # fmt: skip
    ratios = [time_to(a, goal) / time_to(b, goal) for a, b in zip(found["PPO"], found["T-PPO"], strict=True)]
    trained = statistics.median(float(a[2].split()[0]) for a in rows[1:]) / float(rows[0][2].split()[0])
    head = ("", "idle share of slots", "tokens trained a second", f"seconds to a held-out reward of {goal:.2f}", "at the end", "seeds below their start")
    return (f"# Windows\n{SLOTS} slots, responses of up to {LIMIT} tokens, windows of {WINDOW}; one thread, arms taking turns; {seeds} seeds, "
            f"median [lowest, highest].\n\n{table(head, rows)}\nPPO's time over T-PPO's to that reward: {middle(ratios)}; tokens trained a second: "
            f"{trained:.2f} times PPO's.\n\n![](windows.png)\n")
