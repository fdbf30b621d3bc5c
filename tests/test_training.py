"""The whole way on a small real model: train, be killed, resume; and every bad input is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from localrl.cli import main
from localrl.config import build, load_run, presets
from localrl.folder import checkpoints, read_lines, read_run
from localrl.interrupt import Interrupts
from localrl.prepare import anchor, open_rewards, prepare
from localrl.run import assemble
from localrl.train import train
from tests.displays import Silent
from tests.policy.test_policy import hash_of_base

REWARD = '''
import os, psutil, signal
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def vowels(completions, letter, **kwargs):
    """More of the asked letter is better. What stands in the file `order` is done to the trainer at that call."""
    order = Path(__file__).with_name("order")
    calls = int(CALLS.read_text()) + 1 if CALLS.exists() else 1
    CALLS.write_text(str(calls))
    if order.exists():
        at, what = order.read_text().split()
        if calls == int(at):
            trainer = next(p for p in psutil.Process().parents() if "localrl.cli" in p.cmdline())
            os.kill(trainer.pid, getattr(signal, what))
    return [c[0]["content"].count(l) / (1 + len(c[0]["content"])) for c, l in zip(completions, letter)]

def short(completion_ids, **kwargs):
    return [1.0 / len(ids) for ids in completion_ids]
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's working folder: data, a reward of their own, nothing else."""
    rows = [{"prompt": [{"role": "user", "content": f"say {chr(97 + i)}"}], "letter": chr(97 + i)} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(model: Path, **changes: Any) -> list[str]:
    """Command-line overrides of a run that takes a second."""
    values = {
        "model.path": str(model), "model.device": "cpu", "data.path": "data.jsonl", "data.holdout": 2, "steps": 6, "adapter.lora_r": 4,
        "rollout.prompts_per_step": 2, "rollout.num_generations": 4, "rollout.max_completion_length": 8, "optim.learning_rate": 0.01,
        "log.save_steps": 2, "eval.limit": 2, "eval.num_generations": 2, "log.dir": "out", **changes,
    }  # fmt: skip
    lines = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return [*lines, 'rewards.functions=["reward.py:vowels", {function="reward.py:short", weight=0.5}]']


def run_cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "localrl.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Metric lines without what depends on the clock."""
    rows = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per_second", "memory")) and not k.endswith("/seconds")} for row in rows]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The command line, in this process."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["localrl", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_killed_and_resumed_equals_undisturbed(home: Path, make_model: Callable[..., Path], quantization: str) -> None:
    model = make_model("llama")
    arguments = settings(model, **{"model.quantization": quantization, "algorithm.name": "gtpo", "log.save_total_limit": 9})
    straight = run_cli("train", *arguments, 'log.dir="straight"')
    assert straight.returncode == 0, straight.stderr
    (home / "calls").unlink()
    (home / "order").write_text("6 SIGKILL")                          # evaluation, then steps 1 to 5: killed within step 5
    killed = run_cli("train", *arguments, 'log.dir="killed"')
    assert killed.returncode == -signal.SIGKILL
    (home / "order").unlink()
    assert [p.name for p in checkpoints(home / "killed")] == ["checkpoint-2", "checkpoint-4"]
    resumed = run_cli("resume", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(home / "killed") == numbers(home / "straight")
    assert len(numbers(home / "straight")) == 6
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(home / f / "checkpoint-6" / name) for f in ("straight", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for path in (home / "straight" / "completions").iterdir():
        assert path.read_text() == (home / "killed" / "completions" / path.name).read_text()
    first, last = (load_file(home / "straight" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (2, 6))
    assert any(not torch.equal(first[key], last[key]) for key in first)


def test_ctrl_c_ends_with_a_checkpoint_and_goes_on(home: Path, make_model: Callable[..., Path]) -> None:
    arguments = settings(make_model("llama"), **{"model.quantization": "none", "optim.num_iterations": 2})
    assert run_cli("train", *arguments, 'log.dir="straight"').returncode == 0
    (home / "calls").unlink()
    (home / "order").write_text("4 SIGINT")                           # within step 3
    stopped = run_cli("train", *arguments)
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "localrl resume" in stopped.stdout
    (home / "order").unlink()
    assert json.loads((home / "out" / "state.json").read_text())["state"] == "stopped"
    assert checkpoints(home / "out")[-1].name == "checkpoint-2"
    assert run_cli("resume", "out").returncode == 0
    assert numbers(home / "out") == numbers(home / "straight")
    assert json.loads((home / "out" / "state.json").read_text())["state"] == "finished"


def test_an_evaluation_that_was_interrupted_is_made_up_for(home: Path, make_model: Callable[..., Path]) -> None:
    arguments = settings(make_model("llama"), **{"model.quantization": "none", "steps": 2})
    (home / "order").write_text("4 SIGINT")                           # evaluation, two steps, then within the last evaluation
    assert run_cli("train", *arguments).returncode == 130
    (home / "order").unlink()
    assert [row["step"] for row in read_lines(home / "out" / "evaluations.jsonl")] == [0]
    assert checkpoints(home / "out")[-1].name == "checkpoint-2"
    assert run_cli("resume", "out").returncode == 0
    assert [row["step"] for row in read_lines(home / "out" / "evaluations.jsonl")] == [0, 2]
    assert run_cli("resume", "out").returncode == 2


def test_a_run_leaves_what_it_promises(home: Path, make_model: Callable[..., Path], call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", *settings(make_model("qwen2"), **{"algorithm.name": "gdpo", "algorithm.beta": 0.1})) == 0
    out = home / "out"
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    wanted = {"reward", "rewards/vowels/mean", "rewards/short/std", "entropy", "kl", "grad_norm", "completions/mean_length", "frac_reward_zero_std",
              "clip_ratio", "learning_rate", "time/rollout", "tokens_per_second/rollout"}  # fmt: skip
    assert wanted <= set(rows[0])
    assert [row["step"] for row in read_lines(out / "evaluations.jsonl")] == [0, 6]
    completions = read_lines(out / "completions" / "step-000003.jsonl")
    assert len(completions) == 8
    assert set(completions[0]["rewards"]) == {"vowels", "short"}
    assert [p.name for p in checkpoints(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    resolved = (out / "run.toml").read_text()
    assert "epsilon_high" not in resolved or "beta = 0.1" in resolved
    assert 'weight_decay = 0.0' in resolved
    assert json.loads((out / "plan.json").read_text())["phases"]
    assert call("resume", "out") == 2                                 # done already
    assert call("resume", "out", "--steps", "7") == 0
    assert read_run(out).steps == 7                                   # its new length is known next time
    assert read_lines(out / "metrics.jsonl")[-1]["step"] == 7
    assert call("train", *settings(make_model("qwen2"))) == 2         # folder in use
    assert "in use" in capsys.readouterr().err


def test_training_never_touches_the_base(home: Path, make_model: Callable[..., Path]) -> None:
    class Nobody:
        def phase(self, name: str) -> None: ...
        def step(self, *_: object) -> None: ...
        def rest(self, step: int) -> None: ...

    run = anchor(load_run("demo", None, settings(make_model("llama"), **{"steps": 2, "algorithm.name": "grpo"})), home)
    prepared = prepare(run, print)
    with open_rewards(run, prepared.data) as rewards, assemble(prepared, rewards, Silent()) as room:
        session = room.session
        before = hash_of_base(session.policy)
        adapters = {n: p.detach().clone() for n, p in session.policy.trainable()}
        with Interrupts() as interrupts:
            train(session, Nobody(), interrupts)
        assert hash_of_base(session.policy) == before
        assert any(not torch.equal(p, adapters[n]) for n, p in session.policy.trainable())


@pytest.mark.parametrize("preset", [name for name in presets() if name != "demo"])
def test_every_preset_takes_two_steps_on_a_small_model_of_its_family(
    preset: str, home: Path, make_model: Callable[..., Path], call: Callable[..., int]
) -> None:
    run = load_run(preset)
    family = "qwen3" if "Qwen3" in run.model.path else "llama"
    data = 'data.path="data.jsonl"', "data.holdout=2", 'model.device="cpu"', "rollout.max_completion_length=8", "rollout.num_generations=2"
    rewards = 'rewards.functions=["reward.py:vowels", "reward.py:short"]'
    small = f'model.path="{make_model(family)}"', "steps=2", "eval.limit=2", 'log.dir="out"', "rollout.prompts_per_step=2", rewards
    assert call("train", "--preset", preset, *data, *small, 'memory.card="8GiB"') == 0
    assert len(read_lines(home / "out" / "metrics.jsonl")) == 2
    assert checkpoints(home / "out")[-1].name == "checkpoint-2"


BAD = {
    "missing column": (["data.prompt_column=question"], "question"),
    "no data": (['data.path="empty.jsonl"'], "empty"),
    "no file": (['data.path="nowhere.jsonl"'], "nowhere.jsonl"),
    "bad row": (['data.path="bad.jsonl"'], "2"),
    "long prompt": (["data.max_prompt_length=5"], "max_prompt_length"),
    "wrong reward file": (['rewards.functions=["nothing.py:f"]'], "nothing.py"),
    "wrong reward function": (['rewards.functions=["reward.py:vowel"]'], "vowels"),
    "wrong reward name": (['rewards.functions=["numeric_anser"]'], "numeric_answer"),
    "column for a reward": (['rewards.functions=["exact_answer"]'], "answer"),
    "unknown key": (["rollout.temprature=1"], "temperature"),
    "unknown algorithm": (["algorithm.name=gtop"], "gtpo"),
    "dropout": (["adapter.lora_dropout=0.1"], "dropout"),
    "group of one": (["rollout.num_generations=1"], "num_generations"),
    "model folder": (['model.path="./nowhere"'], "nowhere"),
    "modules": (['adapter.lora_target_modules=["q_projj"]'], "q_proj"),
    "card too small": (['memory.card="0.1GiB"'], "the machine has 102 MiB"),
    "unknown card": (['memory.card="RTX 40800"'], "4080"),
    "used folder": (['log.dir="."'], "in use"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(
    case: str, home: Path, make_model: Callable[..., Path], call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "empty.jsonl").write_text("")
    (home / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    before = sorted(p.name for p in home.iterdir())
    changes, word = BAD[case]
    assert call("train", *settings(make_model("llama")), *changes) == 2
    error = capsys.readouterr().err
    assert word in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in home.iterdir()) == before


def test_a_model_folder_without_tokenizer(home: Path, make_model: Callable[..., Path], call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(make_model("llama"), home / "model", ignore=shutil.ignore_patterns("token*"))
    assert call("train", *settings(home / "model")) == 2
    assert "tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, home: Path, make_model: Callable[..., Path], call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", *settings(make_model("llama"), steps=2, **{"eval.limit": 0})) == 0
    file = home / "out" / "checkpoint-2" / ("manifest.json" if damage == "manifest" else "adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        content[-1] ^= 255
        file.write_bytes(content)
    else:
        file.write_bytes(content[:50])
    lines = (home / "out" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert call("resume", "out", "--steps", "4") == 2
    error = capsys.readouterr().err
    assert "another" in error
    assert "Traceback" not in error
    assert (home / "out" / "metrics.jsonl").read_text() == lines


def test_a_dry_run_writes_nothing(home: Path, make_model: Callable[..., Path], call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in home.iterdir())
    assert call("train", *settings(make_model("llama")), "--dry-run") == 0
    assert sorted(p.name for p in home.iterdir() if p.name != "calls") == before
    assert "say" in capsys.readouterr().out


def test_settings_survive_the_run_folder() -> None:
    for name in presets():
        run = load_run(name)
        assert build(tomllib.loads(run.dump())) == run
