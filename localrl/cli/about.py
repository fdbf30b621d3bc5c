"""localrl itself: presets and settings, what this machine has, and the demo."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from localrl.cli.app import Overrides, app, console


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    settings: Annotated[bool, typer.Option("--settings", help="List every setting with its default and what it does.")] = False,
) -> None:
    """List the presets, print one, or list every setting there is."""
    if settings:
        _show_settings()
        return
    from localrl.config import load_run, preset_path
    from localrl.config import presets as every

    if name is not None:
        print(preset_path(name).read_text("utf-8"), end="")
        return
    table = Table()
    for heading in ("preset", "model", "algorithm", "card", "a step", "tokens"):
        table.add_column(heading, no_wrap=heading == "preset", overflow="fold")
    for preset in every():
        run = load_run(preset)
        table.add_row(preset, f"{run.model.path} ({run.model.quantization})", run.algorithm.name, run.memory.card or "any",
                      f"{run.rollout.prompts_per_step} x {run.rollout.num_generations}", str(run.rollout.max_completion_length))
    console.print(table)


def _show_settings() -> None:
    from localrl.config import settings_table

    table = Table()
    for heading, width in (("setting", None), ("default", 24), ("what it does", None)):
        table.add_column(heading, no_wrap=heading == "setting", overflow="fold", max_width=width)
    for key, default, text in settings_table():
        table.add_row(key, escape(default), escape(text))
    console.print(table)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What this machine has, what works, and what it means for training."""
    from localrl.doctor import diagnose, show

    findings = diagnose()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        console.print(show(findings))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; by default runs/demo-N.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overrides: Overrides = None,
) -> None:
    """Train the embedded model on sums, export it, and show before and after: a few minutes on two CPU cores."""
    from localrl.demo.show import run_demo

    run_demo(console, out, seed, overrides or [])
