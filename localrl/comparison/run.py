"""A run's base, its checkpoints and whatever else, side by side on its prompts: the whole way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from localrl.batch import Prompt, Request
from localrl.comparison.entries import BASE, TRAINED, entries, missing, wanted
from localrl.comparison.rows import Comparison, compare
from localrl.config import Run
from localrl.data import PromptData
from localrl.engines.files import require_llama
from localrl.engines.llama_cpp import Sampling
from localrl.evaluate import EVAL_VERSION
from localrl.export import Sample, export
from localrl.exports import Files, base_of
from localrl.folder import find_checkpoint, read_run, verify_checkpoint
from localrl.outcome import SAMPLES, Trained, load_trained
from localrl.prepare import open_rewards, prepare
from localrl.record import Display
from localrl.rewards import LoggedRewards
from localrl.rewards.logged import Scores
from localrl.settings import UserError

TYPE = "f16"
"""Of a base that has to be exported: next to nothing is lost, and every machine computes it fast."""


def compare_run(
    path: Path,
    display: Display,
    *,
    names: Sequence[str] = (),
    also: Sequence[str] = (),
    count: int = 8,
    texts: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Comparison:
    """Models side by side on a run's held-out prompts, judged by its rewards, all through llama.cpp.

    `names`: what to compare (`entries.wanted`); none: the base and the trained model, which is the newest checkpoint or the one that `path`
    names. `also`: more of them. `count`: how many held-out prompts; `texts`: these questions instead, judged by the rewards that need no
    column of the data. `sampling`: None: greedy, as long as in training. Adapters and the base that are not exported yet are exported first,
    and checked, with one loading of the model.
    """
    require_llama()
    folder, newest = find_checkpoint(path)
    run = read_run(folder)
    want = wanted(folder, newest, [*(names or (BASE, TRAINED)), *also])
    for one in want:
        if one.files is not None and one.files.note:
            display.say(one.files.note)
    if (lacking := missing(folder, want)) != (False, []):
        display.say(f"{folder / 'export'} lacks {_named(*lacking)}: exporting now")
        _export(folder, *lacking, display)
    ready = entries(folder, want)
    prepared = prepare(run, lambda text: None)
    sampling = sampling or Sampling(temperature=0.0, max_tokens=run.rollout.max_completion_length, stop=run.rollout.stop)
    prompts = _asked(texts, prepared.data, run.data.system_prompt) if texts else (prepared.data.eval or prepared.data.train)[:count]
    display.phase("answering")
    with ExitStack() as stack:
        judge = _judge(stack, run, prepared.data, display, asked=bool(texts))
        rows = compare(ready, prompts, judge.score, sampling, seed, lambda done, total, name: display.part(done, total))
        for message in judge.report().messages:
            display.say(message)
    facts = {
        "run": folder.name, "prompts": f"{len(rows)} {'given' if texts else 'held out' if prepared.data.eval else 'of training'}",
        "sampling": _said(sampling), "seed": str(seed), **{entry.label: _lies(folder, entry.files) for entry in ready},
    }  # fmt: skip
    return Comparison(rows, tuple(judge.names), tuple(judge.weights), facts)


def _judge(stack: ExitStack, run: Run, data: PromptData, display: Display, asked: bool) -> Scores:
    """The run's rewards in their processes; of questions that a person gave those that need no column of the data."""
    if not run.rewards.functions:
        return LoggedRewards(())
    if not asked:
        rewards = stack.enter_context(open_rewards(run, data))
        assert rewards is not None
        return rewards
    from localrl.rewards import Rewards

    rewards = stack.enter_context(Rewards(run.rewards, Path.cwd()))
    try:
        rewards.check_columns(())
    except UserError as error:
        display.say(f"a question of your own is not scored: {error}")
        return LoggedRewards(())
    return rewards


def _asked(texts: Sequence[str], data: PromptData, system: str | None) -> list[Prompt]:
    """In the form of the run's own prompts: plain text, or a chat under its system prompt."""
    if isinstance(data.train[0].content, str):
        return [Prompt(number, (), text) for number, text in enumerate(texts)]
    opening = [{"role": "system", "content": system}] if system else []
    return [Prompt(number, (), [*opening, {"role": "user", "content": text}]) for number, text in enumerate(texts)]


def _export(folder: Path, base_too: bool, lacking: Sequence[Path], display: Display) -> None:
    """The base if asked for, and the adapters of these checkpoints, each compared with the trained model on the base."""
    trained = load_trained(lacking[0] if lacking else folder, display)
    prompts = (trained.prepared.data.eval or trained.prepared.data.train)[:SAMPLES]
    display.phase("sampling for the self-check")
    told = [Sample(a.request.prompt.tokens, a.tokens) for a in trained.engine.generate([Request(prompt) for prompt in prompts], EVAL_VERSION)]
    display.phase("export")
    if base_too:
        _write(trained, folder / "export", "base", trained.checkpoint, told, None, display)
    for checkpoint in lacking:
        verify_checkpoint(checkpoint)
        trained.policy.load_adapter(checkpoint)
        _write(trained, folder / "export" / checkpoint.name, "adapter", checkpoint, told, base_of(folder), display)


def _write(trained: Trained, out: Path, what: str, checkpoint: Path, told: Sequence[Sample], base: Path | None, display: Display) -> None:
    run = trained.prepared.run
    export(
        trained.policy.model, trained.policy.tokenizer, out, what=what, dtype=TYPE, samples=told, name=run.name, base=base,  # type: ignore[arg-type]
        metadata={"run": trained.folder.name, "checkpoint": checkpoint.name, "algorithm": run.algorithm.name, "seed": run.seed},
        progress=lambda done, total, name: display.part(done, total),
    )  # fmt: skip


def _named(base_too: bool, lacking: Sequence[Path]) -> str:
    return ", ".join([*(["the base"] if base_too else []), *(f"the adapter of {c.name}" for c in lacking)])


def _lies(folder: Path, files: Files) -> str:
    """Where the files are; from the run folder, if they are in there."""
    return " + ".join(str(p.resolve().relative_to(folder) if p.resolve().is_relative_to(folder) else p) for p in (files.model, files.adapter) if p is not None)


def _said(sampling: Sampling) -> str:
    parts = [f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"]
    parts += [f"{key} {getattr(sampling, key):g}" for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)) if getattr(sampling, key) != off]
    return ", ".join([*parts, f"at most {sampling.max_tokens} tokens"])
