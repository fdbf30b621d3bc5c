"""The README is run: its reward, its data, its commands; and the demo, shortened."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from localrl.cli import main
from localrl.folder import checkpoints, read_lines
from localrl.prepare import DEMO_DATA

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
TUTORIAL = README[README.index("## Tutorial") : README.index("## What lies where")]


def blocks(language: str, text: str = TUTORIAL) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs a command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(line: str) -> int:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 12 + 34?\n/quit\n"))
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    yield run  # type: ignore[misc]
    torch.set_num_threads(threads)


def test_the_tutorial_runs_as_written(shell: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads(blocks("json")[0])
    rows = [json.loads(line) for line in (DEMO_DATA / "train.jsonl").read_text().splitlines()[:60]]
    assert row.keys() <= rows[0].keys()                             # the example row is of the form of the embedded task's
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({k: r[k] for k in row}) + "\n" for r in [row, *rows]))
    (tmp_path / "reward.py").write_text(blocks("python")[0])
    lines = [line for block in blocks("sh") for line in block.strip().splitlines()]
    assert len(lines) >= 9
    for line in lines:
        if "train --preset qwen3" in line:
            continue                                                # wants 16 GB and a hub; the presets have tests of their own
        assert shell(line) == 0, line
        if "--dry-run" in line:
            assert not (tmp_path / "mine").exists()
    assert checkpoints(tmp_path / "mine")[-1].name == "checkpoint-40"
    metrics = read_lines(tmp_path / "mine" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 41))
    first, last = (sum(m["reward"] for m in part) / len(part) for part in (metrics[:5], metrics[-5:]))
    assert last > first
    assert "12 + 34" in capsys.readouterr().out or (tmp_path / "mine" / "export").exists()


def test_the_demo_shortened(shell: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("localrl demo --out small steps=3 rollout.prompts_per_step=4 eval.limit=8") == 0
    folder = tmp_path / "small"
    assert (folder / "curves.png").stat().st_size > 10_000
    names = {p.name for p in (folder / "export").glob("*.gguf")}
    assert names == {"demo-base-f16.gguf", "demo-adapter-f16.gguf", "demo-merged-f16.gguf"}
    out = capsys.readouterr().out
    assert "before" in out
    assert "correct" in out
    assert shell('localrl chat small --prompt "What is 2 + 2?"') == 0


def test_every_command_explains_itself(shell: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("", "doctor", "plan", "train", "resume", "eval", "chat", "compare", "serve", "export", "presets", "demo"):
        assert shell(f"localrl {command} --help") == 0
        assert len(capsys.readouterr().out) > 200


def test_lists_and_figures_for_newcomers(shell: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("localrl presets") == 0
    assert "qwen3-8b-16gb" in capsys.readouterr().out
    assert shell("localrl plan --preset qwen3-8b-16gb --card 16GiB --json") == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert shell("localrl plan --preset qwen3-14b-24gb --card 8GiB") == 2
    assert "card" in capsys.readouterr().err
    assert shell("localrl presets --settings") == 0
    listed = capsys.readouterr().out
    assert "optim.learning_rate" in listed
    assert "algorithm.positive_weight" in listed
    assert shell("localrl presets demo") == 0
    assert "[rollout]" in capsys.readouterr().out
    assert shell("localrl doctor") == 0
    assert "bitsandbytes" in capsys.readouterr().out
