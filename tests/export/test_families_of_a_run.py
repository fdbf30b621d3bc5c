"""A whole run of a model with fused projections: trained, sampled by llama.cpp, merged in two ways, exported merged and as an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from localrl.config import load_run
from localrl.outcome import export_files
from localrl.run import train_run
from tests.displays import Silent


def test_from_training_to_files(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {chr(97 + i)}"}) + "\n" for i in range(12)))
    (tmp_path / "reward.py").write_text("def short(completion_ids, **kwargs):\n    return [1.0 / len(set(ids)) for ids in completion_ids]\n")
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "model.path": str(make_model("phi3", pad_token_id=0)), "model.device": "cpu", "data.path": "data.jsonl", "adapter.lora_r": 4, "steps": 1,
        "rollout.prompts_per_step": 2, "rollout.num_generations": 4, "rollout.max_completion_length": 24, "rollout.engine": "llama_cpp",
        "rollout.threads": 1, "optim.learning_rate": 0.01, "eval.limit": 0, "export.gguf": "required", "log.dir": "run",
    }  # fmt: skip
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    folder = train_run(load_run(overrides=[*words, "algorithm.name=grpo", 'rewards.functions=["reward.py:short"]']), Silent())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.99 < last["sampler/ess"] <= 1.0 and last["sampler/mean_difference"] < 0.05  # the trainer re-reads what llama.cpp sampled
    (merged,) = export_files(folder, Silent(), dtypes=["q8_0"], merge="auto")
    assert any("Held-out reward of the two merges" in note for note in merged.report.notes)
    (small,) = export_files(folder, Silent(), what="adapter", dtypes=["f32"])
    for done in (merged, small):
        assert GGUFReader(done.path).fields["general.architecture"].contents() == "phi3"
        assert {row.name: row.passed for row in done.report.checks}["reward"]
