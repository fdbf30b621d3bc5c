"""What a run leaves behind while it goes: metric lines, completions, evaluations, checkpoints, findings."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.batch import Prompt, Rollout
from localrl.engines import Engine
from localrl.evaluate import completion_rows, evaluate
from localrl.folder import RunFolder, read_lines, verify_checkpoint
from localrl.health import Health
from localrl.memory.reality import Others, Teacher, key
from localrl.metrics import Clock
from localrl.rewards import Rewards
from localrl.settings import UserError
from localrl.train import Session

HEARTBEAT = 5.0
"""Seconds between two heartbeats within a step."""


class Display(Protocol):
    """What a person sees of a run: the terminal's progress, or nothing."""

    def say(self, text: str) -> None: ...
    def phase(self, name: str) -> None: ...
    def part(self, done: int, total: int) -> None: ...
    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class Exam:
    """Held-out evaluation: who samples, who scores, and the prompts. (In training, others may do both.)"""

    engine: Engine
    rewards: Rewards
    prompts: Sequence[Prompt]


class Recorder:
    """Watches the loop (`localrl.train.Watch`) on behalf of the run folder, and passes on what a person may want to see."""

    def __init__(self, session: Session, folder: RunFolder, exam: Exam | None, display: Display) -> None:
        self.session, self.folder, self.exam, self.display = session, folder, exam, display
        self.health = Health(session.rewards.names, session.algorithm, read_lines(folder.path / "metrics.jsonl"))
        self._others = Others(session.policy.device)
        self._teacher = Teacher(key(session.plan.card, session.plan.shape, session.plan.work), display.say)
        self._last_beat = 0.0

    def phase(self, name: str) -> None:
        """The loop enters a phase of its step."""
        self.display.phase(name)
        if time.time() - self._last_beat > HEARTBEAT:
            self.beat("running")

    def step(self, step: int, metrics: dict[str, float], rollouts: list[Rollout], token_weights: Tensor | None) -> None:
        """A step is done: write it down and look at it."""
        run, rewards = self.session.run, self.session.rewards
        report = rewards.report()
        metrics |= report.metrics() | self._others.metrics()
        self._teacher.look(metrics)
        for text in (*report.messages, *self.health.look(metrics)):
            self.display.say(text)
        self.folder.append("metrics.jsonl", {**metrics, "timestamp": time.time()})
        if run.log.completions:
            decode = partial(self.session.policy.tokenizer.batch_decode, skip_special_tokens=True)
            self.folder.write_completions(step, completion_rows(rollouts, rewards.names, rewards.weights, token_weights, decode))
        self.display.step(step, run.steps, metrics)

    def rest(self, step: int) -> None:
        """Between two steps: held-out evaluation and checkpoint where they are due."""
        if self.owes_evaluation(step):
            self.evaluate(step)
        if step == self.session.run.steps or step % self.session.run.log.save_steps == 0:
            self.checkpoint()
        self.beat("running")

    def owes_evaluation(self, step: int) -> bool:
        """Before the first step, after the last, and every so often; not if it was done before the run was stopped."""
        run = self.session.run
        due = step in (0, run.steps) or (run.eval.every > 0 and step % run.eval.every == 0)
        asked = due and run.eval.limit > 0 and self.exam is not None
        return asked and all(row["step"] != step for row in read_lines(self.folder.path / "evaluations.jsonl"))

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out rewards now; one line in evaluations.jsonl."""
        assert self.exam is not None
        run, rewards = self.session.run, self.exam.rewards
        clock = Clock(self.display.phase, self.session.policy.device)
        with clock("evaluation"):
            result = evaluate(self.exam.engine, rewards, self.exam.prompts, run.eval, run.rollout)
        report = rewards.report()
        for text in report.messages:
            self.display.say(text)
        self.folder.append("evaluations.jsonl", {"step": step, **result.metrics, **clock.memory(), "timestamp": time.time()})
        scores = ", ".join(f"{name} {result.metrics[f'eval/rewards/{name}/mean']:.3f}" for name in rewards.names)
        self.display.say(f"held-out after {step} steps: reward {result.metrics['eval/reward']:.3f} ({scores})")
        return result.metrics

    def checkpoint(self) -> None:
        """The state between two steps, complete or not there."""
        session = self.session
        with self.folder.checkpoint(session.policy.step, session.run.log.save_total_limit) as folder:
            session.policy.save(folder)
            save_file({"torch": torch.get_rng_state()}, folder / "rng.safetensors")
            state = {
                "step": session.policy.step, "buffer": session.buffer.state(), "algorithm": session.algorithm.model_dump(mode="json"),
                "limits": session.limits.to_dict(),
            }  # fmt: skip
            (folder / "trainer.json").write_text(json.dumps(state))

    def beat(self, state: Any, message: str = "") -> None:
        """Tell onlookers that this process lives, or how it ended."""
        self._last_beat = time.time()
        self.folder.heartbeat(state, self.session.policy.step, self.session.run.steps, message)


def read_trainer(checkpoint: Path) -> tuple[int, dict[str, Any], Algorithm]:
    """(step, buffer state, calibrated algorithm) of a checkpoint, after its files were checked. Raises UserError if it is damaged."""
    verify_checkpoint(checkpoint)
    try:
        state = json.loads((checkpoint / "trainer.json").read_text())
        algorithm = ALGORITHMS[state["algorithm"]["name"]].model_validate(state["algorithm"])
        return int(state["step"]), state["buffer"], algorithm
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint / 'trainer.json'} cannot be read ({type(error).__name__}): resume from another checkpoint") from None


def read_limits(checkpoint: Path) -> dict[str, int | None]:
    """What running out of memory had taught the run until then; nothing, if the checkpoint was written before there was such a note."""
    limits = json.loads((checkpoint / "trainer.json").read_text()).get("limits", {})
    assert isinstance(limits, dict)
    return limits


def restore_rng(checkpoint: Path) -> None:
    """Torch's random state. (Sampling does not depend on it: its streams are named by seed, step, prompt and position.)"""
    torch.set_rng_state(load_file(checkpoint / "rng.safetensors")["torch"])
