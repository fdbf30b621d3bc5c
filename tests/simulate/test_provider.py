"""Lines that travel, lines that are kept, and what makes new ones necessary."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from localrl.config import load_run, presets
from localrl.memory.cards import Card
from localrl.memory.fit import Mode
from localrl.memory.lines import Lines
from localrl.memory.work import Work
from localrl.planning import model_config, plan_on
from localrl.simulate import provider
from localrl.simulate.provider import Simulated, shipped
from tests.simulate.test_simulated_lines import SIZES, a_run

MODE = Mode(True, False, False)


def simulated(algorithm: str = "grpo", dtype: torch.dtype = torch.bfloat16, family: str = "llama", **sizes: Any) -> Simulated:
    return Simulated(AutoConfig.for_model(family, **{**SIZES, **sizes}), a_run("nf4", algorithm), dtype, "cuda")


def a_work(**changes: Any) -> Work:
    """Of the run above."""
    plain = Work("nf4", 2, 4, "all-linear", False, "adamw", 2, 4, 64, 64, False, "cuda", False, 4, False)
    return replace(plain, **changes)


def key(fits: Simulated, monkeypatch: pytest.MonkeyPatch, work: Work | None = None, what: Any = MODE) -> str:
    """Under which lines are looked for; nothing is simulated."""
    asked: list[str] = []
    monkeypatch.setattr(provider, "_read", lambda key: asked.append(key) or dict.fromkeys(("backward", "rollout"), Lines(((),), ((1.0,),))))
    _ = fits.training(work or a_work(), what) if isinstance(what, Mode) else fits.rollout(work or a_work(), what)
    return asked[0]


def test_the_key_is_of_what_changes_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = key(simulated(), monkeypatch)
    same = [key(simulated(num_hidden_layers=30), monkeypatch), key(simulated(_name_or_path="elsewhere", max_position_embeddings=7), monkeypatch),
            key(simulated("gtpo"), monkeypatch), key(simulated("gdpo"), monkeypatch),
            key(simulated(), monkeypatch, a_work(max_completion_length=9999, prompts_per_step=1))]  # fmt: skip
    others = [key(simulated("ppo"), monkeypatch, a_work(critic=True)), key(simulated(hidden_size=256), monkeypatch), key(simulated(vocab_size=9), monkeypatch),
              key(simulated(dtype=torch.float32), monkeypatch), key(simulated(family="qwen2"), monkeypatch),
              *(key(simulated(), monkeypatch, a_work(**change)) for change in (
                  {"quantization": "int8"}, {"lora_r": 8}, {"lora_targets": ("q_proj",)}, {"optimizer": "adamw_8bit"})),
              *(key(simulated(), monkeypatch, what=what) for what in (Mode(True, True, False), Mode(False, False, False), "full", "int8"))]  # fmt: skip
    assert set(same) == {usual} and len({usual, *others}) == 1 + len(others)
    assert key(simulated(), monkeypatch, a_work(critic=True), "full") != key(simulated(), monkeypatch, what="full")


def test_found_once_and_kept_and_a_damaged_file_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRL_CACHE", str(tmp_path))
    said: list[str] = []

    def found() -> dict[str, Any]:
        fits = simulated()
        fits.say = said.append
        return {name: lines.to_dict() for name, lines in fits.training(a_work(), MODE).items()}

    first = found()
    (file,) = (tmp_path / "lines").iterdir()
    assert len(said) == 1 and "llama" in said[0] and found() == first and len(said) == 1
    for damaged in ("", "[]", "{", json.dumps({"backward": {"features": [""], "pieces": [[1, 2]]}}), json.dumps({"backward": 5})):
        file.write_text(damaged, "utf-8")
        assert provider._read(file.stem) is None
    assert found() == first and len(said) == 2 and json.loads(file.read_text("utf-8"))


def test_presets_are_planned_from_lines_that_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not: python -m bench.memory.ship."""
    monkeypatch.setenv("LOCALRL_CACHE", str(tmp_path))
    said: list[str] = []
    for name in presets():
        run = load_run(name)
        plan = plan_on(run, model_config(run), Card.of(run.memory.card or "16GiB", "cuda"), torch.bfloat16, said.append)
        assert plan.fits, name
    assert not said
    files = list(shipped().glob("*.json"))
    assert sum(file.stat().st_size for file in files) < 200_000
    assert json.dumps([json.loads(file.read_text("utf-8")) for file in files])


def test_what_travels_is_what_is_found_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not, other tensors are made than before: count `provider.VERSION` up, and python -m bench.memory.ship."""
    run = load_run("qwen3-8b-16gb")
    config, card = model_config(run), Card.of("16GiB", "cuda")
    before = plan_on(run, config, card, torch.bfloat16)
    monkeypatch.setenv("LOCALRL_CACHE", str(tmp_path))
    monkeypatch.setattr(provider, "shipped", lambda: tmp_path / "none")
    after = plan_on(run, config, card, torch.bfloat16)
    assert list(tmp_path.rglob("*.json")) and after.knobs == before.knobs
    assert after.phases == pytest.approx(before.phases, rel=1e-3)


def test_a_plan_of_8_billion_takes_no_memory_and_no_weights(tmp_path: Path) -> None:
    """The libraries themselves take most of it."""
    code = (
        "import torch; from localrl.config import load_run; from localrl.memory.cards import Card\n"
        "from localrl.planning import model_config, plan_on; import localrl.simulate.provider as p, pathlib; p.shipped = lambda: pathlib.Path('none')\n"
        "run = load_run('llama3.1-8b-16gb')\n"
        "assert plan_on(run, model_config(run), Card.of('16GiB', 'cuda'), torch.bfloat16).fits\n"
        "from localrl.metrics import peak_resident; print(peak_resident())"     # (ru_maxrss would count what forked it)
    )
    environment = {"LOCALRL_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**30
