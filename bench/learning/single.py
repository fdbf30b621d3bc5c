"""TBRM with one rollout a prompt and no critic, against PPO with one and GRPO with four: reward at equal samples, time and memory of learning."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.learning.trials import Result, Trial, bands, middle, picture, run_all, table

EACH = ("steps=80", "optim.learning_rate=2e-3")
TRIALS = (
    Trial("TBRM n=1", (*EACH, "algorithm.name=tbrm", "algorithm.beta=0.1", "rollout.num_generations=1", "rollout.prompts_per_step=64")),
    Trial("PPO n=1", (*EACH, "algorithm.name=ppo", "algorithm.critic_warmup=5", "optim.critic_learning_rate=4e-3", "rollout.num_generations=1",
                      "rollout.prompts_per_step=64")),
    Trial("GRPO n=4", (*EACH, "algorithm.name=grpo", "rollout.num_generations=4", "rollout.prompts_per_step=16")),
)  # fmt: skip


def learning_seconds(result: Result) -> float:
    """Of a token in a step's scoring, learning and update: what the method costs beside sampling."""
    return statistics.median((row["time/scoring"] + row["time/learn"] + row["time/update"]) / row["num_tokens"] for row in result.rows)


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The table; the picture beside it."""
    from bench.learning.memory import learning_peak

    found = run_all(TRIALS, seeds, workers, work)
    _, (reward, correct, entropy), save = picture(results / "single.png", 3)
    bands(reward, found, lambda r: r.curve("reward"), "total reward, 64 rollouts a step")
    bands(correct, found, lambda r: r.curve("rewards/correct/mean"), "correct")
    bands(entropy, found, lambda r: r.curve("entropy"), "entropy (nats a token)")
    save()
    seconds = {name: min(map(learning_seconds, each)) for name, each in found.items()}          # the quietest of the seeds
    peaks = {trial.name: learning_peak(trial.settings) for trial in TRIALS}
    base = TRIALS[0].name
    rows = [[name, middle([float(r.evaluations[-1]["eval/reward"]) for r in each]), middle([r.held_out("correct") for r in each]),
             f"{seconds[name] / seconds[base]:.2f}", f"{peaks[name] / peaks[base]:.2f}"] for name, each in found.items()]  # fmt: skip
    head = ("64 rollouts a step", "reward, held out", "correct, held out", f"learning time a token ({base} = 1)", f"peak memory of learning ({base} = 1)")
    return (f"# Single rollouts\n80 steps, learning rate 2e-3, beta 0.1, {seeds} seeds; median [lowest, highest]. Time: the quietest seed's median step "
            f"(others ran beside). Memory: live bytes beyond the model and its optimiser, of one step.\n\n{table(head, rows)}\n![](single.png)\n")
