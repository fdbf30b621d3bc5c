"""The worst case tried before the first step: measured, written down, and of no effect on what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from localrl.config import load_run
from localrl.folder import read_lines
from localrl.metrics import Clock
from localrl.prepare import open_rewards, prepare
from localrl.probe import in_words, probe
from localrl.run import Room, assemble
from tests.oom import fail_at
from tests.test_training import Silent, call, home, settings  # noqa: F401  (fixtures)

SAME = ("reward", "loss", "grad_norm", "entropy", "completions/mean_length")


@contextmanager
def a_room(arguments: list[str]) -> Iterator[Room]:
    prepared = prepare(load_run(overrides=arguments), lambda text: None)
    with open_rewards(prepared.run, prepared.data) as judges, assemble(prepared, judges, Silent()) as room:
        yield room


def test_it_measures_and_changes_nothing(home: Path, make_model: Callable[..., Path], call: Callable[..., int]) -> None:  # noqa: F811
    for name, tried in (("with", "true"), ("without", "false")):
        arguments: dict[str, Any] = {"memory.probe": tried, "steps": 2, "log.dir": name}
        assert call("train", *settings(make_model("llama"), **arguments)) == 0
    rows = [read_lines(home / name / "metrics.jsonl") for name in ("with", "without")]
    assert [[row[key] for key in SAME] for row in rows[0]] == [[row[key] for key in SAME] for row in rows[1]]
    measured = json.loads((home / "with" / "plan.json").read_text())["measured"]
    assert measured["memory/learn"] > 0
    assert measured["memory/rollout_ratio"] > 0                       # of this process, which holds more than the run
    assert json.loads((home / "without" / "plan.json").read_text())["measured"] is None


def test_where_it_runs_out_limits_shrink_before_the_first_step(home: Path, make_model: Callable[..., Path]) -> None:  # noqa: F811
    """At allocations all along: the probe goes on with less, and leaves nothing behind."""
    with a_room(settings(make_model("llama"), **{"algorithm.name": "grpo", "data.max_prompt_length": 24})) as room:
        session, learned = room.session, set[str]()
        with fail_at(None) as counted:
            try_it(room)
        for number in range(1, counted.allocations, max(1, counted.allocations // 17)):
            session.limits.micro_batch_tokens = session.limits.concurrent = None
            with fail_at(number) as memory:
                metrics = try_it(room)
            assert memory.failures == 1
            assert "planned" in in_words(metrics) or "cannot be measured" in in_words(metrics)
            assert all(p.grad is None for _, p in session.policy.trainable())
            learned |= {name for name, value in session.limits.to_dict().items() if value is not None}
        assert learned == {"micro_batch_tokens", "concurrent"}


def try_it(room: Room) -> dict[str, float]:
    return probe(room.session, room.own, Clock(lambda phase: None, torch.device("cpu")))
