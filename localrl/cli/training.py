"""Runs: to train, go on with, plan and evaluate them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from localrl.cli.app import Config, Overrides, Preset, RewardSet, RunPath, app, console, say
from localrl.settings import UserError


@app.command()
def train(
    overrides: Overrides = None,
    preset: Preset = None,
    config: Config = None,
    rewards: RewardSet = None,
    from_log: Annotated[Path | None, typer.Option("--from-log", help="Learn from a file of responses (prompt, response, rewards); nothing is sampled.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything short of loading weights, show the plan, write nothing.")] = False,
) -> None:
    """Train an adapter: sample, score, update; evaluate before and after; checkpoint on the way.

    Without a preset or config it trains the embedded demo model. Examples:

      localrl train --preset qwen3-8b-16gb data.path=my.jsonl rewards.functions='[{function="reward.py:score"}]'

      localrl train --config mine.toml rollout.temperature=0.8 algorithm.name=gdpo --dry-run

      localrl train --from-log answers.jsonl model.path=Qwen/Qwen3-4B steps=200
    """
    from localrl.config import load_run
    from localrl.prepare import anchor, check_run
    from localrl.run import train_run

    given = [*(_from_log(from_log, bare=not (preset or config)) if from_log else ()), *(overrides or [])]
    run = load_run(preset or (None if config or from_log else "demo"), config, given, rewards)
    if dry_run:
        prepared = check_run(anchor(run, Path.cwd()), say)
        _show_plans(run, [prepared.plan])
        sample = prepared.data.train[0]
        say(f"{len(prepared.data.train)} training prompts, {len(prepared.data.eval)} held out; the first as the model sees it ({len(sample.tokens)} tokens):")
        console.print(Panel(escape(prepared.tokenizer.decode(list(sample.tokens))), border_style="dim"))
        say("all checks passed; nothing was written")
        return
    from localrl.display import Progress

    with Progress(console) as display:
        path = train_run(run, display)
    _after(path)


def _from_log(path: Path, bare: bool) -> list[str]:
    """The settings that `--from-log` stands for. Without a preset or config nothing else is said: an algorithm that can, and no rewards but the log's."""
    from localrl.algorithms import ALGORITHMS

    lines = [f"data.path={json.dumps(str(path))}", "data.from_log=true"]
    able = next(name for name, kind in ALGORITHMS.items() if kind.learns_from_old and kind(name=name).group_size == 1)
    return [*lines, f"algorithm.name={able}", "rewards.functions=[]", "data.holdout=0", "rollout.num_generations=1"] if bare else lines


@app.command()
def resume(path: RunPath, steps: Annotated[int | None, typer.Option("--steps", help="Lengthen the run to this many steps.", min=1)] = None) -> None:
    """Go on with a run that was stopped or killed, from its newest checkpoint, to the same numbers as if it had never stopped."""
    from localrl.display import Progress
    from localrl.run import resume_run

    with Progress(console) as display:
        folder = resume_run(path, display, steps)
    _after(folder)


@app.command()
def plan(
    overrides: Overrides = None,
    preset: Preset = None,
    config: Config = None,
    rewards: RewardSet = None,
    card: Annotated[str | None, typer.Option("--card", help='"16GiB", "RTX 4080", or several with commas: "8GiB,12GiB,16GiB".')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What every phase of a run will need, before anything loads; from the model's config alone."""
    from localrl.config import load_run
    from localrl.planning import plan_for_card

    run = load_run(preset or (None if config else "demo"), config, overrides or [], rewards)
    cards = [c.strip() for c in card.split(",")] if card else [None]
    say = _progress()
    plans = [plan_for_card(run, c, (lambda text: None) if as_json else say) for c in cards]
    _show_plans(run, plans, as_json)
    if len(plans) == 1 and not as_json:
        plans[0].check()


@app.command(name="eval")
def evaluate(
    path: RunPath,
    overrides: Overrides = None,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the untrained base instead.")] = False,
) -> None:
    """Held-out rewards of a run's newest checkpoint (or the one named), sampled with the training model."""
    from localrl.display import Progress
    from localrl.outcome import evaluate_run

    with Progress(console) as display:
        result = evaluate_run(path, display, overrides or [], base)
    table = Table("metric", "value", title=f"held-out evaluation of {path}{' (base)' if base else ''}")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where to look for runs; hidden folders are passed over.")] = Path(".")) -> None:
    """Every run in a folder: how it stands, how far it is, its last reward."""
    from localrl.runs import duration, summaries

    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = summaries(folder)
    if not found:
        say(f"no runs in {folder.resolve()}: `localrl train` begins one")
        return
    table = Table("run", "state", "step", "left", "reward", "algorithm", "model", "")
    for run in found:
        reward = f"{run.rewards[-1]:.3f}" if run.rewards else ""
        left = "" if run.seconds_left is None else duration(run.seconds_left)
        said = run.wrong or ("" if run.status is None else run.status.message)
        shown = run.folder.relative_to(folder) if run.folder != folder else run.folder
        table.add_row(*map(escape, (str(shown), run.stands, f"{run.step}/{run.steps}", left, reward, run.algorithm, run.model, said)))
    console.print(table)


def _after(path: Path) -> None:
    say(f"next: localrl export {path}")


def _show_plans(run: Any, plans: Sequence[Any], as_json: bool = False) -> None:
    """One in full, several as a table, a card each."""
    from localrl.memory.show import as_dict, cards_table, plan_table

    passes = [_passes(run, plan) for plan in plans]
    if as_json:
        values = [as_dict(plan, count) for plan, count in zip(plans, passes, strict=True)]
        print(json.dumps(values if len(values) > 1 else values[0], indent=2))
    else:
        console.print(cards_table(plans, passes[0]) if len(plans) > 1 else plan_table(plans[0], _machine(), passes[0]))


def _passes(run: Any, plan: Any) -> int:
    """How often a step is read before it is learned from: once for each of the models that somebody asks about."""
    algorithm = run.algorithm.for_sampler(exact=run.own_samples and plan.choice.kv_cache == "full")
    before = algorithm.reads_before | (frozenset({"logp"}) if run.optim.num_iterations > 1 else frozenset())
    return ("ref" in before) + ("value" in before) + bool(before - {"ref", "value"})


def _machine() -> tuple[int, int] | None:
    """(free, total) bytes of this computer's memory, if it is one that trains on a card."""
    import torch

    from localrl.memory.cards import machine_memory

    return machine_memory() if torch.cuda.is_available() else None


def _progress() -> Callable[[str], None]:
    """Says each thing once, where it does not get into a pipe."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            Console(stderr=True).print(f"[dim]{escape(text)}[/dim]", highlight=False, soft_wrap=True)
        said.add(text)

    return say
