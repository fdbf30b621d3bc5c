"""What all commands share: how they end, how they speak, and the options that several have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from localrl.settings import UserError


class Commands(TyperGroup):
    """What a person can put right ends in one sentence and exit code 2; Ctrl-C in 130; all else is a bug and shows its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            Console(stderr=True).print(f"[bold red]localrl:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


app = typer.Typer(
    cls=Commands,
    name="localrl",
    help="Teach a language model with rewards, on your own desktop GPU.\n\n"
    "Start with [bold]localrl demo[/bold]: a few minutes on any machine. Then [bold]localrl presets[/bold], "
    "[bold]localrl plan --preset qwen3-8b-16gb[/bold], [bold]localrl train --preset ... data.path=my.jsonl[/bold].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides, each a line of TOML: rollout.temperature=0.8", show_default=False)
]
Preset = Annotated[str | None, typer.Option("--preset", "-p", help="One of `localrl presets`.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file; on top of the preset.")]
RewardSet = Annotated[
    str | None, typer.Option("--rewards", "-r", metavar="NAME|FILE", help="A set of rewards: rewards/NAME.toml, or a file; on top of preset and config.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep this many of the likeliest tokens; 0: all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens at least this share as likely as the likeliest.")]
Context = Annotated[int, typer.Option("--context", help="Tokens of conversation and reply together, at most what the model was trained for.")]
RunPath = Annotated[Path, typer.Argument(help="Run folder, or one of its checkpoint-N folders.", show_default=False)]


def say(text: str) -> None:
    """A line for the person."""
    console.print(escape(text), highlight=False, soft_wrap=True)


def write(path: Path, text: str) -> None:
    """To a file that a person named, and say so."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None
    say(f"written: {path}")
