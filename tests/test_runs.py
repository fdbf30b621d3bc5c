"""The list of runs: what it says of long, damaged and half-deleted ones, and in the terminal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from localrl.config import build
from localrl.runs import WHOLE, latest, sampled, summaries, summarise


def made(folder: Path, state: str = "finished", rows: int = 3, pid: int = 1) -> Path:
    """A run's folder with so many steps."""
    folder.mkdir(parents=True)
    demo = {"path": "demo"}
    run = build({"model": demo, "data": demo, "rewards": {"functions": ["numeric_answer"]}, "algorithm": {"name": "grpo"}, "steps": rows + 2})
    (folder / "run.toml").write_text(run.dump())
    (folder / "state.json").write_text(json.dumps({"pid": pid, "state": state, "step": rows, "steps": rows + 2, "time": time.time(), "message": ""}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "reward": float(i), "timestamp": 2.0 * i}) + "\n" for i in range(rows)))
    return folder


def test_a_run_at_a_glance(tmp_path: Path) -> None:
    found = summarise(made(tmp_path / "a"))
    assert (found.stands, found.step, found.steps, found.rewards, found.model, found.wrong) == ("finished", 3, 5, (0.0, 1.0, 2.0), "demo", "")
    assert found.algorithm and found.seconds_left is None


def test_a_long_run_is_sampled_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "filler": "x" * 2000}) + "\n" for i in range(1000)))
    assert path.stat().st_size > WHOLE
    steps = [row["step"] for row in sampled(path)]
    assert len(steps) == 48 and steps[0] == 0 and steps[-1] == 999
    assert steps == sorted(set(steps)) and max(b - a for a, b in pairwise(steps)) < 40
    assert [row["step"] for row in latest(path, 3)] == [997, 998, 999]


def test_whatever_is_broken_is_a_row_with_a_sentence(tmp_path: Path) -> None:
    for name in ("good", "future", "mad", "toml", "state", "lines"):
        made(tmp_path / name)
    with (tmp_path / "future" / "run.toml").open("a") as file:
        file.write("[of_tomorrow]\nwarp = 9\n")
    (tmp_path / "toml" / "run.toml").write_text("steps = = 3")
    (tmp_path / "mad" / "run.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "state" / "state.json").write_text('{"pid": "many", "state": "running"}')
    with (tmp_path / "lines" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew\x00\n[1, 2]\n{"step": 5, "reward": null}\n{"step": 6, "rewa')
    half = made(tmp_path / "half")
    (half / "run.toml").unlink()
    found = {run.folder.name: run for run in summaries(tmp_path)}
    assert set(found) == {"good", "future", "mad", "toml", "state", "lines", "half"}
    assert found["good"].wrong == "" and found["lines"].wrong == "" and found["lines"].rewards == (0.0, 1.0, 2.0)
    assert "of_tomorrow" in found["future"].wrong and found["future"].stands == "finished" and found["future"].algorithm
    assert "damaged" in found["toml"].wrong and "cannot be read" in found["mad"].wrong
    assert found["state"].wrong == "" and found["state"].stands == "crashed"            # odd values in a state that is one
    assert "run.toml is gone" in found["half"].wrong and found["half"].status is None


def test_a_run_that_vanishes_while_it_is_looked_at(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    shutil.rmtree(folder)
    assert summarise(folder).wrong


@pytest.mark.parametrize(("folder", "words"), [(".", ("a", "finished", "3/5", "2.000")), ("empty", ("no runs in",))])
def test_in_the_terminal(tmp_path: Path, folder: str, words: tuple[str, ...]) -> None:
    made(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-m", "localrl", "runs", str(tmp_path / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(word in done.stdout for word in words), done.stdout + done.stderr
