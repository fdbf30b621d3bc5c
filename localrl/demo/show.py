"""`localrl demo`: train the embedded model, export it, and show before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from localrl.comparison import compare_run, comparison_table
from localrl.config import load_run
from localrl.display import Progress
from localrl.engines.llama_cpp import Sampling
from localrl.folder import read_lines
from localrl.outcome import export_run
from localrl.plots import curves
from localrl.run import next_folder, train_run

COMPARED = 4
"""Questions shown side by side."""


def run_demo(console: Console, out: Path | None, seed: int, overrides: Sequence[str]) -> Path:
    """The whole way, on the preset "demo". Returns the run folder."""
    folder = out or next_folder("demo")
    run = load_run("demo", None, [*overrides, f"seed={seed}", f"log.dir='{folder}'"])
    console.print("A Llama of about a million parameters was taught to add, with good and bad habits. It is now trained in NF4 with a LoRA adapter "
                  f"by {run.algorithm.name.upper()}\non {len(run.rewards.functions)} rewards ({', '.join(f.label for f in run.rewards.functions)}), "
                  f"{run.steps} steps of {run.rollout.prompts_per_step} sums with {run.rollout.num_generations} answers each.\n", highlight=False)  # fmt: skip
    with Progress(console) as display:
        path = train_run(run, display)
    with Progress(console) as display:
        files = [export_run(path, display, what=what, dtype="f16").path for what in ("adapter", "merged")]
        sampling = Sampling(max_tokens=run.rollout.max_completion_length, stop=run.rollout.stop)
        compared = compare_run(path, display, count=COMPARED, sampling=sampling, seed=seed)
    picture = curves(path, f"localrl demo: {run.algorithm.name.upper()} on a 1 M Llama in {run.model.quantization.upper()}")
    console.print(comparison_table(compared))
    console.print(before_and_after(path))
    for label, file in (("curves", picture), ("adapter", files[0]), ("merged model", files[1])):
        console.print(f"{label:>13}  {_short(file)}", highlight=False, soft_wrap=True)
    console.print(f"\ntalk to it:    localrl chat {_short(path)}", highlight=False, soft_wrap=True)
    console.print("your own data: localrl train data.path=mine.jsonl ... (README, tutorial)", highlight=False, soft_wrap=True)
    return path


def before_and_after(folder: Path) -> Table:
    """Held-out rewards of the first and the last evaluation, with twice their standard errors."""
    evaluations = read_lines(folder / "evaluations.jsonl")
    first, last = evaluations[0], evaluations[-1]
    table = Table("held-out", "before", "after", title=f"{folder.name}: before and after {last['step']} steps")
    for key in first:
        if key.startswith("eval/rewards/") and key.endswith("/mean"):
            name = key.split("/")[2]
            table.add_row(name, _with_error(first, f"eval/rewards/{name}"), _with_error(last, f"eval/rewards/{name}"))
    table.add_row("tokens", *(f"{row['eval/completions/mean_length']:.1f}" for row in (first, last)))
    return table


def _with_error(row: dict[str, Any], name: str) -> str:
    return f"{row[f'{name}/mean']:.3f} ± {2 * row[f'{name}/stderr']:.3f}"


def _short(path: Path) -> Path:
    """From here, where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
