"""The composition root: a prepared run becomes a policy, an engine, a buffer and rewards, and those become a trained adapter.

The only room that sees them all. Nothing is written before everything that can be checked has been.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from localrl.algorithms.base import Algorithm
from localrl.batch import Request, Rollout, collate
from localrl.buffer import make_buffer
from localrl.config import Run
from localrl.data import PromptData
from localrl.engines import Engine
from localrl.engines.call import Waves
from localrl.engines.choice import FILE as CHOICE
from localrl.engines.choice import as_text
from localrl.engines.make import choose
from localrl.engines.torch import TorchEngine
from localrl.evaluate import EVAL_VERSION
from localrl.folder import RunFolder, find_checkpoint, read_lines, read_run, write_whole
from localrl.interrupt import Interrupts
from localrl.memory.plan import MemoryPlan
from localrl.memory.reality import Teacher, key, tensors
from localrl.metrics import Clock, Metrics
from localrl.oom import Limits, OutOfMemory
from localrl.policy.policy import Policy
from localrl.prepare import Prepared, anchor, open_rewards, prepare
from localrl.probe import in_words, probe
from localrl.record import Display, Exam, Recorder, read_limits, read_trainer, restore_rng
from localrl.rewards import LoggedRewards, Rewards, Scores
from localrl.settings import UserError
from localrl.train import Drifted, Session, train

CALIBRATION_GROUPS, CALIBRATION_SAMPLES = 32, 4
REWARD_LOG, SEARCH_LOG = "rewards.log", "search.log"


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


@contextmanager
def assemble(prepared: Prepared, judges: Rewards | None, display: Display, algorithm: Algorithm | None = None, folder: Path | None = None) -> Iterator[Room]:
    """Load the model and put a session together; on leaving, whatever samples elsewhere is ended. The display hears how far a wave is.

    `folder`: the run's, where it is written who samples, and what searchers print.
    """
    run, plan = prepared.run, prepared.plan
    algorithm = algorithm or run.algorithm
    rewards: Scores
    if prepared.log is not None:
        rewards = LoggedRewards(prepared.log.names)
    else:
        assert judges is not None
        rewards = judges
    policy = Policy.create(
        run, critic="value" in algorithm.reads_before | algorithm.reads_during, checkpointing=plan.gradient_checkpointing, head_chunk=plan.head_chunk,
        directions=algorithm.directions(rewards.weights), kept_as=plan.directions, mlp_tile=plan.choice.mlp_tile, offload=plan.choice.offload,
        embedding_on_host=plan.choice.embedding_on_host,
    )  # fmt: skip
    sampling = run.rollout.model_copy(update={"concurrent": plan.concurrent})
    own = TorchEngine(policy.model, policy.tokenizer, sampling, run.seed, display.part, kv_cache=plan.choice.kv_cache)
    logged = None if prepared.log is None else prepared.log.rollouts
    buffer = make_buffer(
        run, prepared.data.train, weights=rewards.weights, reward_names=rewards.names, group_size=algorithm.group_size, log=logged
    )
    engine = open_engine(prepared, policy, own, algorithm, folder, display)
    try:
        algorithm = algorithm.for_sampler(exact=run.own_samples and engine.exact)
        limits = policy.limits = own.limits = Limits(say=display.say)
        if isinstance(engine, Waves):
            engine.limits = limits
        yield Room(Session(run, algorithm, policy, engine, buffer, rewards, plan, limits), own, judges)
    finally:
        engine.close()


def open_engine(prepared: Prepared, policy: Policy, own: TorchEngine, algorithm: Algorithm, folder: Path | None, display: Display) -> Engine:
    """Whoever samples in training. Where it was to be found out, the answer goes to the run folder."""
    run, plan = prepared.run, prepared.plan
    if prepared.log is not None:
        return own                                                   # nobody is asked
    chosen, other = choose(run, plan, own, first_requests(prepared), correction(policy, algorithm, plan), folder, display.say)
    if folder is not None:
        write_whole(folder / CHOICE, as_text(chosen))
    if not run.search.processes:
        return other or own
    from localrl.engines.searchers import Searchers

    if other is not None:
        other.close()                                                # each searcher has its own
    return Searchers(
        run, concurrent=plan.concurrent, with_reference="ref" in algorithm.for_sampler(exact=False).reads_before, kv_cache=plan.choice.kv_cache,
        llama=chosen.gguf if chosen.engine == "llama_cpp" else None, say=display.say, progress=display.part,
        log=None if folder is None else folder / SEARCH_LOG,
    )  # fmt: skip


def first_requests(prepared: Prepared) -> list[Request]:
    """What a step asks: for a trial of two engines."""
    rollout = prepared.run.rollout
    return [Request(prompt, sample) for prompt in prepared.data.train[: rollout.prompts_per_step] for sample in range(rollout.num_generations)]


def correction(policy: Policy, algorithm: Algorithm, plan: MemoryPlan) -> Callable[[list[Rollout]], object] | None:
    """The pass over its rollouts that a sampler which is not quite the policy makes necessary; None: the algorithm makes none, or makes it anyway."""
    more = algorithm.for_sampler(exact=False).reads_before - algorithm.for_sampler(exact=True).reads_before
    if not more or policy.run.optim.num_iterations > 1:
        return None

    def read(rollouts: list[Rollout]) -> object:
        batch = collate(rollouts, (), policy.run.rollout.max_completion_length).to(policy.device)
        return policy.read_whole(batch, more, plan.split(batch.sequence_length))

    return read


def calibrate(room: Room, prepared: Prepared) -> Algorithm:
    """What the algorithm wants to know of the untrained policy: some groups of training prompts, sampled and read once."""
    session = room.session
    prompts = prepared.data.train[:CALIBRATION_GROUPS]
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(CALIBRATION_SAMPLES)]
    whole = session.run.rollout.model_copy(update={"window": None, "concurrent": session.plan.concurrent})
    rollouts = room.own.generate(requests, EVAL_VERSION - 1, settings=whole)
    batch = collate(rollouts, (), session.run.rollout.max_completion_length).to(session.policy.device)
    readout = session.policy.read_whole(batch, session.algorithm.calibrates, session.plan.split(batch.sequence_length))
    return session.limits.again("calibrating", partial(session.algorithm.calibrate, batch, readout))


def train_run(run: Run, display: Display) -> Path:
    """A new run, from its settings to its last checkpoint. Returns the run folder; after Ctrl-C it is resumable.

    Raises UserError before anything is written if the run cannot work.
    """
    run = anchor(run, Path.cwd())
    path = Path(run.log.dir).expanduser().resolve() if run.log.dir else next_folder(run.name)
    RunFolder.refuse_if_used(path)
    prepared = prepare(run, display.say)
    folder = RunFolder.create(path, prepared.run)
    try:
        return _start(prepared, folder, display)
    finally:
        folder.close()
        if not (path / "state.json").exists():                    # it never began: leave nothing behind
            shutil.rmtree(path)


def _start(prepared: Prepared, folder: RunFolder, display: Display) -> Path:
    with open_rewards(prepared.run, prepared.data, folder.path / REWARD_LOG) as judges:
        display.phase("load")
        with assemble(prepared, judges, display, folder=folder.path) as room:
            write_plan(folder, room)
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
            with assemble(prepared, judges, display, algorithm, path) as room:
                room.session.policy.load(checkpoint)
                write_whole(path / "run.toml", run.dump())          # its new length, for the next time it is resumed
                room.session.buffer.restore(buffer)
                restore_rng(checkpoint)
                room.session.limits.learn(read_limits(checkpoint))
                folder.rewind(step)
                display.say(f"resumed {path} after step {step}")
                return _go(room, folder, prepared, display)
    finally:
        folder.close()


def try_worst_case(room: Room, folder: RunFolder, display: Display) -> None:
    """Where it is wanted: on a GPU, unless the settings say otherwise."""
    session, device = room.session, room.session.policy.device
    wanted = session.run.memory.probe
    if not (device.type == "cuda" if wanted is None else wanted):
        return
    metrics = probe(session, room.own, Clock(lambda phase: display.phase("probe"), device, tensors(session.plan.phases, session.plan.card)))
    display.say(in_words(metrics))
    plan = session.plan
    Teacher(key(plan.card, plan.shape, plan.work), display.say).look(metrics, worst_case=True)
    write_plan(folder, room, metrics)


def write_plan(folder: RunFolder, room: Room, measured: Metrics | None = None) -> None:
    """plan.json: what was planned, what the worst case measured, and what running out of memory has taught."""
    path = folder.path / "plan.json"
    before = json.loads(path.read_text()).get("measured") if path.exists() and measured is None else measured
    values = {**room.session.plan.to_dict(), "measured": before, "limits": room.session.limits.to_dict()}
    write_whole(path, json.dumps(values, indent=2))


def _go(room: Room, folder: RunFolder, prepared: Prepared, display: Display) -> Path:
    session = room.session
    recorder = Recorder(session, folder, room.exam(prepared.data), display)
    learned = session.limits.to_dict()
    try:
        with Interrupts() as interrupts:
            recorder.beat("running")
            try_worst_case(room, folder, display)
            if recorder.owes_evaluation(session.policy.step):
                recorder.evaluate(session.policy.step)
            train(session, recorder, interrupts)
        recorder.beat("finished")
    except KeyboardInterrupt:
        recorder.checkpoint()
        recorder.beat("stopped", "interrupted")
        display.say(f"stopped after step {session.policy.step}; go on with `localrl resume {folder.path}`")
        raise
    except OutOfMemory as error:
        if not session.policy.updates:                             # the state between two steps; else the last checkpoint has one
            recorder.checkpoint()
        recorder.beat("failed", str(error))
        display.say(f"stopped after step {session.policy.step}; go on with `localrl resume {folder.path}` once there is room")
        raise
    except Drifted as error:
        recorder.checkpoint()
        recorder.beat("failed", str(error))
        raise
    except BaseException as error:
        recorder.beat("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        if session.limits.to_dict() != learned:
            write_plan(folder, room)
    return folder.path


def next_folder(name: str) -> Path:
    """runs/<name>-001, or the next number that is free."""
    base = Path.cwd() / "runs"
    number = 1
    while (base / f"{name}-{number:03d}").exists():
        number += 1
    return base / f"{name}-{number:03d}"
