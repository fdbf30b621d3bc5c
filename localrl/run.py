"""The composition root: settings become a plan, a policy, an engine, a buffer and rewards, and those become a trained adapter.

The only room that sees them all. Nothing is written before everything that can be checked has been.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from localrl.algorithms.base import Algorithm
from localrl.batch import Request, collate
from localrl.buffer import Log, make_buffer, read_log, without_log_columns
from localrl.config import Run, preset_model_config
from localrl.data import DataSettings, PromptData, load_prompts
from localrl.engines import Engine
from localrl.engines.torch import TorchEngine
from localrl.evaluate import EVAL_VERSION
from localrl.export import check_exportable
from localrl.folder import RunFolder, find_checkpoint, read_lines, read_run, write_whole
from localrl.interrupt import Interrupts
from localrl.memory.plan import MemoryPlan, make_plan
from localrl.memory.shape import ModelShape
from localrl.policy.load import load_tokenizer, model_path, pick_device, pick_dtype
from localrl.policy.policy import Policy
from localrl.record import Display, Exam, Recorder, read_trainer, restore_rng
from localrl.rewards import LoggedRewards, Rewards, Scores
from localrl.settings import UserError
from localrl.train import Session, train

CALIBRATION_GROUPS, CALIBRATION_SAMPLES = 32, 4
REWARD_LOG, SEARCH_LOG = "rewards.log", "search.log"
DEMO_DATA = Path(__file__).parent / "demo" / "data"


@dataclass(frozen=True)
class Prepared:
    """What can be known and checked before a weight is loaded."""

    run: Run
    plan: MemoryPlan
    tokenizer: Any
    data: PromptData
    log: Log | None = None
    """What is learned from instead of own samples."""


@dataclass(frozen=True)
class Room:
    """A session and what belongs to it but not to the loop."""

    session: Session
    own: TorchEngine
    """Samples from the learning weights: in training if nobody else does, and in evaluation."""
    judges: Rewards | None
    """The reward functions; None: there are none, a log brings its rewards."""

    def exam(self, data: PromptData) -> Exam | None:
        """Held-out evaluation, if there is anything to evaluate with."""
        return Exam(self.own, self.judges, data.eval) if self.judges is not None and data.eval else None


def anchor(run: Run, base: Path) -> Run:
    """The same run with its local paths absolute, so that it can be resumed from anywhere."""

    def absolute(path: str) -> str:
        if path == "demo":
            return path
        file, colon, rest = path.partition(":")
        return f"{(base / file).resolve()}{colon}{rest}" if (base / file).exists() else path

    specs = tuple(f.model_copy(update={"function": absolute(f.function)}) if ".py" in f.function else f for f in run.rewards.functions)
    data = {name: absolute(value) for name in ("path", "eval_path") if (value := getattr(run.data, name))}
    return run.model_copy(update={
        "model": run.model.model_copy(update={"path": absolute(run.model.path)}),
        "data": run.data.model_copy(update=data),
        "rewards": run.rewards.model_copy(update={"functions": specs}),
    })  # fmt: skip


def with_demo_data(data: DataSettings) -> DataSettings:
    """"demo" stands for the embedded task's files."""
    files = {name: str(DEMO_DATA / file) for name, file in (("path", "train.jsonl"), ("eval_path", "eval.jsonl")) if getattr(data, name) == "demo"}
    return data.model_copy(update=files)


def plan_for_card(run: Run, card: str | None = None) -> MemoryPlan:
    """What a run would need on a card named here or in the settings, whatever this machine has; without a name, on this machine."""
    card = card or run.memory.card
    if card is None or run.model.device == "cpu":
        return plan_run(run)
    run = run.model_copy(update={"memory": run.memory.model_copy(update={"card": card})})
    return _plan(run, "cuda", 4 if run.model.compute_dtype == "float32" else 2)


def plan_run(run: Run) -> MemoryPlan:
    """What every phase will need on the device that the run will train on, from the model's config alone."""
    device = pick_device(run.model)
    return _plan(run, "cuda" if device.type == "cuda" else "cpu", pick_dtype(run.model, device).itemsize)


