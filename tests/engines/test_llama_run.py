"""Whole runs that llama.cpp samples for: killed and resumed, chosen by trial, corrected, and refused where nothing could be corrected."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llama_cpp")

from localrl.batch import Prompt, Request, Rollout, collate
from localrl.config import build, load_run
from localrl.engines.choice import Chosen, kept
from localrl.folder import read_lines
from localrl.health import Health
from localrl.memory.llama import gpu_layers, kind_for, llama_bytes
from localrl.memory.shape import ModelShape
from localrl.metrics import mismatch
from localrl.run import resume_run, train_run
from localrl.settings import UserError
from localrl.train import Drifted, check_sampler
from tests.displays import Silent

WORDS = {"model.device": "cpu", "data.path": "data.jsonl", "data.holdout": 2, "adapter.lora_r": 4, "rollout.prompts_per_step": 2,
         "rollout.num_generations": 4, "rollout.max_completion_length": 8, "optim.learning_rate": 0.01, "log.save_steps": 2, "eval.limit": 0}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]) -> Callable[..., Path]:
    """run("folder", **settings) -> the run folder of four steps."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {chr(97 + i)}"}) + "\n" for i in range(12)))
    (tmp_path / "reward.py").write_text("def short(completion_ids, **kwargs):\n    return [1.0 / len(set(ids)) for ids in completion_ids]\n")
    monkeypatch.chdir(tmp_path)

    def go(folder: str, display: Silent | None = None, **settings: Any) -> Path:
        values = {**WORDS, "model.path": str(make_model("llama")), "log.dir": folder, "steps": 4, **settings}
        lines = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        return train_run(load_run(overrides=[*lines, "algorithm.name=grpo" if "algorithm.name" not in settings else "seed=0",
                                             'rewards.functions=["reward.py:short"]']), display or Silent())  # fmt: skip

    return go


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Metric lines without what depends on the clock."""
    clock = ("time", "tokens_per_second/", "memory/", "rollout/sync", "rewards/short/seconds")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in read_lines(folder / "metrics.jsonl")]


def test_a_resumed_run_comes_to_the_same_numbers(run: Callable[..., Path]) -> None:
    whole = run("whole", **{"rollout.engine": "llama_cpp", "rollout.threads": 1})
    part = run("part", **{"rollout.engine": "llama_cpp", "rollout.threads": 1, "steps": 2})
    assert kept(part) == Chosen("llama_cpp", "q8_0", "as set")
    resume_run(part, Silent(), steps=4)
    assert numbers(part) == numbers(whole)
    row = numbers(whole)[-1]
    assert 0 < row["sampler/mean_difference"] < row["sampler/p99_difference"] < 0.5 and 0.95 < row["sampler/ess"] <= 1 and row["sampler/age"] == 0
    assert read_lines(whole / "metrics.jsonl")[-1]["time/scoring"] > 0


def test_auto_tries_both_and_a_resumed_run_keeps_the_answer(run: Callable[..., Path]) -> None:
    display = Silent()
    folder = run("auto", display, **{"rollout.engine": "auto", "steps": 1})
    assert any("tokens/s" in text for text in display.said)
    other: dict[str, Any] = {"engine": "llama_cpp", "gguf": "f16", "why": "a test"}
    (folder / "engine.json").write_text(json.dumps(other))
    resume_run(folder, Silent(), steps=2)
    assert kept(folder) == Chosen(**other)
    assert "rollout/threads" in numbers(folder)[-1]


def test_auto_without_llama_cpp_is_torch_and_says_why(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)              # as where it is not installed
    display = Silent()
    folder = run("without", display, **{"rollout.engine": "auto", "steps": 1})
    chosen = kept(folder)
    assert chosen is not None and chosen.engine == "torch" and "pip install" in chosen.why
    assert any("torch samples" in text and "pip install" in text for text in display.said)
    assert "rollout/threads" not in numbers(folder)[-1] and numbers(folder)[-1]["sampler/ess"] > 0.999, "the policy itself samples"
    with pytest.raises(UserError, match="pip install"):
        run("by name", **{"rollout.engine": "llama_cpp"})
    assert not Path("by name").exists()


def test_masked_tokens_are_not_learned_from(run: Callable[..., Path]) -> None:
    """A cap within the gap: some of the tokens are left out, as the figures say, and the run is another one than with truncated weights."""
    settings = {"rollout.engine": "llama_cpp", "steps": 2, "algorithm.name": "grpo", "algorithm.correction_cap": 1.001}
    masked, truncated = (numbers(run(kind, **settings, **{"algorithm.correction": kind}))[-1] for kind in ("mask", "truncate"))
    assert masked["sampler/mean_difference"] > 0 and masked["loss"] != truncated["loss"]


def test_searchers_sample_with_it(run: Callable[..., Path]) -> None:
    settings = {"algorithm.name": "tba", "replay.capacity": 8, "search.processes": 1, "rollout.engine": "llama_cpp", "steps": 2}
    assert [row["step"] for row in numbers(run("search", **settings))] == [1, 2]


def gap(shift: list[float]) -> dict[str, float]:
    """Of one rollout whose tokens are so much likelier (nats) under the policy."""
    rollout = Rollout(Request(Prompt(0, (1,), "")), (5,) * len(shift), "", True, 0, (-1.0,) * len(shift), (1.0,))
    return mismatch(collate([rollout], [1.0], 64), torch.tensor([shift]) - 1)


def test_the_gaps_figures() -> None:
    assert gap([0.0] * 10) == {"sampler/mean_difference": 0, "sampler/p99_difference": 0, "sampler/kl": 0, "sampler/ess": 1, "sampler/age": 0}
    found = gap([1.0, 0.0, 0.0, 0.0])
    e = 2.718281828
    assert found["sampler/mean_difference"] == pytest.approx(0.25) and found["sampler/p99_difference"] == pytest.approx(1.0)
    assert found["sampler/kl"] == pytest.approx((e - 2) / 4, abs=1e-6)
    assert found["sampler/ess"] == pytest.approx((3 + e) ** 2 / (4 * (3 + e * e)), abs=1e-6)


def test_too_far_from_the_policy_is_said_and_further_is_not_learned_from() -> None:
    health = Health(["a"], build({"data": {"path": "x"}, "rewards": {"functions": ["numeric_answer"]}, "algorithm": {"name": "grpo"}}).algorithm)
    near, far, lost = gap([0.05, -0.05] * 8), gap([0.3, -0.3] * 8), gap([3.0, *[-0.5] * 15])
    assert not health.look({"step": 1.0, **near})
    [said] = health.look({"step": 2.0, **far})
    assert "0.3 nats" in said and not health.look({"step": 3.0, **far})
    check_sampler(far)
    with pytest.raises(Drifted, match=r"engine=torch"):
        check_sampler(lost)
    check_sampler({**lost, "sampler/age": 2.0})                      # older policies are another matter
    check_sampler({})


def test_what_it_takes() -> None:
    shape = ModelShape.read({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256})  # fmt: skip
    q8, q4 = (llama_bytes(shape, kind, 16, 1024) for kind in ("q8_0", "q4_k_m"))
    assert 8.5e9 < q4 + 2e9 < q8 < 1.2e10
    assert kind_for(shape, 16, 1024, q8) == "q8_0" and kind_for(shape, 16, 1024, q8 - 1) == "q4_k_m"
    assert gpu_layers(shape, "q8_0", 16, 1024, q8) == 33 and gpu_layers(shape, "q8_0", 16, 1024, 0) == 0
    assert 10 < gpu_layers(shape, "q8_0", 16, 1024, q8 // 2) < 20
