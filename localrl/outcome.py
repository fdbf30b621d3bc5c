"""What a run's result is good for: evaluate it, export it. (Comparing: `comparison`.)"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from localrl.batch import Request
from localrl.config import Run, build, parse_override
from localrl.engines.torch import TorchEngine
from localrl.evaluate import EVAL_VERSION, Evaluation, evaluate
from localrl.export import Export, Sample, export
from localrl.folder import find_checkpoint, read_lines, read_run, verify_checkpoint
from localrl.policy.adapters import using
from localrl.policy.policy import Policy
from localrl.prepare import Prepared, open_rewards, prepare
from localrl.record import Display
from localrl.settings import UserError

What = Literal["merged", "adapter", "base"]
DType = Literal["f16", "q8_0", "f32"]
SAMPLES = 6
"""Held-out prompts whose sampled answers the export is checked on."""


@dataclass(frozen=True)
class Trained:
    """A run's policy at one of its checkpoints."""

    folder: Path
    checkpoint: Path
    prepared: Prepared
    policy: Policy
    engine: TorchEngine


def load_trained(path: Path, display: Display, overrides: Sequence[str] = ()) -> Trained:
    """From a run folder (its newest checkpoint) or a checkpoint. Raises UserError if either is damaged."""
    folder, checkpoint = find_checkpoint(path)
    verify_checkpoint(checkpoint)
    run = _changed(read_run(folder), overrides)
    prepared = prepare(run, display.say)
    display.phase("load")
    policy = Policy.create(run, critic=False, checkpointing=False, head_chunk=prepared.plan.head_chunk)
    policy.load_adapter(checkpoint)
    sampling = run.rollout.model_copy(update={"concurrent": prepared.plan.concurrent})
    return Trained(folder, checkpoint, prepared, policy, TorchEngine(policy.model, policy.tokenizer, sampling, run.seed, display.part))


def evaluate_run(path: Path, display: Display, overrides: Sequence[str], base: bool) -> Evaluation:
    """Held-out rewards of the trained policy, or of its base, sampled with the training model."""
    trained = load_trained(path, display, overrides)
    run, data = trained.prepared.run, trained.prepared.data
    if not data.eval:
        raise UserError("no prompts are held out: set data.holdout or data.eval_path")
    display.phase("evaluation")
    with open_rewards(run, data) as rewards, _adapter(trained, base):
        if rewards is None:
            raise UserError("this run has no reward functions: give some, as in rewards.functions='[\"exact_answer\"]'")
        return evaluate(trained.engine, rewards, data.eval, run.eval, run.rollout)


def export_run(path: Path, display: Display, *, what: str, dtype: str, out: Path | None = None) -> Export:
    """A GGUF of the trained policy, compared with it by llama.cpp before this returns."""
    for name, value, known in (("what", what, get_args(What)), ("type", dtype, get_args(DType))):
        if value not in known:
            raise UserError(f"--{name} {value}: one of {', '.join(known)}")
    trained = load_trained(path, display)
    run = trained.prepared.run
    prompts = (trained.prepared.data.eval or trained.prepared.data.train)[:SAMPLES]
    display.phase("sampling for the self-check")
    answers = trained.engine.generate([Request(prompt) for prompt in prompts], EVAL_VERSION)
    display.phase("export")
    return export(
        trained.policy.model, trained.policy.tokenizer, out or trained.folder / "export",
        what=cast(What, what), dtype=cast(DType, dtype), name=run.name, samples=[Sample(a.request.prompt.tokens, a.tokens) for a in answers],
        metadata=_metadata(trained), progress=lambda done, total, name: display.part(done, total),
    )  # fmt: skip


def _metadata(trained: Trained) -> dict[str, int | float | bool | str]:
    """What the file says of itself, as `localrl.*`."""
    run = trained.prepared.run
    facts: dict[str, int | float | bool | str] = {
        "run": trained.folder.name, "checkpoint": trained.checkpoint.name, "algorithm": run.algorithm.name, "seed": run.seed,
        "base": run.model.path.rsplit("/", 1)[-1] if run.model.path.startswith("/") else run.model.path,
        "quantization": run.model.quantization, "exported": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    for row in read_lines(trained.folder / "evaluations.jsonl"):
        if isinstance(value := row.get("eval/reward"), float):
            facts[f"reward.step_{row['step']}"] = value
    return facts


@contextmanager
def _adapter(trained: Trained, base: bool) -> Iterator[None]:
    """With the trained adapter on, or with none."""
    with using(trained.policy.model, None if base else "policy"):
        yield


def _changed(run: Run, overrides: Sequence[str]) -> Run:
    """Overrides on a resolved run."""
    values: dict[str, Any] = run.model_dump(mode="json", exclude_none=True)
    for line in overrides:
        for section, change in parse_override(line).items():
            values[section] = {**values[section], **change} if isinstance(change, dict) else change
    return build(values)


