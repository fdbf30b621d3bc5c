"""A finished run beside its base: the same prompts, the run's own rewards, through llama.cpp."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from localrl.chat import CompareRow, compare
from localrl.engines.llama_cpp import LlamaModel, Sampling
from localrl.folder import find_checkpoint, read_run
from localrl.outcome import export_run
from localrl.prepare import open_rewards, prepare
from localrl.record import Display
from localrl.rewards import LoggedRewards


def compare_run(path: Path, display: Display, *, count: int, temperature: float, seed: int) -> tuple[list[CompareRow], tuple[str, ...]]:
    """Base and trained model side by side on held-out prompts, both through llama.cpp; files that do not exist yet are exported first.

    Returns the rows and the names of their rewards.
    """
    folder, checkpoint = find_checkpoint(path)
    run = read_run(folder)
    files = {name: _newest(folder, what, checkpoint) for name, what in (("base", "base"), ("trained", "merged"))}
    for name, what in (("base", "base"), ("trained", "merged")):
        if files[name] is None:
            display.say(f"{folder / 'export'} holds no {name} model of this checkpoint yet: exporting it")
            files[name] = export_run(path, display, what=what, dtype="f16").path
    prepared = prepare(run, lambda text: None)
    display.phase("answering")
    sampling = Sampling(temperature=temperature, max_tokens=run.rollout.max_completion_length, stop=run.rollout.stop)
    models = {name: partial(LlamaModel, file) for name, file in files.items() if file is not None}
    prompts = (prepared.data.eval or prepared.data.train)[:count]
    with open_rewards(run, prepared.data) as rewards:
        judge = LoggedRewards(()) if rewards is None else rewards
        return compare(models, prompts, judge.score, sampling, seed, lambda done, total, name: display.part(done, total)), tuple(judge.names)


def _newest(folder: Path, what: str, checkpoint: Path) -> Path | None:
    """The newest export of that kind which is not older than the checkpoint. (The base never changes.)"""
    found = sorted((folder / "export").glob(f"*-{what}-*.gguf"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found and (what == "base" or found[-1].stat().st_mtime >= checkpoint.stat().st_mtime) else None
