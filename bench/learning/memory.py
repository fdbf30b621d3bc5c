"""Live bytes of a learning step, beyond what is there before it: tensor storages watched while the real step runs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.learning.trials import COMMON
from localrl.config import load_run
from localrl.interrupt import Interrupts
from localrl.prepare import anchor, open_rewards, prepare
from localrl.run import assemble
from localrl.train import train
from tests.memory.tracker import StorageTracker


class Watching:
    """Runs steps and measures the last one's learning phases."""

    def __init__(self, tracker: StorageTracker) -> None:
        self.tracker = tracker
        self.phase_now, self.base, self.peak = "", 0, 0

    def phase(self, name: str) -> None:
        """At the start of scoring the count begins; rollouts and rewards do not count."""
        if name == "scoring":
            gc.collect()
            self.base = self.tracker.peak = self.tracker.now

    def step(self, *_: object) -> None:
        """Peak since scoring began, over what was there."""
        self.peak = self.tracker.peak - self.base

    def rest(self, step: int) -> None: ...
    def say(self, text: str) -> None: ...
    def part(self, done: int, total: int) -> None: ...


def learning_peak(settings: Sequence[str], steps: int = 2) -> float:
    """Bytes at the fullest moment of scoring, learning and update, in the last of a few steps."""
    torch.set_num_threads(1)
    run = anchor(load_run("demo", None, [*COMMON[1:], *settings, f"steps={steps}", "eval.limit=0"]), Path.cwd())
    prepared = prepare(run, lambda text: None)
    with StorageTracker() as tracker, open_rewards(run, prepared.data) as judges:
        watch = Watching(tracker)
        with assemble(prepared, judges, watch, run.algorithm) as room, Interrupts() as interrupts:  # type: ignore[arg-type]
            train(room.session, watch, interrupts)
    return float(watch.peak)