def _plan(run: Run, device: Literal["cuda", "cpu"], compute_bytes: int) -> MemoryPlan:
    needs_critic = "value" in run.algorithm.reads_before | run.algorithm.reads_during
    return make_plan(
        ModelShape.read(model_config(run).to_dict()),
        card_bytes=run.memory.card,
        quantization=run.model.quantization,
        compute_bytes=compute_bytes,
        lora_r=run.adapter.lora_r,
        lora_targets=run.adapter.lora_target_modules,
        critic=needs_critic,
        optimizer=run.optim.optimizer,
        prompts_per_step=run.rollout.prompts_per_step,
        num_generations=run.rollout.num_generations,
        max_prompt_length=run.data.max_prompt_length,
        max_completion_length=run.rollout.max_completion_length,
        gradient_checkpointing=run.memory.gradient_checkpointing,
        micro_batch_tokens=run.memory.micro_batch_tokens,
        concurrent=run.rollout.concurrent,
        gradients=len(run.algorithm.directions([spec.weight for spec in run.rewards.functions])),
        directions=None if run.memory.directions == "auto" else run.memory.directions,
        head_chunk=run.memory.head_chunk,
        reference="ref" in run.algorithm.reads_before | run.algorithm.reads_during,
        device=device,
        unpacked=None if run.rollout.weights == "auto" else run.rollout.weights == "unpacked",
        fewest_generations=run.eval.num_generations if run.eval.limit and run.eval.temperature else 1,
        truncated=bool(run.rollout.top_k) or run.rollout.top_p < 1,
    )


def model_config(run: Run) -> Any:
    """As transformers reads it; for the presets' own models without a network."""
    path = preset_model_config(run.model.path) or model_path(run.model)
    try:
        return AutoConfig.from_pretrained(str(path), revision=run.model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no model config from model.path = '{run.model.path}': {str(error).splitlines()[0]}") from None


def prepare(run: Run, say: Callable[[str], None]) -> Prepared:
    """Everything short of loading weights: the plan must fit, the data must read, the rewards must answer."""
    plan = plan_run(run)
    plan.check()
    tokenizer = load_tokenizer(run.model)
    try:
        check_exportable(model_config(run), {"target_modules": run.adapter.lora_target_modules}, tokenizer)
    except UserError as error:
        say(f"this run can be trained but not exported: {error}")
    data = load_prompts(with_demo_data(run.data), tokenizer, run.seed, Path.cwd())
    for note in data.notes:
        say(note)
    if len(data.train) < run.rollout.prompts_per_step and not run.data.from_log:
        say(f"{len(data.train)} training prompts for rollout.prompts_per_step={run.rollout.prompts_per_step}: prompts will repeat within a step")
    if not run.data.from_log:
        return Prepared(run, plan, tokenizer, data)
    log = read_log(data.train, tokenizer, tokenizer.eos_token_id, run.rollout.max_completion_length)
    for note in log.notes:
        say(note)
    return Prepared(run, plan, tokenizer, without_log_columns(data), log)


def check_run(run: Run, say: Callable[[str], None]) -> Prepared:
    """`prepare`, and the rewards started once and asked nothing: all that a dry run can find out."""
    if run.log.dir:
        RunFolder.refuse_if_used(Path(run.log.dir).expanduser().resolve())
    prepared = prepare(run, say)
    with open_rewards(run, prepared.data):
        return prepared


@contextmanager
def open_rewards(run: Run, data: PromptData, log: Path | None = None) -> Iterator[Rewards | None]:
    """The reward workers, up and checked against the data's columns. What the functions print goes to `log`, or to our stderr.

    None: a run from a log may have none."""
    if not run.rewards.functions:
        yield None
        return
    with Rewards(run.rewards, Path.cwd(), log) as rewards:
        rewards.check_columns(set(data.columns))
        yield rewards


@contextmanager
def assemble(prepared: Prepared, judges: Rewards | None, display: Display, algorithm: Algorithm | None = None, log: Path | None = None) -> Iterator[Room]:
    """Load the model and put a session together; on leaving, whatever samples elsewhere is ended. The display hears how far a wave is."""
    run, plan = prepared.run, prepared.plan
    algorithm = (algorithm or run.algorithm).for_sampler(exact=run.own_samples)
    rewards: Scores
    if prepared.log is not None:
        rewards = LoggedRewards(prepared.log.names)
    else:
        assert judges is not None
        rewards = judges
    policy = Policy.create(
        run, critic="value" in algorithm.reads_before | algorithm.reads_during, checkpointing=plan.gradient_checkpointing, head_chunk=plan.head_chunk,
        directions=algorithm.directions(rewards.weights), kept_as=plan.directions,
    )  # fmt: skip
    sampling = run.rollout.model_copy(update={"concurrent": plan.concurrent})
    own = TorchEngine(policy.model, policy.tokenizer, sampling, run.seed, display.part)
    engine: Engine = own
    if run.search.processes:
        from localrl.engines.searchers import Searchers

        reference = "ref" in algorithm.reads_before
        engine = Searchers(run, concurrent=plan.concurrent, with_reference=reference, say=display.say, progress=display.part, log=log)
    logged = None if prepared.log is None else prepared.log.rollouts
    buffer = make_buffer(
        run, prepared.data.train, weights=rewards.weights, reward_names=rewards.names, group_size=algorithm.group_size, log=logged
    )
    try:
        yield Room(Session(run, algorithm, policy, engine, buffer, rewards, plan), own, judges)
    finally:
        engine.close()


def calibrate(room: Room, prepared: Prepared) -> Algorithm:
    """What the algorithm wants to know of the untrained policy: some groups of training prompts, sampled and read once."""
    session = room.session
    prompts = prepared.data.train[:CALIBRATION_GROUPS]
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(CALIBRATION_SAMPLES)]
    whole = session.run.rollout.model_copy(update={"window": None, "concurrent": session.plan.concurrent})
    rollouts = room.own.generate(requests, EVAL_VERSION - 1, settings=whole)
    batch = collate(rollouts, (), session.run.rollout.max_completion_length).to(session.policy.device)
    readout = session.policy.read_whole(batch, session.algorithm.calibrates, session.plan.split(batch.sequence_length))
    return session.algorithm.calibrate(batch, readout)


