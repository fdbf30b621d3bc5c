"""Every way of getting rollouts, the whole way on a small real model: windows, replay, logs, searchers; and gradients kept apart."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from localrl.algorithms.tppo import TPPO
from localrl.config import load_run
from localrl.folder import read_lines
from localrl.settings import UserError
from tests.test_training import call, home, numbers, run_cli, settings  # noqa: F401  (fixtures)

WAYS: dict[str, dict[str, Any]] = {
    "windows": {"algorithm.name": "tppo", "rollout.window": 3, "algorithm.ignore_tail": 1, "algorithm.critic_warmup": 1},
    "replay": {"algorithm.name": "tba", "replay.capacity": 8, "replay.sync_every": 2, "algorithm.beta": 0.1},
    "stale, corrected": {"algorithm.name": "grpo", "replay.capacity": 8, "replay.sync_every": 3, "replay.recent": 1.0},
    "dynamic": {"algorithm.name": "grpo", "rollout.dynamic_sampling": True, "optim.num_iterations": 2},
    "directed, lagged": {"algorithm.name": "gdpo", "algorithm.weighting": "directed", "memory.directions": "lagged"},
    "directed, two passes, off policy": {"algorithm.name": "gdpo", "algorithm.weighting": "directed", "memory.directions": "two_pass",
                                         "optim.num_iterations": 2, "algorithm.beta": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_equals_undisturbed(way: str, home: Path, make_model: Callable[..., Path]) -> None:  # noqa: F811
    arguments = settings(make_model("llama"), **WAYS[way], **{"eval.limit": 0, "log.save_total_limit": 9})
    straight = run_cli("train", *arguments, 'log.dir="straight"')
    assert straight.returncode == 0, straight.stderr
    calls = int((home / "calls").read_text())
    (home / "calls").unlink()
    (home / "order").write_text(f"{calls} SIGKILL")
    assert run_cli("train", *arguments, 'log.dir="killed"').returncode == -signal.SIGKILL
    (home / "order").unlink()
    resumed = run_cli("resume", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(home / "killed") == numbers(home / "straight")
    one, other = (load_file(home / f / "checkpoint-6" / "adapter_model.safetensors") for f in ("straight", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    first = load_file(home / "straight" / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(first[key], one[key]) for key in first)


def test_one_long_window_is_ppo(home: Path, make_model: Callable[..., Path], call: Callable[..., int]) -> None:  # noqa: F811
    common = {"optim.num_iterations": 2, "algorithm.critic_warmup": 1, "algorithm.ignore_tail": 1}
    own = {f"algorithm.{k}": v for k, v in TPPO().model_dump().items() if k != "name" and f"algorithm.{k}" not in common}
    model = make_model("qwen3")
    assert call("train", *settings(model, **common, **{"algorithm.name": "tppo", "rollout.window": 8, "log.dir": "tppo"})) == 0
    assert call("train", *settings(model, **common, **own, **{"algorithm.name": "ppo", "log.dir": "ppo"})) == 0

    def shared(name: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not k.startswith("buffer/")} for row in numbers(home / name)]

    assert shared("tppo") == shared("ppo")
    assert shared("ppo")[-1]["critic_grad_norm"] > 0


def test_a_log_teaches_without_a_rollout(home: Path, make_model: Callable[..., Path], call: Callable[..., int]) -> None:  # noqa: F811
    """The completions that one run wrote are another run's data."""
    model = make_model("llama")
    assert call("train", *settings(model, **{"algorithm.name": "grpo", "log.dir": "source"})) == 0
    rows = [row for step in range(1, 7) for row in read_lines(home / "source" / "completions" / f"step-{step:06d}.jsonl")]
    (home / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["completion"]))
    change = ("steps=3", "rollout.prompts_per_step=4", "optim.learning_rate=0.01", f'model.path="{model}"', 'model.device="cpu"', "adapter.lora_r=4")
    assert call("train", "--from-log", "log.jsonl", *change, 'log.dir="out"') == 0
    metrics = read_lines(home / "out" / "metrics.jsonl")
    assert len(metrics) == 3
    assert all("rollout/tokens" not in row or row["rollout/tokens"] == 0 for row in metrics)
    assert all(row["grad_norm"] > 0 for row in metrics)
    assert {"rewards/vowels/mean", "rewards/short/mean", "tbrm/residual"} <= set(metrics[0])
    assert call("resume", "out", "--steps", "5") == 0
    assert len(read_lines(home / "out" / "metrics.jsonl")) == 5


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ({"prompt": "a", "response": "b"}, "no reward"),
        ({"prompt": "a", "response": "b", "reward": "much"}, "must be a number"),
        ({"prompt": "a", "reward": 1.0}, "response"),
        ({"prompt": "a", "response": "", "reward": 1.0}, "empty"),
    ],
)
def test_a_bad_log_is_one_sentence(
    line: dict[str, Any], word: str, home: Path, make_model: Callable[..., Path], call: Callable[..., int],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (home / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert call("train", "--from-log", "log.jsonl", f'model.path="{make_model("llama")}"', 'log.dir="out"') == 2
    assert word in capsys.readouterr().err
    assert not (home / "out").exists()


def test_searchers_sample_while_the_trainer_learns(home: Path, make_model: Callable[..., Path]) -> None:  # noqa: F811
    changes = {"algorithm.name": "tba", "replay.capacity": 16, "search.processes": 1, "steps": 5, "algorithm.beta": 0.1}
    done = run_cli("train", *settings(make_model("llama"), **changes))
    assert done.returncode == 0, done.stderr
    rows = read_lines(home / "out" / "metrics.jsonl")
    assert len(rows) == 5
    assert all(row["rollout/searchers_alive"] == 1 for row in rows)
    assert all(row["buffer/staleness/max"] >= 0 for row in rows)
    assert len(read_lines(home / "out" / "evaluations.jsonl")) == 2


def test_foreign_samples_are_weighed(home: Path, make_model: Callable[..., Path], call: Callable[..., int]) -> None:  # noqa: F811
    model, changes = make_model("llama"), {"algorithm.name": "grpo", "replay.capacity": 8, "replay.sync_every": 3, "replay.recent": 1.0}
    assert call("train", *settings(model, **changes, **{"log.dir": "auto"})) == 0
    assert call("train", *settings(model, **changes, **{"log.dir": "none", "algorithm.correction": "none"})) == 0
    auto, none = (numbers(home / name) for name in ("auto", "none"))
    assert auto[0]["grad_norm"] == pytest.approx(none[0]["grad_norm"], rel=1e-5)        # fresh: every weight is 1
    assert [row["sampler/age"] for row in auto[:3]] == [0, 1, 2]
    assert auto[1]["sampler/mean_difference"] > 1e-6 > auto[0]["sampler/mean_difference"]
    assert [row["grad_norm"] for row in auto[1:]] != [row["grad_norm"] for row in none[1:]]


def test_the_order_of_overrides_does_not_matter() -> None:
    lines = ["algorithm.name=tba", "algorithm.beta=0.3"]
    one, other = (load_run("demo", None, order).algorithm for order in (lines, lines[::-1]))
    assert one == other
    assert one.model_dump()["beta"] == 0.3


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["algorithm.name=tppo"], "rollout.window"),
        (["algorithm.name=grpo", "rollout.window=4"], "tppo"),
        (["algorithm.name=tppo", "rollout.window=8"], "ignore_tail"),
        (["algorithm.name=grpo", "data.from_log=true"], "tbrm"),
        (["algorithm.name=tba", "search.processes=1"], "replay.capacity"),
        (["algorithm.name=tba", "data.from_log=true", "replay.capacity=4"], "samples nothing"),
        (["algorithm.name=tppo", "rollout.window=16", "replay.capacity=4"], "leave one of them out"),
        (["algorithm.name=grpo", "rollout.dynamic_sampling=true", "replay.capacity=4"], "leave one of them out"),
        (["algorithm.name=gdpo", 'algorithm.weighting="directed"', 'algorithm.normalise="tokens"'], "normalise=completions"),
        (["rollout.num_generations=1", "algorithm.name=tba"], "at least 2"),
        (["algorithm.name=tba", "replay.capacity=4", 'replay.filters=[{reward="fame"}]'], "no reward 'fame'"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_loads(changes: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        load_run("demo", None, changes)


def test_a_condition_on_a_reward(home: Path, make_model: Callable[..., Path], call: Callable[..., int]) -> None:  # noqa: F811
    spec = 'rewards.functions=[{function="reward.py:vowels"}, {function="reward.py:short", given="vowels", at_least=0.2}]'
    assert call("train", *settings(make_model("llama"), **{"algorithm.name": "gdpo", "steps": 1})[:-1], spec) == 0
    rows = read_lines(home / "out" / "completions" / "step-000001.jsonl")
    assert all((row["rewards"]["short"] > 0) == (row["rewards"]["vowels"] >= 0.2) for row in rows)
    assert call("train", *settings(make_model("llama"))[:-1], spec.replace('given="vowels"', 'given="fame"')) == 2


def test_token_weights_are_kept_for_display(home: Path, make_model: Callable[..., Path], call: Callable[..., int]) -> None:  # noqa: F811
    assert call("train", *settings(make_model("llama"), **{"algorithm.name": "gtpo", "steps": 1})) == 0
    rows = read_lines(home / "out" / "completions" / "step-000001.jsonl")
    assert all(len(row["token_weights"]) == len(row["token_ids"]) == row["tokens"] for row in rows)
    assert {weight for row in rows for weight in row["token_weights"]} <= {0.0, 1.0, 2.0}


def test_directed_weights_that_need_no_change_make_the_published_update(
    home: Path, make_model: Callable[..., Path], call: Callable[..., int]  # noqa: F811
) -> None:
    """Two rewards that agree entirely: nothing to balance."""
    (home / "own.py").write_text("def spread(completions, **_):\n    return [len(set(c[0]['content'])) / 10 for c in completions]\n")
    spec, model = 'rewards.functions=[{function="own.py:spread", name="a"}, {function="own.py:spread", name="b", weight=0.5}]', make_model("qwen2")
    for name in ("fixed", "directed"):
        changes = {"algorithm.name": "gdpo", "algorithm.weighting": name, "steps": 3, "log.dir": name, "eval.limit": 0}
        assert call("train", *settings(model, **changes)[:-1], spec) == 0
    rows = [row for row in numbers(home / "directed") if row["steering/norm"] > 0]
    assert rows
    assert all(row["steering/state"] == 0 and row["steering/dispersion"] == pytest.approx(1) for row in rows)
    one, other = (load_file(home / f / "checkpoint-3" / "adapter_model.safetensors") for f in ("fixed", "directed"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)
