"""What a run that cannot learn is told, and that it is told once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from localrl.algorithms.grpo import GRPO
from localrl.config import load_run
from localrl.health import PATIENCE, Health
from localrl.settings import UserError

FINE = {"step": 1.0, "entropy": 0.5, "frac_reward_zero_std": 0.1, "grad_norm": 1.0, "rewards/a/mean": 0.4}


@pytest.mark.parametrize(
    ("wrong", "word", "steps"),
    [
        ({"frac_reward_zero_std": 1.0}, "same reward", PATIENCE),
        ({"frac_reward_zero_std": 1.0, "frac_reward_cancelling": 0.8}, "cancel", PATIENCE),
        ({"grad_norm": math.nan}, "not finite", 1),
        ({"completions/clipped_ratio": 1.0}, "max_completion_length", 1),
        ({"frac_unscored": 1.0}, "any reward", 1),
        ({"completions/unfinished": 1.0}, "beyond its window", PATIENCE),
    ],
)
def test_a_finding_comes_when_it_is_sure_and_only_once(wrong: dict[str, float], word: str, steps: int) -> None:
    health = Health(["a"], GRPO())
    said = [health.look(FINE | wrong) for _ in range(3 * PATIENCE)]
    assert [bool(s) for s in said].index(True) == steps - 1
    assert sum(word in text for s in said for text in s) == 1


def test_a_healthy_run_hears_nothing() -> None:
    health = Health(["a"], GRPO())
    assert not [text for _ in range(20) for text in health.look(FINE)]


def test_entropy_collapse_is_measured_against_the_start() -> None:
    health = Health(["a"], GRPO())
    assert not health.look(FINE)
    said = [text for _ in range(PATIENCE) for text in health.look(FINE | {"entropy": 0.01})]
    assert len(said) == 1
    assert "0.500 to 0.010" in said[0]


def test_presets_override_and_refuse(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('[rollout]\ntemperature = 0.7\n[data]\npath = "mine.jsonl"\n')
    run = load_run("qwen3-8b-16gb", config, ["rollout.num_generations=4", "algorithm.name=grpo"])
    assert (run.rollout.temperature, run.rollout.num_generations, run.algorithm.name) == (0.7, 4, "grpo")
    assert run.data.path == "mine.jsonl"
    assert run.data.rename == {}                                   # the preset's data set is not described any more
    assert run.data.system_prompt
    with pytest.raises(UserError, match="did you mean 'gamma'"):
        load_run("demo", None, ["algorithm.gama=1"])
