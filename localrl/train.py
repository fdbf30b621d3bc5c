"""The loop. It names no algorithm, no engine and no reward: it moves the nouns of `localrl.batch` from room to room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from localrl.algebra import token_mean
from localrl.algorithms.base import Algorithm
from localrl.batch import Batch, Readout, Rollout, collate, rows_of
from localrl.buffer import RolloutBuffer
from localrl.config import Run
from localrl.engines import Engine
from localrl.interrupt import Interrupts
from localrl.memory.plan import MemoryPlan
from localrl.metrics import Clock, Metrics, describe
from localrl.policy.policy import Policy
from localrl.rewards import Rewards


@dataclass(frozen=True)
class Session:
    """Everything a run is made of; `localrl.run` puts it together."""

    run: Run
    algorithm: Algorithm
    policy: Policy
    engine: Engine
    buffer: RolloutBuffer
    rewards: Rewards
    plan: MemoryPlan


class Watch(Protocol):
    """Who looks on: the run folder and the progress display. Nothing it does may change a number."""

    def phase(self, name: str) -> None: ...
    def step(self, step: int, metrics: Metrics, rollouts: list[Rollout]) -> None: ...
    def rest(self, step: int) -> None: ...


def train(session: Session, watch: Watch, interrupts: Interrupts) -> None:
    """From the policy's step to the run's last one. After an interrupt the session stands as it did before the step that was cut."""
    policy, buffer = session.policy, session.buffer
    for step in range(policy.step, session.run.steps):
        clock, position = Clock(watch.phase, policy.device), buffer.state()
        try:
            metrics, rollouts = one_step(session, step, clock, interrupts)
        except BaseException:
            if not interrupts.held:                              # cut before its update: as if it had never begun
                policy.drop_gradients()
                buffer.restore(position)
            raise
        watch.step(policy.step, metrics, rollouts)
        interrupts.release()
        watch.rest(policy.step)                                  # evaluation and checkpoint


def one_step(session: Session, step: int, clock: Clock, interrupts: Interrupts) -> tuple[Metrics, list[Rollout]]:
    """Sample, score, give credit, update."""
    run, algorithm, policy, plan = session.run, session.algorithm, session.policy, session.plan
    with clock("rollout"):
        rollouts = session.engine.generate(session.buffer.requests(), step)
    with clock("rewards"):
        session.buffer.add(session.rewards.score(rollouts))
    rollouts = session.buffer.draw()
    batch = collate(rollouts, session.rewards.weights, run.rollout.max_completion_length).to(policy.device)
    parts = plan.split(batch.sequence_length)
    before = algorithm.reads_before | (frozenset({"logp"}) if run.optim.num_iterations > 1 else frozenset())
    with clock("scoring"):
        readout = policy.read_whole(batch, before, parts) if before else Readout()
        credit = algorithm.credit(batch, readout)
    stats: Metrics = {}
    for _ in range(run.optim.num_iterations):
        with clock("learn"):
            stats = accumulate(algorithm, policy, batch, credit, parts)
        interrupts.hold()
        with clock("update"):
            stats |= policy.update()
    policy.step = step + 1
    return {"step": policy.step, **describe(batch, session.rewards.names), **stats, **algorithm.observe(batch, credit), **clock.report(batch)}, rollouts


def accumulate(algorithm: Algorithm, policy: Policy, batch: Batch, credit: Any, parts: list[Tensor]) -> Metrics:
    """Gradients of the whole step, micro-batch by micro-batch. Losses are sums, so the split does not matter."""
    stats: dict[str, Tensor] = {}
    weight = token_mean(batch.mask)
    for rows in parts:
        part = batch[rows]
        width = part.tokens.shape[1]
        readout = policy.read(part, algorithm.reads_during | {"entropy"})
        loss = algorithm.loss(part, readout, rows_of(credit, rows, width))
        loss.value.backward()
        assert readout.entropy is not None
        entropy = (weight[rows, :width] * readout.entropy.detach()).sum()
        for name, value in {"loss": loss.value.detach(), "entropy": entropy, **loss.stats}.items():
            stats[name] = stats[name] + value if name in stats else value
    return {name: value.item() for name, value in stats.items()}
