"""The loop. It names no algorithm, no engine and no reward: it moves the nouns of `localrl.batch` from room to room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from localrl.algebra import token_mean
from localrl.algorithms.base import Algorithm
from localrl.batch import Batch, Readout, Rollout, collate, rows_of
from localrl.buffer import Buffer
from localrl.config import Run
from localrl.engines import Engine
from localrl.interrupt import Interrupts
from localrl.memory.plan import MemoryPlan
from localrl.metrics import Clock, Metrics, describe, entropy_and_mismatch, mismatch
from localrl.policy.policy import Policy
from localrl.rewards import Scores


@dataclass(frozen=True)
class Session:
    """Everything a run is made of; `localrl.run` puts it together."""

    run: Run
    algorithm: Algorithm
    policy: Policy
    engine: Engine
    buffer: Buffer
    rewards: Scores
    plan: MemoryPlan


class Watch(Protocol):
    """Who looks on: the run folder and the progress display. Nothing it does may change a number."""

    def phase(self, name: str) -> None: ...
    def step(self, step: int, metrics: Metrics, rollouts: list[Rollout], token_weights: Tensor | None) -> None: ...
    def rest(self, step: int) -> None: ...


def train(session: Session, watch: Watch, interrupts: Interrupts) -> None:
    """From the policy's step to the run's last one. After an interrupt the session stands as it did before the step that was cut."""
    policy, buffer = session.policy, session.buffer
    for step in range(policy.step, session.run.steps):
        clock, before = Clock(watch.phase, policy.device), buffer.snapshot()
        try:
            done = one_step(session, step, clock, interrupts)
        except BaseException:
            if not interrupts.held:                              # cut before its update: as if it had never begun
                policy.drop_gradients()
                buffer.rollback(before)
            raise
        watch.step(policy.step, *done)
        interrupts.release()
        watch.rest(policy.step)                                  # evaluation and checkpoint


def one_step(session: Session, step: int, clock: Clock, interrupts: Interrupts) -> tuple[Metrics, list[Rollout], Tensor | None]:
    """Sample, score, give credit, update."""
    run, algorithm, policy = session.run, session.algorithm, session.policy
    rollouts = gather(session, step, clock)
    batch = collate(rollouts, session.rewards.weights, run.rollout.max_completion_length, step).to(policy.device)
    parts = session.plan.split(batch.sequence_length)
    before = algorithm.reads_before | (frozenset({"logp"}) if run.optim.num_iterations > 1 else frozenset())
    with clock("scoring"):
        readout = policy.read_whole(batch, before, parts) if before else Readout()
        credit = algorithm.credit(batch, readout)
    stats: Metrics = {}
    for _ in range(run.optim.num_iterations):
        with clock("learn"):
            stats, rate = learn(session, batch, credit, parts)
        interrupts.hold()
        with clock("update"):
            stats |= policy.update(rate)
    policy.step = step + 1
    if readout.logp is not None:
        stats |= mismatch(batch, readout.logp)
    sampling = session.engine.metrics()
    stats |= describe(batch, session.rewards.names) | sampling | session.buffer.metrics()
    return {"step": policy.step, **stats, **algorithm.observe(batch, credit), **clock.report(batch, sampling)}, rollouts, algorithm.token_weights(credit)


def gather(session: Session, step: int, clock: Clock) -> list[Rollout]:
    """Ask for rollouts and score them until the buffer has a step together. A buffer that needs nothing asks for nothing."""
    engine, buffer = session.engine, session.buffer
    while True:
        with clock("rollout"):
            engine.follow(session.policy.save_weights, step)
            rollouts = engine.generate(buffer.requests(step), step)
        with clock("rewards"):
            rollouts = session.rewards.score(rollouts)
        if session.run.replay.capacity and "ref" in session.algorithm.reads_before:
            with clock("reference"):
                rollouts = with_reference(session, rollouts)
        buffer.add(rollouts)
        if buffer.ready:
            return buffer.draw(step)


def with_reference(session: Session, rollouts: list[Rollout]) -> list[Rollout]:
    """Rollouts that are kept carry their reference's log-probabilities: read once, used as often as they are drawn."""
    todo = [rollout for rollout in rollouts if rollout.ref is None]
    if not todo:
        return rollouts
    batch = collate(todo, session.rewards.weights, session.run.rollout.max_completion_length).to(session.policy.device)
    ref = session.policy.read_whole(batch, {"ref"}, session.plan.split(batch.sequence_length)).ref
    assert ref is not None
    read = iter(ref.tolist())
    return [r if r.ref is not None else replace(r, ref=tuple(next(read)[: len(r.tokens)])) for r in rollouts]


def learn(session: Session, batch: Batch, credit: Any, parts: list[Tensor]) -> tuple[Metrics, float]:
    """Gradients of the whole step, and the factor on its learning rate. Where directions are kept apart, the algorithm says how they add up."""
    algorithm, policy, weights = session.algorithm, session.policy, session.rewards.weights
    stats = accumulate(algorithm, policy, batch, credit, parts)
    if policy.directions is None:
        return stats, 1.0
    steering = algorithm.steer(policy.directions.gram(), weights, list(policy.past))
    stats |= policy.turn(steering.weights, steering.stats)
    if policy.directions.passes == 2:
        accumulate(algorithm, policy, batch, credit, parts)
    return stats, steering.rate


def accumulate(algorithm: Algorithm, policy: Policy, batch: Batch, credit: Any, parts: list[Tensor]) -> Metrics:
    """Gradients of the whole step, micro-batch by micro-batch. Losses are sums, so the split does not matter."""
    stats: dict[str, Tensor] = {}
    weight = token_mean(batch.fresh)
    for rows in parts:
        part = batch[rows]
        width = part.tokens.shape[1]
        share, own = weight[rows, :width], rows_of(credit, rows, width)
        for columns in algorithm.readings:
            for name, value in one_reading(algorithm, policy, part, own, columns, share).items():
                stats[name] = stats[name] + value if name in stats else value
    return {name: value.item() for name, value in stats.items()}


def one_reading(algorithm: Algorithm, policy: Policy, part: Batch, credit: Any, columns: frozenset[str], share: Tensor) -> dict[str, Tensor]:
    """Forward and backward; when it returns, nothing of the graph is left."""
    readout = policy.read(part, columns | {"entropy"} if "logp" in columns else columns)
    loss = algorithm.loss(part, readout, credit)
    policy.backward(loss)
    return {"loss": loss.value.detach(), **loss.stats, **entropy_and_mismatch(part, readout, share)}
