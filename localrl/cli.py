"""The command line: parse, call, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperGroup

from localrl.allocator import set_allocator
from localrl.quiet import quiet_libraries
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
Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep this many of the likeliest tokens; 0: all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens at least this share as likely as the likeliest.")]
Context = Annotated[int, typer.Option("--context", help="Tokens of conversation and reply together, at most what the model was trained for.")]
RunPath = Annotated[Path, typer.Argument(help="Run folder, or one of its checkpoint-N folders.", show_default=False)]


def main() -> None:
    """Entry point."""
    set_allocator()
    quiet_libraries()
    app()


@app.command()
def train(
    overrides: Overrides = None,
    preset: Preset = None,
    config: Config = None,
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
    run = load_run(preset or (None if config or from_log else "demo"), config, given)
    if dry_run:
        prepared = check_run(anchor(run, Path.cwd()), _say)
        _show_plans(run, [prepared.plan])
        sample = prepared.data.train[0]
        _say(f"{len(prepared.data.train)} training prompts, {len(prepared.data.eval)} held out; the first as the model sees it ({len(sample.tokens)} tokens):")
        console.print(Panel(escape(prepared.tokenizer.decode(list(sample.tokens))), border_style="dim"))
        _say("all checks passed; nothing was written")
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
    card: Annotated[str | None, typer.Option("--card", help='"16GiB", "RTX 4080", or several with commas: "8GiB,12GiB,16GiB".')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What every phase of a run will need, before anything loads; from the model's config alone."""
    from localrl.config import load_run
    from localrl.planning import plan_for_card

    run = load_run(preset or (None if config else "demo"), config, overrides or [])
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
def export(
    path: RunPath,
    what: Annotated[str, typer.Option("--what", help="merged (one file), adapter (a small file, with its base), or base.")] = "merged",
    types: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, ...; several with commas: q8_0,q4_k_m.")] = "f16",
    merge: Annotated[
        str, typer.Option("--merge", help="Into the de-quantised weights that were trained on, or the original ones. auto: whichever keeps more of the reward.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; by default export/ in the run folder.")] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="A larger model comes in parts: 2GiB, 500MiB; by default export.shard_size.", show_default=False)
    ] = None,
    converter: Annotated[
        Path | None, typer.Option("--converter", help="llama.cpp's convert_hf_to_gguf.py, for models this cannot write; by default $LLAMA_CPP_DIR for those.")
    ] = None,
) -> None:
    """Write GGUF for llama.cpp, load it back there, and compare it with the trained model, rewards included, before saying done.

    Examples:

      localrl export runs/mine-0 --type q8_0,q4_k_m

      localrl export runs/mine-0 --what adapter --type q8_0
    """
    from localrl.display import Work, export_table
    from localrl.outcome import export_files

    with Work(console) as display:
        dtypes = [name.strip() for name in types.split(",")]
        files = export_files(path, display, what=what, dtypes=dtypes, merge=merge, out=out, shard_size=shard_size, converter=converter)
    console.print(export_table(files))
    for note in files[0].report.notes:
        _say(note)
    for file in files:
        _say(f"done: {file.path}")
    _say(f"talk to it: localrl chat {files[0].path}")
    _say(f"beside its base: localrl compare {path}")
    _say(f"every check, and how other programs load it: {files[0].path.parent / 'README.md'}")


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="GGUF file (an adapter finds its base beside it), or a run or checkpoint folder: its newest export.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Adapter GGUF on top of a base GGUF.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt; by default that of a run's data.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 512,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A string that ends a reply; may be given several times.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    context: Context = 4096,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this one thing and leave.")] = None,
) -> None:
    """Talk to an exported model through llama.cpp. /help lists what can be said inside: /set temperature 0.7, /regenerate, /save FILE, ..."""
    from localrl.chat import Chat
    from localrl.engines.llama_cpp import LlamaModel, Sampling
    from localrl.exports import find
    from localrl.talk import Talk

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, stop=tuple(stop or ()))
    files = find(model, adapter)
    with LlamaModel(files.model, files.adapter, n_ctx=context) as opened:
        talk = Talk(console, Chat(opened, system=files.system if system is None else system, sampling=sampling, seed=seed))
        if prompt is not None:
            talk.answer(prompt)
            return
        for line in (files.note, f"{files.label}, {opened.n_ctx} tokens of context. /help tells what else can be said, /quit leaves"):
            if line:
                _say(line)
        talk.run()


@app.command()
def compare(
    path: Annotated[Path, typer.Argument(help="Run folder, or one of its checkpoint-N folders: its prompts, its rewards.", show_default=False)],
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WHAT]...", show_default=False,
            help="base, trained, checkpoint-N, checkpoints (all), a GGUF file, another run's folder; by default base and trained.",
        ),
    ] = None,
    also: Annotated[list[str] | None, typer.Option("--with", help="One more of these, beside the others; may be given several times.")] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Held-out prompts to answer.", min=1)] = 8,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Ask this instead; may be given several times.")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; by default as in training.", show_default=False, min=1)] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the rows as JSONL.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page.")] = None,
) -> None:
    """Models side by side: the same prompts and seeds, the run's own rewards beside each answer; through llama.cpp.

    Adapters of several checkpoints share one loaded base. What is not exported yet is exported first. Examples:

      localrl compare runs/x base checkpoint-20 checkpoint-40 --prompts 32

      localrl compare runs/x --with runs/x/export/x-merged-q8_0.gguf --with runs/y --html side-by-side.html
    """
    from localrl.comparison import compare_run, comparison_table, page, summary_table
    from localrl.display import Progress
    from localrl.engines.llama_cpp import Sampling
    from localrl.folder import find_checkpoint, read_run

    rollout = read_run(find_checkpoint(path)[0]).rollout
    longest = max_tokens or rollout.max_completion_length
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=longest, stop=rollout.stop)
    with Progress(console) as display:
        found = compare_run(path, display, names=what or (), also=also or (), count=prompts, texts=prompt or (), sampling=sampling, seed=seed)
    console.print(comparison_table(found))
    console.print(summary_table(found))
    if out is not None:
        _write(out, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in found.rows))
    if html is not None:
        _write(html, page(found))


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="GGUF file (an adapter finds its base beside it), or a run or checkpoint folder: its newest export.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Adapter GGUF on top of a base GGUF.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; any but this machine's own wants --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: a free one.", min=0, max=65535)] = 0,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="LOCALRL_API_KEY", help="What clients must send as their key.")] = None,
    context: Context = 4096,
) -> None:
    """Answer as OpenAI's API does (/v1/chat/completions, /v1/completions, /v1/models), on this machine alone unless told otherwise. Ctrl-C ends it."""
    from localrl.exports import find
    from localrl.serve import serve as run

    files = find(model, adapter)
    if files.note:
        _say(files.note)
    run(files, host=host, port=port, key=api_key, context=context, say=_say)


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


@app.command()
def doctor() -> None:
    """What this machine has, what works, and what it means for training."""
    from localrl.doctor import diagnose, show

    findings = diagnose()
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


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None
    _say(f"written: {path}")


def _show_settings() -> None:
    from localrl.config import settings_table

    table = Table()
    for heading, width in (("setting", None), ("default", 24), ("what it does", None)):
        table.add_column(heading, no_wrap=heading == "setting", overflow="fold", max_width=width)
    for key, default, text in settings_table():
        table.add_row(key, escape(default), escape(text))
    console.print(table)


def _after(path: Path) -> None:
    _say(f"next: localrl export {path}")


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


def _say(text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
