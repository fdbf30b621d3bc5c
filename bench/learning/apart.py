"""GDPO against GRPO where rewards differ in scale: two (right; a tenth as loud: the asked-for format), and three (short too, where right).

Brevity counts only where the answer is right (`given`). Without that condition GDPO, which hears it as loudly as the others, goes for it at
once: empty answers, none right, in the seed that was tried. GRPO does not hear it.
"""

from __future__ import annotations

from pathlib import Path

from bench.learning.trials import ROOT, Result, Trial, bands, first_at, middle, picture, run_all, steps_to, table

OWN = f"{ROOT}/bench/learning/rewards.py"
CORRECT, FORMAT = '{function="numeric_answer", name="correct"}', f'"{OWN}:slight_format"'
SHORT = f'{{function="{OWN}:slight_brevity", given="correct"}}'
SETS = {2: ("correct", "slight_format"), 3: ("correct", "slight_format", "slight_brevity")}
SETTINGS = {2: f"rewards.functions=[{CORRECT}, {FORMAT}]", 3: f"rewards.functions=[{CORRECT}, {FORMAT}, {SHORT}]"}
SOON = {"correct": 0.75, "slight_format": 0.09, "slight_brevity": 0.042}
NAMES = ("grpo", "gdpo")


def report(seeds: int, workers: int, work: Path, results: Path) -> str:
    """The tables; the picture beside them."""
    parts, _, axes, save = [], *picture(results / "apart.png", 4, 3.6)
    for place, (count, names) in enumerate(SETS.items()):
        trials = [Trial(f"{name} {count} rewards", ("steps=80", "optim.learning_rate=2e-3", f"algorithm.name={name}", SETTINGS[count])) for name in NAMES]
        found = run_all(trials, seeds, workers, work)
        bands(axes[2 * place], found, lambda r: r.curve("rewards/correct/mean"), f"{count} rewards: correct")
        quiet = names[-1]
        bands(axes[2 * place + 1], found, lambda r, quiet=quiet: r.curve(f"rewards/{quiet}/mean"), f"{count} rewards: {quiet} (of 0.1)")
        rows = []
        for name, each in found.items():
            soon = [steps_to([first_at(r.curve(f"rewards/{n}/mean"), SOON[n]) for r in each]) for n in names]
            rows.append([name, *(middle([loud(r, n) for r in each]) for n in names), *soon])
        parts.append(table(("held out, at the end", *(f"{n} (times 10)" if n.startswith("slight") else n for n in names),
                            *(f"steps to {n} {SOON[n]:g}" for n in names)), rows))  # fmt: skip
    save()
    text = f"80 steps of 8 prompts x 8, learning rate 2e-3, {seeds} seeds; median [lowest, highest] on held-out prompts."
    return f"# Apart\n{text}\n\n" + "\n".join(parts) + "\n![](apart.png)\n"


def loud(result: Result, name: str) -> float:
    """Held out, on a scale of 1."""
    return result.held_out(name) * (10 if name.startswith("slight") else 1)
