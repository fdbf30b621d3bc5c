"""A session whose step can be taken again and again from where it was, with memory that runs out in another place each time."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from localrl.batch import Batch, Prompt, Rollout, collate
from localrl.buffer import make_buffer
from localrl.config import build
from localrl.engines.torch import TorchEngine
from localrl.interrupt import Interrupts
from localrl.memory.cards import Card
from localrl.memory.plan import packed
from localrl.metrics import Clock, Metrics
from localrl.oom import Limits
from localrl.policy.policy import Policy
from localrl.rewards.pool import Report
from localrl.train import Session, one_step
from tests.oom import Scarce, fail_at

MICRO_BATCH = 36
"""Tokens of a pass."""
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
WORK = ("time/", "tokens_per_second/", "memory/", "rollout/passes", "rollout/idle_share")
"""Metrics of how it was done rather than of what."""
CASES: dict[str, dict[str, Any]] = {
    "grpo nf4": {},
    "grpo int8": {"model": {"quantization": "int8"}},
    "grpo none": {"model": {"quantization": "none"}},
    "reference, two iterations": {"algorithm": {"name": "grpo", "beta": 0.1}, "optim": {"num_iterations": 2}},
    "ppo, critic": {"algorithm": {"name": "ppo"}},
    "gdpo, directed, lagged": {"algorithm": {"name": "gdpo", "weighting": "directed"}, "memory": {"directions": "lagged"}},
    "gdpo, directed, whole": {"algorithm": {"name": "gdpo", "weighting": "directed"}, "memory": {"directions": "float32"}},
    "gdpo, directed, two passes": {"algorithm": {"name": "gdpo", "weighting": "directed"}, "memory": {"directions": "two_pass"}},
    "tba, replay": {"algorithm": {"name": "tba"}, "replay": {"capacity": 8, "recent": 0.5}},
    "tppo, window": {"algorithm": {"name": "tppo", "ignore_tail": 1}, "rollout": {"window": 3}},
}


class Counted:
    """Two rewards that a rollout's own tokens decide."""

    names, weights = ("low", "varied"), (1.0, 0.5)

    def score(self, rollouts: list[Rollout]) -> list[Rollout]:
        def of(r: Rollout) -> tuple[float, float]:
            return sum(t < 100 for t in r.tokens) / len(r.tokens), len(set(r.tokens)) / len(r.tokens)

        return [replace(r, rewards=(math.nan, math.nan) if r.more else of(r)) for r in rollouts]

    def report(self) -> Report:
        return Report({}, ())


@dataclass
class Bench:
    """A session that can be put back to where it was, and the tokens that went through the model's layers."""

    session: Session
    tokens: int = 0

    def __post_init__(self) -> None:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            self.tokens += kwargs["input_ids"].numel()

        policy = self.session.policy
        policy.model.get_base_model().get_decoder().register_forward_pre_hook(count, with_kwargs=True)
        _, rollouts = self.run_step()                                # so that the optimiser has a past
        self.batch: Batch = collate(rollouts, (1.0, 0.5), 8)
        self._tensors = [(t, t.clone()) for t in self.changing()]
        self._counts = {p: s["step"] for p, s in policy.optimizer.state.items() if isinstance(s["step"], int)}
        self._buffer, self._past, self.step = self.session.buffer.snapshot(), list(policy.past), policy.step
        self._update = None if policy.directions is None else policy.directions.state()

    def changing(self) -> list[Tensor]:
        policy = self.session.policy
        state = [v for s in policy.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [p.detach() for _, p in policy.trainable()] + state

    def restore(self) -> None:
        policy = self.session.policy
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)
        for parameter, count in self._counts.items():
            policy.optimizer.state[parameter]["step"] = count
        self.session.buffer.rollback(self._buffer)
        policy.past.clear()
        policy.past.extend(self._past)
        policy.step, policy.updates = self.step, 0
        policy.drop_gradients()
        if policy.directions is not None and self._update is not None:
            policy.directions.restore(self._update)
        limits = self.session.limits
        limits.micro_batch_tokens, limits.concurrent, limits.retries = None, None, 0
        self.session.engine._live = False  # type: ignore[attr-defined]
        self.session.engine._calls.clear()  # type: ignore[attr-defined]
        self.tokens = 0

    def run_step(self, phases: list[tuple[str, int]] | None = None, memory: Scarce | None = None) -> tuple[Metrics, list[Rollout]]:
        def announce(name: str) -> None:
            if phases is not None and memory is not None:
                phases.append((name, memory.allocations))

        policy = self.session.policy
        metrics, rollouts, _ = one_step(self.session, policy.step, Clock(announce, policy.device), Interrupts())
        return {k: v for k, v in metrics.items() if not k.startswith(WORK) or k == "memory/oom_retries"}, rollouts


def cut_up(sequence_length: Tensor, most: int) -> list[Tensor]:
    """As `MemoryPlan.split` does it, without a plan."""
    order = sequence_length.argsort(descending=True, stable=True)
    return [order[start:end] for start, end in packed(sequence_length[order].tolist(), most)]


