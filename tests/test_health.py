"""What a run that cannot learn is told, and that it is told once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from localrl.algorithms.grpo import GRPO
from localrl.config import load_run
from localrl.health import LEAK_STEPS, PATIENCE, Health
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


GIB = 2**30


def memory(phase: str, held: float, planned: float, reserved: bool = True) -> dict[str, float]:
    """A step that held so many GiB."""
    told = {f"memory/{phase}": held * GIB, f"memory/{phase}_planned": planned * GIB, f"memory/{phase}_ratio": held / planned}
    return FINE | told | ({f"memory/{phase}_reserved": 1.1 * held * GIB} if reserved else {})


@pytest.mark.parametrize(("ratio", "reserved", "said"), [(1.04, True, 0), (1.06, True, 1), (1.2, False, 0), (1.3, False, 1)])
def test_a_phase_that_outgrows_its_plan_is_told_once(ratio: float, reserved: bool, said: int) -> None:
    health = Health(["a"], GRPO())
    texts = [text for _ in range(3) for text in health.look(memory("learn", 10 * ratio, 10, reserved))]
    assert len(texts) == said and all(f"{10 * ratio:.2f} GiB" in text and "10.00 GiB" in text for text in texts)
    assert len(health.look(memory("rollout", 10 * ratio, 10, reserved))) == said          # every phase has a word of its own


def test_memory_that_rises_with_every_step_is_a_leak() -> None:
    health = Health(["a"], GRPO())
    texts = [health.look(memory("learn", 5 + 0.02 * step, 10)) for step in range(30)]
    assert [bool(t) for t in texts].index(True) == LEAK_STEPS and sum(map(len, texts)) == 1
    assert "has risen with each of the last 10 steps, from 5.00 to 5.20 GiB" in texts[LEAK_STEPS][0]


@pytest.mark.parametrize("held", [lambda step: 5.0, lambda step: 5 + 0.02 * step - (step % 5 == 0), lambda step: 5 + 0.001 * step])
def test_memory_that_stays_or_sways_is_none(held: Callable[[int], float]) -> None:
    health = Health(["a"], GRPO())
    assert not [text for step in range(30) for text in health.look(memory("learn", held(step), 10))]


def test_another_program_on_the_card_is_named_with_its_bytes() -> None:
    health = Health(["a"], GRPO())
    assert not health.look(FINE | {"memory/others": 0.4 * GIB})
    (text,) = health.look(FINE | {"memory/others": 1.2 * GIB})
    assert "another program took 1.2 GiB of the card since the start" in text
    assert not health.look(FINE | {"memory/others": 1.3 * GIB})
