"""With the embedded model: samples that are kept, gradients that are those of a training step, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from localrl.batch import Readout
from localrl.config import Run, load_run
from localrl.lab.bench import try_rewards
from localrl.lab.numbers import advantages, steered
from localrl.lab.sampling import CACHE
from localrl.lab.trial import Trial
from localrl.prepare import open_rewards, prepare
from localrl.run import assemble
from localrl.settings import UserError
from localrl.train import laid_out, learn
from tests.displays import Silent

SMALL = ["rollout.prompts_per_step=4", "rollout.num_generations=4", "memory.directions='float32'", "export.gguf='off'"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_directed_weights_are_those_of_a_training_step_on_the_same_rollouts(home: Path) -> None:
    run = load_run("demo", None, SMALL)
    trial = try_rewards(run, Silent(), prompts=4, each=4, gradients=True)
    mine = advantages(trial, trial.weights)[-1]
    steering = in_training(run, trial)
    assert mine.weights == pytest.approx([steering[f"steering/{k}/weight"] for k in range(3)], rel=1e-4)
    assert mine.weights != pytest.approx(trial.weights, rel=1e-3), "this would show nothing"


def in_training(run: Run, trial: Trial) -> dict[str, float]:
    """What a first step says of the rewards' directions."""
    run = run.model_copy(update={"algorithm": steered()})
    prepared = prepare(run, lambda text: None)
    with open_rewards(run, prepared.data) as rewards, assemble(prepared, rewards, Silent()) as room:
        session = room.session
        batch, parts = laid_out(session, list(trial.rollouts))
        return learn(session, batch, session.algorithm.credit(batch, Readout()), parts)[0]


def test_other_rewards_need_no_other_samples(home: Path) -> None:
    one = try_rewards(load_run("demo", None, SMALL), Silent(), prompts=2, each=2, probes=False)
    (kept,) = (home / CACHE).iterdir()
    before = kept.stat().st_mtime_ns
    said = Silent()
    other = try_rewards(load_run("demo", None, [*SMALL, "rewards.functions=['numeric_answer']"]), said, prompts=2, each=2, probes=False)
    assert [r.tokens for r in one.rollouts] == [r.tokens for r in other.rollouts]
    assert kept.stat().st_mtime_ns == before and any("kept from before" in line for line in said.said)
    assert [r.rewards[0] for r in one.rollouts] == [r.rewards[0] for r in other.rollouts]
    try_rewards(load_run("demo", None, [*SMALL, "rollout.temperature=0.5"]), Silent(), prompts=2, each=2, probes=False)
    assert len(list((home / CACHE).iterdir())) == 2
    kept.write_text("damaged")
    again = try_rewards(load_run("demo", None, SMALL), Silent(), prompts=2, each=2, probes=False)
    assert [r.tokens for r in one.rollouts] == [r.tokens for r in again.rollouts]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "localrl", *words], capture_output=True, text=True, check=False)


def test_given_completions_on_the_command_line(home: Path) -> None:
    (home / "answers.jsonl").write_text('{"prompt": "2 + 2?", "completions": ["4", "5"], "answer": "4"}\n')
    (home / "rewards").mkdir()
    (home / "rewards" / "sums.toml").write_text('[rewards]\nfunctions = ["numeric_answer", { function = "broken.py:f", name = "broken" }]\n')
    (home / "rewards" / "broken.py").write_text("def f(completions, **kwargs):\n    return 1 / 0\n")
    done = command("try", "--rewards", "sums", "--samples", "answers.jsonl", "--json", "--out", "t.json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [row["rewards"] for row in said["completions"]] == [{"numeric_answer": 1, "broken": None}, {"numeric_answer": 0, "broken": None}]
    assert "ZeroDivisionError" in said["troubles"]["broken"]
    assert Trial.read(home / "t.json").names == ("numeric_answer", "broken")


def test_completions_of_a_run_with_their_columns(home: Path, trained_run: Path) -> None:
    run = load_run(None, trained_run / "run.toml")
    trial = try_rewards(run, Silent(), prompts=1, each=1, folder=trained_run, probes=False)
    lines = (trained_run / "completions" / "step-000003.jsonl").read_text().splitlines()
    assert [dict(zip(trial.names, r.rewards, strict=True)) for r in trial.rollouts] == [json.loads(line)["rewards"] for line in lines]


def test_a_run_without_completions_is_one_sentence(home: Path, trained_run: Path) -> None:
    (home / "empty").mkdir()
    (home / "empty" / "run.toml").write_bytes((trained_run / "run.toml").read_bytes())
    with pytest.raises(UserError, match="no completions yet"):
        try_rewards(load_run("demo"), Silent(), prompts=1, each=1, folder=home / "empty")
