"""What a run's result is good for: evaluate it, export it. (Comparing: `comparison`.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from localrl.batch import Request
from localrl.config import Run, build, parse_override
from localrl.engines.sampling import stream_keys, uniforms
from localrl.engines.stops import end_tokens
from localrl.engines.torch import TorchEngine
from localrl.evaluate import EVAL_VERSION, Evaluation, evaluate
from localrl.export import DType, Export, HeldOut, Merge, Original, Sample, What, check_exportable, export_all, require_llama_cpp, size_of
from localrl.folder import find_checkpoint, read_run, verify_checkpoint
from localrl.planning import model_config
from localrl.policy.adapters import using
from localrl.policy.place import model_path
from localrl.policy.policy import Policy
from localrl.prepare import Prepared, open_rewards, prepare
from localrl.provenance import local_folder, provenance
from localrl.record import Display
from localrl.rewards import Rewards
from localrl.settings import UserError

SAMPLES = 6
"""Prompts whose sampled answers an export is checked on, where rewards are not compared."""
ANSWER_TOKENS = 2**18
"""Most tokens that the policy writes for the comparison of rewards, fewer prompts are answered where responses may be long. But at least:"""
LEAST_PROMPTS = 8


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
    """One file in one type, merged into the weights that were trained on; see `export_files`."""
    return export_files(path, display, what=what, dtypes=[dtype], merge="dequantized", out=out)[0]


def export_files(
    path: Path, display: Display, *, what: str = "merged", dtypes: Sequence[str] = ("f16",), merge: str = "auto", out: Path | None = None,
    shard_size: str | None = None, converter: Path | None = None,
) -> list[Export]:
    """GGUFs of the trained policy, a file each type, compared with it by llama.cpp before this returns: tokens, logits, and the run's own rewards.

    `shard_size`: above which a model comes in parts; `converter`: llama.cpp's own; None: as the run's `export` says. UserError for a file that does not say
    what the policy says; it is put aside as `.failed`.
    """
    for name, given, known in (("what", [what], get_args(What)), ("type", dtypes, get_args(DType)), ("merge", [merge], get_args(Merge))):
        if strange := [value for value in given if value not in known]:
            raise UserError(f"--{name} {strange[0]}: one of {', '.join(known)}")
    if merge == "original" and what != "merged":
        raise UserError(f"--merge original goes with --what merged only: of --what {what} nothing is merged")
    if shard_size is not None:
        size_of(shard_size)
    require_llama_cpp()
    if converter is not None:  # before minutes of loading and sampling
        check_exportable(model_config(read_run(find_checkpoint(path)[0])), {}, converter=converter)
    trained = load_trained(path, display)
    run, data = trained.prepared.run, trained.prepared.data
    original = _original(trained, what, merge, display)
    with open_rewards(run, data) as rewards:
        held_out, samples = _answers(trained, rewards, display, scored=what != "base")
        display.phase("export")
        return export_all(
            trained.policy.model, trained.policy.tokenizer, out or trained.folder / "export",
            what=cast(What, what), dtypes=[cast(DType, dtype) for dtype in dtypes], name=run.name, samples=samples,
            metadata=provenance(run, trained.folder, trained.checkpoint, data.eval), stop_ids=_stop_ids(trained),
            progress=_Announced(display), held_out=held_out, merge=cast(Merge, merge), original=original,
            shard_size=shard_size or run.export.shard_size, converter=converter or (Path(run.export.converter) if run.export.converter else None),
        )  # fmt: skip


def _original(trained: Trained, what: str, merge: str, display: Display) -> Original | None:
    """The weights from before they were quantised, where there are such and they are wanted. UserError if they were asked for by name and are not there."""
    run = trained.prepared.run
    if what != "merged" or merge == "dequantized" or run.model.quantization == "none":
        return None
    folder = local_folder(model_path(run.model), run.model.revision)
    try:
        if folder is None:
            raise UserError(f"the original weights of {run.model.path} are not on this machine: merge = 'dequantized'")
        return Original.of(folder)
    except UserError as error:
        if merge == "original":
            raise
        display.say(f"merged into the de-quantised weights without comparing: {error}")
        return None


def _answers(trained: Trained, rewards: Rewards | None, display: Display, *, scored: bool) -> tuple[HeldOut | None, list[Sample]]:
    """What the live policy says to held-out prompts: for the rewards' comparison, and as samples for that of tokens and logits."""
    run, data, engine = trained.prepared.run, trained.prepared.data, trained.engine
    count = 1 if run.eval.temperature == 0 else run.eval.num_generations
    fitting = ANSWER_TOKENS // (count * run.rollout.max_completion_length)
    prompts = data.eval[: min(run.export.prompts, max(LEAST_PROMPTS, fitting))]
    display.phase("sampling for the self-check")
    if not scored or len(prompts) < 2:
        if scored and run.export.prompts:
            display.say(f"rewards are not compared: that takes 2 held-out prompts, there are {len(prompts)} (data.holdout, data.eval_path, export.prompts)")
        some = [Request(prompt) for prompt in (data.eval or data.train)[:SAMPLES]]
        return None, [Sample(a.request.prompt.tokens, a.tokens) for a in engine.generate(some, EVAL_VERSION)]
    sampling = run.rollout.model_copy(update={"temperature": run.eval.temperature, "top_p": 1.0, "top_k": 0, "window": None})
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(count)]
    answers = engine.generate(requests, EVAL_VERSION, settings=sampling)
    if rewards is None:
        display.say("this run has no reward functions: only where replies end is compared")
    else:
        answers = rewards.score(answers)
    keys = stream_keys(engine.seed, EVAL_VERSION, requests)
    held_out = HeldOut(
        answers, uniforms(keys, [0] * len(requests), run.rollout.max_completion_length), run.eval.temperature, run.rollout.stop,
        names=() if rewards is None else tuple(rewards.names), weights=() if rewards is None else tuple(rewards.weights),
        score=(lambda rollouts: rollouts) if rewards is None else rewards.score,
        decode=lambda rows: list(engine.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)), progress=display.phase,
    )  # fmt: skip
    return held_out, [Sample(a.request.prompt.tokens, a.tokens) for a in answers if a.request.sample == 0]


def _stop_ids(trained: Trained) -> list[int]:
    """Every token that ended a rollout in training, those that a stop string names as a whole included."""
    return sorted(end_tokens(trained.policy.model, trained.policy.tokenizer, trained.prepared.run.rollout.stop))


PHASES = {
    "self-check": "self-check by llama.cpp", "quantising": "quantising", "splitting": "splitting into parts", "converting": "llama.cpp's converter",
}  # fmt: skip


class _Announced:
    """The exporter's progress as a person sees it: phases, and MiB or tensors within them."""

    def __init__(self, display: Display) -> None:
        self.display, self.phase = display, ""

    def __call__(self, done: int, total: int, name: str) -> None:
        phase = PHASES.get(name, "writing")
        if phase != self.phase:
            self.display.phase(phase)
        self.phase = phase
        if phase in ("writing", "splitting into parts"):
            self.display.part(-(-done // 2**20), -(-total // 2**20))
        elif total > 1:
            self.display.part(done, total)


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


