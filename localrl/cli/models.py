"""What was trained, in llama.cpp: to export, talk to, compare and serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from localrl.cli.app import Context, MinP, RunPath, Temperature, TopK, TopP, app, console, say, write


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
        say(note)
    for file in files:
        say(f"done: {file.path}")
    say(f"talk to it: localrl chat {files[0].path}")
    say(f"beside its base: localrl compare {path}")
    say(f"every check, and how other programs load it: {files[0].path.parent / 'README.md'}")


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
                say(line)
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
        write(out, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in found.rows))
    if html is not None:
        write(html, page(found))


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
        say(files.note)
    run(files, host=host, port=port, key=api_key, context=context, say=say)
