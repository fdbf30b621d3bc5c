"""The worst case, once, before the first step: longest prompts and responses, the largest pass, the fullest moments of the largest wave.

Everything is done for real and nothing is kept: gradients are dropped, nothing is sampled that anybody sees, and no random stream moves on.
What it measures corrects later plans; if memory runs out, limits shrink before the first step instead of in the middle of it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from localrl.batch import Batch, Prompt, Readout, Request, Rollout, collate
from localrl.engines.rehearsal import rehearse
from localrl.engines.torch import TorchEngine
from localrl.memory.cards import gib
from localrl.memory.fit import prompts_in_wave
from localrl.metrics import Clock, Metrics
from localrl.train import Session, accumulate


def probe(session: Session, engine: TorchEngine, clock: Clock) -> Metrics:
    """`memory/<phase>`, `..._planned` and `..._ratio` of the worst case (bytes). Raises OutOfMemory if not even one row fits."""
    policy, algorithm, plan, limits = session.policy, session.algorithm, session.plan, session.limits
    batch, nothing, rows = limits.again("laying out the worst case", partial(_laid_out, session))
    parts = [rows]
    with clock("scoring"):
        policy.read_whole(batch, algorithm.reads_before or {"logp"}, parts)
    credit = limits.again("giving credit", partial(algorithm.credit, batch, Readout(*[nothing] * 5)))
    with clock("learn"):
        accumulate(algorithm, policy, batch, credit, parts)
    policy.drop_gradients()
    with clock("rollout"):
        wave = min(plan.concurrent, plan.work.rollouts)
        while limits.attempt(partial(_wave, session, engine, wave)) is None and wave > 1:
            limits.narrow(wave)
            wave = (wave + 1) // 2
    limits.count()
    return clock.memory()


def longest_rows(session: Session) -> Batch:
    """As many rows as one pass of the plan holds, each as long as may be, with rewards that differ."""
    plan, names = session.plan, session.rewards.names
    work, group = plan.work, max(1, session.algorithm.group_size)
    count = max(1, min(plan.micro_batch_tokens // work.longest, work.rollouts))
    prompt, response = (0,) * work.max_prompt_length, (0,) * work.max_completion_length
    rows = [
        Rollout(Request(Prompt(i // group, prompt, ""), i % group), response, "", True, 0, (0.0,) * len(response),
                tuple(float((i + k) % 2) for k in range(len(names))))
        for i in range(count)
    ]  # fmt: skip
    return collate(rows, session.rewards.weights, len(response), session.run.steps)


def in_words(metrics: Metrics) -> str:
    """What was measured, against what was planned."""
    names = [name.removeprefix("memory/").removesuffix("_planned") for name in metrics if name.endswith("_planned")]
    told = [f"{name} {gib(round(metrics[f'memory/{name}']))} of {gib(round(metrics[f'memory/{name}_planned']))} planned" for name in names]
    return "the worst case, tried: " + (", ".join(told) if told else "it fits (its memory cannot be measured on this system)")


def _laid_out(session: Session) -> tuple[Batch, Tensor, Tensor]:
    """The rows, a column of zeros, and the rows' numbers, on the policy's device."""
    batch, device = longest_rows(session), session.policy.device
    return batch.to(device), torch.zeros(batch.mask.shape, device=device), torch.arange(len(batch), device=device)


def _wave(session: Session, engine: TorchEngine, rows: int) -> None:
    work = session.plan.work
    with torch.no_grad():
        rehearse(engine, work.max_prompt_length, work.max_completion_length, rows, prompts_in_wave(work, rows))
