"""From a run's settings and a source of completions to a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from localrl.config import Run
from localrl.lab.numbers import steered
from localrl.lab.samples import Samples, of_run, pasted
from localrl.lab.sampling import Model
from localrl.lab.score import score, score_probes
from localrl.lab.trial import Trial
from localrl.policy.load import load_tokenizer
from localrl.record import Display
from localrl.settings import UserError


def try_rewards(
    run: Run, display: Display, *, prompts: int, each: int, file: Path | None = None, folder: Path | None = None, gradients: bool = False, probes: bool = True,
    log: Path | None = None, ready: Callable[[Trial], None] = lambda trial: None,
) -> Trial:
    """Completions from a file, a run's folder, or sampled; scored, probed, and (`gradients`) differentiated. `ready` hears of what is there before gradients.

    `log`: for what reward functions print. UserError for what a person can put right."""
    model: Model | None = None
    if file is None and folder is None:
        model = Model(run, steered() if gradients and len(run.rewards.functions) > 1 else None, display)
        samples, tokenizer = model.sample(prompts, each), model.prepared.tokenizer
    else:
        tokenizer = load_tokenizer(run.model)
        samples = _given(file, folder, tokenizer, run)
    display.phase("rewards")
    scored = score(samples.rollouts, samples.columns, run.rewards, Path.cwd(), log)
    fakes = score_probes(samples, scored, run.rewards, Path.cwd(), log, tokenizer) if probes else {}
    trial = Trial(run.rewards, scored.rollouts, samples.limit, samples.source, scored.health, scored.troubles, scored.messages, fakes)
    if not gradients:
        return trial
    ready(trial)
    try:
        model = model or Model(run, steered() if len(run.rewards.functions) > 1 else None, display)
        return replace(trial, gram=model.gram(scored.rollouts))
    except UserError as error:
        return replace(trial, messages=(*trial.messages, f"no gradients: {error}"))


def _given(file: Path | None, folder: Path | None, tokenizer: object, run: Run) -> Samples:
    if folder is not None:
        return of_run(folder, tokenizer)  # type: ignore[arg-type]
    assert file is not None
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): give JSON lines with prompt and completions") from None
    return pasted(text, tokenizer, run.rollout.max_completion_length)  # type: ignore[arg-type]
