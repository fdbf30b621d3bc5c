"""Rollouts, reward files and processes for the tests of this folder."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from localrl.batch import Prompt, Request, Rollout
from localrl.rewards import Rewards, RewardSettings


@pytest.fixture
def rollouts() -> Callable[..., list[Rollout]]:
    """`rollouts(["a", "b"], chat=False, answer=[1, 2])`: one rollout a text, as many tokens as it has characters."""

    def make(texts: Sequence[str], chat: bool = False, **columns: Sequence[Any]) -> list[Rollout]:
        made = []
        for at, text in enumerate(texts):
            content: Any = [{"role": "user", "content": f"question {at}"}] if chat else f"question {at}"
            prompt = Prompt(at, (1, 2), content, {name: values[at] for name, values in columns.items()})
            made.append(Rollout(Request(prompt), tuple(map(ord, text)), text, done=at % 2 == 0, version=0))
        return made

    return make


@pytest.fixture
def reward_file(tmp_path: Path) -> Callable[..., Path]:
    """`reward_file(source, name="mine.py")` writes a file into the base directory."""

    def write(source: str, name: str = "mine.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(source))
        return file

    return write


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Rewards]:
    """`start(function, ..., timeout=5)`: Rewards whose base directory is the one of `reward_file`; what they print goes to `log`."""

    def make(*functions: Any, **settings: Any) -> Rewards:
        given = {"functions": functions, "timeout": 5.0, "start_timeout": 20.0, **settings}
        return Rewards(RewardSettings.model_validate(given), tmp_path, tmp_path / "log")

    return make


@pytest.fixture
def lives() -> Callable[[int], bool]:
    """Whether a process runs; a zombie that nobody has reaped does not."""

    def state(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return state


@pytest.fixture
def soon() -> Callable[[Callable[[], bool]], bool]:
    """Whether a condition comes true within three seconds."""

    def wait(condition: Callable[[], bool]) -> bool:
        until = time.monotonic() + 3
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
        return condition()

    return wait
