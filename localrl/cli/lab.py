"""Rewards before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from localrl.cli.app import Config, Overrides, Preset, RewardSet, app, console, say
from localrl.settings import UserError


@app.command(name="try")
def try_(
    overrides: Overrides = None,
    preset: Preset = None,
    config: Config = None,
    rewards: RewardSet = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Training prompts that the untrained model answers.", min=1, max=512)] = 8,
    each: Annotated[int, typer.Option("--each", help="Answers to each prompt.", min=1, max=256)] = 8,
    samples: Annotated[Path | None, typer.Option("--samples", help='Score these instead: JSON lines, {"prompt": ..., "completions": [...], ...}.')] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Score the newest completions of this run instead, by its rewards unless others are given.")] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Also the rewards' gradients, for directed weights; takes longer.")] = False,
    probes: Annotated[bool, typer.Option(help="Also score answers that deserve nothing.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also keep the whole trial in this file, for the reward lab.")] = None,
) -> None:
    """Try rewards before training: what they say of real completions, where they can be cheated, what algorithms make of them. Examples:

      localrl try --rewards mine data.path=mine.jsonl

      localrl try --run runs/demo-001 --gradients

      localrl try 'rewards.functions=["reward.py:close"]' --samples answers.jsonl --json
    """
    from localrl.folder import clean
    from localrl.lab.numbers import warnings
    from localrl.lab.show import as_dict, tables

    settings = _settings(preset, config, list(overrides or []), rewards, run, samples)
    if run is not None and samples is not None:
        raise UserError("--run and --samples both say which completions: leave one away")
    trial = _tried(settings, prompts, each, samples, run, gradients, probes, out, quiet=as_json)
    if out is not None:
        trial.write(out)
    if as_json:
        print(json.dumps(clean(as_dict(trial)), indent=2, ensure_ascii=False))
        return
    for table in tables(trial):
        console.print(table)
    for sentence in (*trial.troubles.values(), *warnings(trial, trial.weights)):
        console.print(f"[bold]![/bold] {escape(sentence)}", highlight=False, soft_wrap=True)
    if out is not None:
        say(f"written: {out}")


def _settings(preset: str | None, config: Path | None, overrides: list[str], rewards: str | None, run: Path | None, samples: Path | None) -> Any:
    """The run that it is about, paths absolute."""
    from localrl.config import load_run
    from localrl.prepare import anchor

    if run is not None and not (preset or config):
        if not (run / "run.toml").is_file():
            raise UserError(f"{run} is no run folder: it has no run.toml")
        config = run / "run.toml"
    return anchor(load_run(preset or (None if config else "demo"), config, overrides, rewards), Path.cwd())


def _tried(
    settings: Any, prompts: int, each: int, samples: Path | None, run: Path | None, gradients: bool, probes: bool, out: Path | None, quiet: bool
) -> Any:
    from localrl.display import Work
    from localrl.lab.bench import try_rewards

    with Work(Console(stderr=True) if quiet else console) as display:
        return try_rewards(
            settings, display, prompts=prompts, each=each, file=samples, folder=run, gradients=gradients, probes=probes,
            log=out.with_suffix(".log") if out else None, ready=(lambda trial: trial.write(out)) if out else (lambda trial: None),
        )  # fmt: skip