def a_bench(folder: Path, case: dict[str, Any], **knobs: Any) -> Bench:
    """A session on the model in that folder, after its first step."""
    values: dict[str, Any] = {
        "model": {"path": str(folder), "quantization": "nf4", "device": "cpu"},
        "data": {"path": "unused.jsonl"},
        "rewards": {"functions": [{"function": "exact_answer"}]},
        "algorithm": {"name": "grpo"},
        "adapter": {"lora_r": 4},
        "optim": {"learning_rate": 1e-3, "max_grad_norm": 0.01},
        "rollout": {"prompts_per_step": 2, "num_generations": 3, "max_completion_length": 8, "concurrent": 4},
    }
    for name, section in case.items():
        values[name] = {**({} if name == "algorithm" else values.get(name, {})), **section}
    run = build(values)
    told = {"micro_batch_tokens": MICRO_BATCH, "concurrent": 4, "head_chunk": 16, "gradient_checkpointing": True, **knobs}
    rewards = Counted()
    algorithm = run.algorithm.for_sampler(exact=True)
    columns = algorithm.reads_before | algorithm.reads_during
    directions = algorithm.directions(rewards.weights)
    kind = "float32" if run.memory.directions == "auto" else run.memory.directions
    plan: Any = SimpleNamespace(micro_batch_tokens=told["micro_batch_tokens"], phases={}, card=Card.of("16GiB", "cpu"))    # what the loop asks of it
    plan.split = partial(cut_up, most=told["micro_batch_tokens"])
    policy = Policy.create(
        run, critic="value" in columns, checkpointing=told["gradient_checkpointing"], head_chunk=told["head_chunk"], directions=directions, kept_as=kind,
    )  # fmt: skip
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:                                         # B starts at 0: give the adapters something to say
            parameter.data.normal_(std=0.05)
    engine = TorchEngine(policy.model, policy.tokenizer, run.rollout.model_copy(update={"concurrent": told["concurrent"]}), run.seed)
    prompts = [Prompt(i, tuple(range(10 * i, 10 * i + 4 + i)), "") for i in range(4)]
    buffer = make_buffer(run, prompts, weights=rewards.weights, reward_names=rewards.names, group_size=algorithm.group_size)
    limits = policy.limits = engine.limits = Limits()
    return Bench(Session(run, algorithm, policy, engine, buffer, rewards, plan, limits))


@contextmanager
def one_thread() -> Iterator[None]:
    """Quick where things are small; and as every failure collects garbage, what torch itself is made of is set aside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        gc.unfreeze()


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    """Largest difference of two lists of tensors, each relative to its own length."""
    return max(float((a.double() - b.double()).norm() / max(b.double().norm(), 1e-12)) for a, b in zip(found, true, strict=True))


def gaps(found: Metrics, true: Metrics) -> dict[str, tuple[float, float]]:
    """Metrics that are not the same, found and true."""
    assert found.keys() == true.keys()
    return {k: (found[k], true[k]) for k in true if not math.isclose(found[k], true[k], rel_tol=1e-5, abs_tol=2e-6) and not math.isnan(true[k])}


class Forced(NamedTuple):
    """A step in which one allocation was refused, against the undisturbed one."""

    number: int
    """Of the allocation, from 1."""
    phase: str
    refused: int
    retries: float
    same_rollouts: bool
    gaps: dict[str, tuple[float, float]]
    """Metrics that differ."""
    distance: float
    """Of weights and of the optimiser's moments, of which the first is the gradient; the largest of any tensor, relative to its length."""
    again: int
    """Tokens that went through the model once more than they had to."""

    def __str__(self) -> str:
        return f"allocation {self.number} ({self.phase}): {self._replace(number=0, phase='')}"


class Undisturbed:
    """A step as it should be, and the same with a refusal wherever one is asked for."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self._phases = bench, list[tuple[str, int]]()
        bench.restore()
        with fail_at(None) as memory:
            self.metrics, self.rollouts = bench.run_step(self._phases, memory)
        self.allocations, self.tokens = memory.allocations, bench.tokens
        self.tensors = [t.clone() for t in bench.changing()]
        if self.metrics.pop("memory/oom_retries"):
            raise RuntimeError("memory ran out where nothing refused any")

    def fail(self, numbers: Iterable[int]) -> Iterator[Forced]:
        """One step for each of these allocations."""
        for number in numbers:
            self.bench.restore()
            with fail_at(number) as scarce:
                metrics, rollouts = self.bench.run_step()
            retries, same = metrics.pop("memory/oom_retries"), [r.tokens for r in rollouts] == [r.tokens for r in self.rollouts]
            phase = [name for name, begin in self._phases if begin < number][-1]
            yield Forced(
                number, phase, scarce.failures, retries, same, gaps(metrics, self.metrics), distance(self.bench.changing(), self.tensors),
                self.bench.tokens - self.tokens,
            )  # fmt: skip