def train_run(run: Run, display: Display) -> Path:
    """A new run, from its settings to its last checkpoint. Returns the run folder; after Ctrl-C it is resumable.

    Raises UserError before anything is written if the run cannot work.
    """
    run = anchor(run, Path.cwd())
    path = Path(run.log.dir).expanduser().resolve() if run.log.dir else next_folder(run.name)
    RunFolder.refuse_if_used(path)
    prepared = prepare(run, display.say)
    folder = RunFolder.create(path, run)
    try:
        return _start(run, prepared, folder, display)
    finally:
        folder.close()
        if not (path / "state.json").exists():                    # it never began: leave nothing behind
            shutil.rmtree(path)


def _start(run: Run, prepared: Prepared, folder: RunFolder, display: Display) -> Path:
    with open_rewards(run, prepared.data, folder.path / REWARD_LOG) as judges:
        display.phase("load")
        with assemble(prepared, judges, display, log=folder.path / SEARCH_LOG) as room:
            write_whole(folder.path / "plan.json", prepared.plan.to_json())
            display.say(f"run folder: {folder.path}")
            if room.session.algorithm.calibrates:
                display.phase("calibration")
                before, measured = room.session.algorithm.model_dump(), calibrate(room, prepared)
                room = replace(room, session=replace(room.session, algorithm=measured))
                changed = {k: v for k, v in measured.model_dump().items() if v != before[k]}
                display.say("measured on the untrained model: " + ", ".join(f"algorithm.{k} = {v:.3g}" for k, v in changed.items()))
            return _go(room, folder, prepared, display)


def resume_run(path: Path, display: Display, steps: int | None = None) -> Path:
    """Go on from a run folder's newest checkpoint, or from the checkpoint named: to the same numbers as if it had never stopped.

    `steps` may lengthen the run.
    """
    path, checkpoint = find_checkpoint(path)
    step, buffer, algorithm = read_trainer(checkpoint)
    run = read_run(path)
    if steps is not None:
        run = run.model_copy(update={"steps": steps})
    evaluated = any(row["step"] == step for row in read_lines(path / "evaluations.jsonl")) or run.eval.limit == 0
    if step >= run.steps and evaluated:
        raise UserError(f"{path} has done its {run.steps} steps: lengthen it with `localrl resume {path} --steps {run.steps * 2}`, or export it")
    folder = RunFolder.reopen(path)
    try:
        prepared = prepare(run, display.say)
        with open_rewards(run, prepared.data, path / REWARD_LOG) as judges:
            display.phase("load")
            with assemble(prepared, judges, display, algorithm, path / SEARCH_LOG) as room:
                room.session.policy.load(checkpoint)
                write_whole(path / "run.toml", run.dump())          # its new length, for the next time it is resumed
                room.session.buffer.restore(buffer)
                restore_rng(checkpoint)
                folder.rewind(step)
                display.say(f"resumed {path} after step {step}")
                return _go(room, folder, prepared, display)
    finally:
        folder.close()


def _go(room: Room, folder: RunFolder, prepared: Prepared, display: Display) -> Path:
    session = room.session
    recorder = Recorder(session, folder, room.exam(prepared.data), display)
    try:
        with Interrupts() as interrupts:
            recorder.beat("running")
            if recorder.owes_evaluation(session.policy.step):
                recorder.evaluate(session.policy.step)
            train(session, recorder, interrupts)
        recorder.beat("finished")
    except KeyboardInterrupt:
        recorder.checkpoint()
        recorder.beat("stopped", "interrupted")
        display.say(f"stopped after step {session.policy.step}; go on with `localrl resume {folder.path}`")
        raise
    except BaseException as error:
        recorder.beat("failed", f"{type(error).__name__}: {error}")
        raise
    return folder.path


def next_folder(name: str) -> Path:
    """runs/<name>-001, or the next number that is free."""
    base = Path.cwd() / "runs"
    number = 1
    while (base / f"{name}-{number:03d}").exists():
        number += 1
    return base / f"{name}-{number:03d}"
