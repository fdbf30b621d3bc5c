"""A whole run in which memory runs out: it goes on, remembers, and where it cannot go on it leaves a checkpoint and a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from localrl.config import load_run
from localrl.folder import read_lines
from localrl.oom import OutOfMemory
from localrl.record import Recorder, read_limits
from localrl.run import resume_run, train_run
from tests.oom import Scarce, fail_at, fragmented
from tests.test_out_of_memory import SMALL, one_thread
from tests.test_training import home, settings

__all__ = ["home"]


class Heard:
    """A display that hears what is said, and in whose first learning phase memory is scarce until the step is over."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._memory: Scarce | None = None
        self._open = ExitStack()

    @contextmanager
    def short_of(self, memory: Scarce) -> Iterator[None]:
        self._memory = memory
        with self._open:
            yield

    def say(self, text: str) -> None:
        self.said.append(text)

    def enough(self) -> None:
        """From here on: files are written from the host's memory, of which there is plenty."""
        self._open.close()

    def phase(self, name: str) -> None:
        if name == "learn" and self._memory is not None:
            self._open.enter_context(self._memory)
            self._memory = None

    def part(self, done: int, total: int) -> None: ...

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.enough()


def test_a_run_goes_on_with_what_it_has_learned(home: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line's settings to the checkpoint and back; a run that cannot go on leaves a checkpoint and a sentence."""

    display = Heard()
    write = Recorder.checkpoint

    def checkpoint(recorder: Recorder) -> None:
        display.enough()
        write(recorder)

    monkeypatch.setattr(Recorder, "checkpoint", checkpoint)
    changes = {"steps": 2, "eval.limit": 0, "model.quantization": "none", "algorithm.name": "grpo"}
    with one_thread():
        run = load_run("demo", None, settings(make_model("llama", **SMALL), **changes))
        with display.short_of(memory := fail_at(120)):
            folder = train_run(run, display)
        assert memory.failures == 1 and any("out of memory while learning" in text for text in display.said), display.said
        assert [row["memory/oom_retries"] for row in read_lines(folder / "metrics.jsonl")] == [1, 0]
        learned = read_limits(folder / "checkpoint-2")
        assert learned["micro_batch_tokens"]
        with display.short_of(fragmented(3000)), pytest.raises(OutOfMemory):
            resume_run(folder, display, steps=4)
        assert (read_limits(folder / "checkpoint-2")["micro_batch_tokens"] or 0) < learned["micro_batch_tokens"]
        state = json.loads((folder / "state.json").read_text())
        assert state["state"] == "failed" and "out of memory while" in state["message"]
        display.said.clear()
        assert resume_run(folder, display, steps=3) == folder
        assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
