"""Chat and comparison in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from localrl.chat import Chat, CompareRow, summarise
from localrl.engines.llama_cpp import LlamaModel, Sampling
from localrl.settings import UserError

HELP = "/reset starts afresh, /undo takes the last turn back, /quit leaves"


def talk(
    console: Console, model: Path, adapter: Path | None, *, system: str | None, temperature: float, seed: int, max_tokens: int, prompt: str | None
) -> None:
    """A conversation until /quit, Ctrl-D or Ctrl-C; with `prompt`, one question and one answer. Ctrl-C within an answer ends the answer only."""
    with LlamaModel(model, adapter) as opened:
        chat = Chat(opened, system=system, sampling=Sampling(temperature=temperature, max_tokens=max_tokens), seed=seed)
        if prompt is not None:
            _answer(console, chat, prompt)
            return
        console.print(f"{model.name}{f' + {adapter.name}' if adapter else ''}. {HELP}", style="dim", highlight=False)
        while True:
            try:
                text = console.input("[bold]you>[/bold] ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if text == "/quit":
                return
            if text == "/reset":
                chat.reset()
            elif text == "/undo":
                undone = chat.undo()
                console.print(f"taken back: {undone}" if undone else "nothing to take back", style="dim", markup=False)
            elif text.startswith("/"):
                console.print(HELP, style="dim", highlight=False)
            elif text:
                _answer(console, chat, text)


def _answer(console: Console, chat: Chat, text: str) -> None:
    try:
        for piece in chat.say(text):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [stopped]", style="dim", markup=False, end="")
    except UserError as error:
        console.print(str(error), style="red", markup=False, end="")
    reply = chat.last
    if reply is not None and reply.seconds:
        console.print(f"\n({len(reply.tokens)} tokens, {reply.tokens_per_second:.0f} tok/s)", style="dim", highlight=False)


def comparison_table(rows: Sequence[CompareRow], names: Sequence[str]) -> Table:
    """A row a prompt, a column a model, the rewards below each answer; the means at the end."""
    models = list(rows[0].answers)
    table = Table(show_lines=True, title="the same prompts and seed, through llama.cpp")
    for heading in ("prompt", *models):
        table.add_column(heading, overflow="fold", ratio=1 if heading == "prompt" else 2)
    for row in rows:
        content = row.prompt.content if isinstance(row.prompt.content, str) else row.prompt.content[-1]["content"]
        cells = [f"{escape(row.answers[m].text.strip())}\n[dim]{_rewards(names, row.answers[m].rewards)}[/dim]" for m in models]
        table.add_row(escape(content), *cells)
    means = summarise(rows)
    speed = {m: f"[dim]{means[m].tokens:.0f} tokens, {means[m].tokens_per_second:,.0f} tok/s[/dim]" for m in models}
    table.add_row(f"mean of {len(rows)}", *[f"{_rewards(names, means[m].rewards)}\n{speed[m]}" for m in models])
    return table


def _rewards(names: Sequence[str], rewards: Sequence[float]) -> str:
    return "  ".join(f"{name} {'-' if math.isnan(value) else f'{value:.2f}'}" for name, value in zip(names, rewards, strict=True))
