"""The loop. It names no algorithm, no engine and no reward: it moves the nouns of `localrl.batch` from room to room."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from localrl.algebra import token_mean
from localrl.algorithms.base import Algorithm
from localrl.batch import Batch, Readout, Rollout, collate, rows_of
from localrl.buffer import Buffer
from localrl.config import Run
from localrl.engines import Engine
from localrl.interrupt import Interrupts
from localrl.memory.plan import MemoryPlan
from localrl.memory.reality import tensors
from localrl.metrics import Clock, Metrics, describe, mean_entropy, mismatch
from localrl.oom import Limits
from localrl.policy.policy import Policy
from localrl.rewards import Scores
from localrl.settings import UserError

LEAST_ESS = 0.5
"""Effective sample size of a step's tokens, as their share, below which it is not learned from."""


class Drifted(UserError):
    """The sampler is too far from the policy. Nothing of the step has been learned yet."""


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
    limits: Limits = field(default_factory=Limits)
    """What running out of memory has taught; the policy and the engine heed them."""


class Watch(Protocol):
    """Who looks on: the run folder and the progress display. Nothing it does may change a number."""

    def phase(self, name: str) -> None: ...
    def step(self, step: int, metrics: Metrics, rollouts: list[Rollout], token_weights: Tensor | None) -> None: ...
    def rest(self, step: int) -> None: ...


def train(session: Session, watch: Watch, interrupts: Interrupts) -> None:
    """From the policy's step to the run's last one. After an interrupt the session stands as it did before the step that was cut."""
    policy, buffer = session.policy, session.buffer
    for step in range(policy.step, session.run.steps):
        clock, before = Clock(watch.phase, policy.device, tensors(session.plan.phases, session.plan.card)), buffer.snapshot()
        try:
            done = one_step(session, step, clock, interrupts)
        except BaseException:
            if not policy.updates:                               # cut before its update: as if it had never begun
                policy.drop_gradients()
                buffer.rollback(before)
            raise
        watch.step(policy.step, *done)
        interrupts.release()
        watch.rest(policy.step)                                  # evaluation and checkpoint


def one_step(session: Session, step: int, clock: Clock, interrupts: Interrupts) -> tuple[Metrics, list[Rollout], Tensor | None]:
    """Sample, score, give credit, update."""
    run, algorithm, policy, again = session.run, session.algorithm, session.policy, session.limits.again
    rollouts = gather(session, step, clock)
    batch, parts = again("laying out the step", partial(laid_out, session, rollouts, step))
    before = algorithm.reads_before | (frozenset({"logp"}) if run.optim.num_iterations > 1 else frozenset())
    with clock("scoring"):
        readout = policy.read_whole(batch, before, parts) if before else Readout()
        credit = again("giving credit", partial(algorithm.credit, batch, readout))
    stats: Metrics = {}
    gap: Metrics = {}
    for iteration in range(run.optim.num_iterations):
        with clock("learn"):
            seen = again("weighing tokens", lambda: torch.full_like(batch.mask, math.nan, dtype=torch.float32)) if iteration == 0 else None
            stats, rate = learn(session, batch, credit, parts, seen)
        if seen is not None:
            gap = again("comparing sampler and policy", partial(mismatch, batch, seen))
            check_sampler(gap)
        interrupts.hold()
        with clock("update"):
            stats |= policy.update(rate)
    stats |= gap | again("describing the step", partial(look_back, session, batch, credit, clock))
    weights = again("describing the step", partial(algorithm.token_weights, credit))
    policy.step, policy.updates = step + 1, 0
    return {"step": policy.step, **stats, "memory/oom_retries": float(session.limits.count())}, rollouts, weights


def laid_out(session: Session, rollouts: list[Rollout], step: int = 0) -> tuple[Batch, list[Tensor]]:
    """Rollouts as a batch on the policy's device, and the rows of each micro-batch."""
    batch = collate(rollouts, session.rewards.weights, session.run.rollout.max_completion_length, step).to(session.policy.device)
    return batch, session.plan.split(batch.sequence_length)


