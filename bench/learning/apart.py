"""GDPO against GRPO where rewards differ in scale.

Quiet: being right, with the asked-for format a tenth as loud, and then brevity a tenth as loud too, where right (`given`; without that condition
GDPO, which hears brevity as loudly as the others, goes for it at once: empty answers, none right, in the seed that was tried). Noisy: a judge
whose mood is four times as loud as what it judges, beside the quiet format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.learning.trials import ROOT, Result, Trial, bands, first_at, middle, picture, run_all, steps_to, table

OWN = f"{ROOT}/bench/learning/rewards.py"
SPECS = {
    "correct": '{function="numeric_answer", name="correct"}',
    "slight_format": f'"{OWN}:slight_format"',
    "slight_brevity": f'{{function="{OWN}:slight_brevity", given="correct"}}',
    "noisy_judge": f'"{OWN}:noisy_judge"',
}
SOON = {"correct": 0.75, "slight_format": 0.09, "slight_brevity": 0.042}
"""What counts as there, for the columns of steps."""


@dataclass(frozen=True)
class Set:
    """Rewards that are learned together."""

    title: str
    names: tuple[str, ...]
    steps: int


SETS = (
    Set("2 rewards", ("correct", "slight_format"), 80),
    Set("3 rewards", ("correct", "slight_format", "slight_brevity"), 80),
    Set("2 rewards, noisy", ("noisy_judge", "slight_format"), 40),
)


def trials(rewards: Set) -> list[Trial]:
    """Both algorithms on them."""
    spec = f"rewards.functions=[{', '.join(SPECS[name] for name in rewards.names)}]"
    common = (f"steps={rewards.steps}", "optim.learning_rate=2e-3")
    return [Trial(f"{name} {rewards.title}", (*common, f"algorithm.name={name}", spec)) for name in ("grpo", "gdpo")]


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The tables; the picture beside them."""
    parts, _, axes, save = [], *picture(results / "apart.png", len(SETS), 3.6)
    for axis, rewards in zip(axes, SETS, strict=True):
        found = run_all(trials(rewards), seeds, workers, work)
        quiet = rewards.names[-1]
        bands(axis, found, lambda r, quiet=quiet: r.curve(f"rewards/{quiet}/mean"), f"{rewards.title}: {quiet}")
        timed = [name for name in rewards.names if name in SOON]
        rows = []
        for name, each in found.items():
            soon = [steps_to([first_at(r.curve(f"rewards/{n}/mean"), SOON[n]) for r in each]) for n in timed]
            rows.append([name, *(middle([loud(r, n) for r in each]) for n in rewards.names), *soon])
        head = ("held out, at the end", *(f"{n} (times 10)" if tenth(n) else n for n in rewards.names), *(f"steps to {n} {SOON[n]:g}" for n in timed))
        parts.append(table(head, rows))
    save()
    text = f"80 steps (noisy: 40) of 8 prompts x 8, learning rate 2e-3, {seeds} seeds; median [lowest, highest]; held-out prompts, steps by training samples."
    return f"# Apart\n{text}\n\n" + "\n".join(parts) + "\n![](apart.png)\n"


def tenth(name: str) -> bool:
    """On a scale of 0.1."""
    return name.startswith("slight")


def loud(result: Result, name: str) -> float:
    """Held out, on a scale of 1."""
    return result.held_out(name) * (10 if tenth(name) else 1)