def check_sampler(gap: Metrics) -> None:
    """Before the update: Drifted if fresh samples are so far from the policy that hardly any of them counts."""
    if gap and gap["sampler/age"] == 0 and gap["sampler/ess"] < LEAST_ESS:
        raise Drifted(
            f"the sampler no longer says what the policy says: of its tokens {gap['sampler/ess']:.0%} count (at least {LEAST_ESS:.0%} have to), "
            f"log-probabilities differ by {gap['sampler/mean_difference']:.2g} nats on average; sample with rollout.engine=torch, or with llama.cpp from "
            "rollout.gguf=q8_0 (both in the run folder's run.toml; delete its engine.json), then resume"
        )


def look_back(session: Session, batch: Batch, credit: Any, clock: Clock) -> Metrics:
    """What there is to say of a step that is done."""
    sampling = session.engine.metrics()
    stats = describe(batch, session.rewards.names) | sampling | session.buffer.metrics()
    return {**stats, **session.algorithm.observe(batch, credit), **clock.report(batch, sampling)}


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
    batch, parts = session.limits.again("laying out the step", partial(laid_out, session, todo))
    ref = session.policy.read_whole(batch, {"ref"}, parts).ref
    assert ref is not None
    read = iter(ref.tolist())
    return [r if r.ref is not None else replace(r, ref=tuple(next(read)[: len(r.tokens)])) for r in rollouts]


def learn(session: Session, batch: Batch, credit: Any, parts: list[Tensor], seen: Tensor | None = None) -> tuple[Metrics, float]:
    """Gradients of the whole step, and the factor on its learning rate. Where directions are kept apart, the algorithm says how they add up.

    `seen` (B, T) is filled with the log-probabilities that were read on the way."""
    algorithm, policy, weights = session.algorithm, session.policy, session.rewards.weights
    stats = accumulate(algorithm, policy, batch, credit, parts, seen)
    if policy.directions is None:
        return stats, 1.0
    directions = policy.directions
    steering = session.limits.again("comparing directions", lambda: algorithm.steer(directions.gram(), weights, list(policy.past)))
    stats |= policy.turn(steering.weights, steering.stats)
    if policy.directions.passes == 2:
        accumulate(algorithm, policy, batch, credit, parts)
    return stats, steering.rate


def accumulate(algorithm: Algorithm, policy: Policy, batch: Batch, credit: Any, parts: list[Tensor], seen: Tensor | None = None) -> Metrics:
    """Gradients of the whole step, micro-batch by micro-batch. Losses are sums, so the split does not matter. `seen`: as in `learn`."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    share = policy.limits.again("weighing tokens", lambda: token_mean(batch.fresh))
    for rows in parts:
        for columns in algorithm.readings:
            for stats in policy.in_pieces("learning", partial(one_reading, algorithm, policy, batch, credit, share, columns, seen=seen), rows, batch):
                for name, value in stats.items():
                    found[name].append(value)
    return policy.limits.again("adding up metrics", lambda: {name: torch.stack(values).sum().item() for name, values in found.items()})


def one_reading(
    algorithm: Algorithm, policy: Policy, batch: Batch, credit: Any, share: Tensor, columns: frozenset[str], rows: Tensor,
    seen: Tensor | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of some rows; when it returns, nothing of the graph is left."""
    part = batch[rows]
    width = part.tokens.shape[1]
    readout = policy.read(part, columns | {"entropy"} if "logp" in columns else columns)
    loss = algorithm.loss(part, readout, rows_of(credit, rows, width))
    policy.backward(loss)
    if seen is not None and readout.logp is not None:
        seen[rows.to(seen.device), :width] = readout.logp.detach()
    return {"loss": loss.value.detach(), **loss.stats, **mean_entropy(readout, share[rows, :width])}
