"""A run's policy as files: proven with its own rewards, told where it comes from, with what other programs need beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from gguf import GGUFReader

from localrl.batch import Prompt, Request, Rollout
from localrl.cli import main
from localrl.config import load_run
from localrl.display import export_table
from localrl.export import Export, HeldOut, Interval, RewardChange, Sample, export
from localrl.export.answer_worker import draw
from localrl.export.beside import read_report
from localrl.export.heldout import change_of, compare_totals, ending, verdict
from localrl.export.settle import ROOM
from localrl.outcome import export_files, load_trained
from localrl.prepare import anchor, foresee_export
from localrl.run import train_run
from localrl.settings import UserError
from tests.displays import Silent
from tests.export.test_gguf_failures import plant, rewrite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo after two steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "short"
    settings = ["steps=2", "rollout.prompts_per_step=4", "eval.limit=6", "eval.num_generations=2", "export.prompts=12", f"log.dir='{folder}'"]
    train_run(load_run("demo", None, settings), Silent())
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def files(run: Path) -> list[Export]:
    """Three types from one parent."""
    return export_files(run, Silent(), dtypes=["q4_k_m", "f32", "q8_0"], merge="dequantized")


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith(("general.", "localrl."))}


def test_several_types_come_from_one_parent(run: Path, files: list[Export]) -> None:
    assert {file.path.name for file in files} == {f"demo-merged-{t}.gguf" for t in ("q4_k_m", "f32", "q8_0")}
    assert {p.name for p in (run / "export").glob("*.gguf*") if p.suffix == ".gguf"} == {file.path.name for file in files}
    small = next(file.report for file in files if file.report.dtype == "q4_k_m")
    assert [row.name for row in small.checks][:4] == ["logits, f32 parent", "mean KL, f32 parent", "greedy text, f32 parent", "weights, f32 parent"]
    assert {"keys", "weights", "reward"} <= {row.name for row in small.checks}


def test_an_f32_file_answers_word_for_word_as_the_live_model(files: list[Export]) -> None:
    exact = next(file.report for file in files if file.report.dtype == "f32")
    rows = {row.name: row for row in exact.checks}
    assert rows["held-out answers"].value == "24 answers to 12 prompts"
    same = int(re.search(r"(\d+) word for word", rows["held-out answers"].detail)[1])  # type: ignore[index]
    assert same >= 23, "the same random numbers, and llama.cpp's own rounding"
    assert set(exact.rewards) == {"reward", "reward correct", "reward format", "reward brevity"}
    change = exact.rewards["reward"]
    assert abs(change.change.mean) < 0.1
    assert change.before.half > 0
    assert rows["replies end"].passed
    assert int(rows["tokens"].value.split()[0]) >= 160, "80 texts, with and without specials"


def test_every_weight_is_hashed(files: list[Export]) -> None:
    first, *others = [file.report for file in files]
    assert all(len(digest) == 64 for digest in first.source.values())
    assert all(dict(report.source) == dict(first.source) for report in others), "of the trained weights, not of the file"
    assert all(sum(report.types.values()) == len(report.source) == 39 for report in (first, *others))
    small = next(file.report for file in files if file.report.dtype == "q4_k_m")
    assert set(small.fallbacks.values()) == {"Q5_0", "Q8_0"}, "widths of 128 and 384 are no multiples of 256"
    assert "larger than asked" in small.to_markdown()


def test_the_file_says_where_it_comes_from(run: Path, files: list[Export]) -> None:
    said = fields(files[0].path)
    assert said["general.name"] == "demo"
    assert said["general.license"] == "apache-2.0"
    assert said["general.base_model.0.name"] == "demo"
    assert said["general.quantized_by"] == "localrl"
    assert "localrl" in said["general.tags"]
    assert said["general.sampling.temp"] == 1.0
    assert said["localrl.run"] == "short"
    assert said["localrl.steps"] == 2
    assert said["localrl.merge"] == "dequantized"
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    for when, row in zip(("before", "after"), evaluations, strict=True):
        assert said[f"localrl.reward.{when}"] == pytest.approx(row["eval/reward"], rel=1e-6)
        assert said[f"localrl.reward.{when}.error"] == pytest.approx(2 * row["eval/reward/stderr"], rel=1e-6)
    manifest = json.loads((run / "checkpoint-2" / "manifest.json").read_text())
    assert said["localrl.adapter.sha256"] == manifest["adapter_model.safetensors"]
    assert len(said["localrl.base.sha256"]) == len(said["localrl.eval.sha256"]) == 64
    for file in files:
        checks = fields(file.path)["localrl.checks"]
        assert len(checks) == ROOM
        assert json.loads(checks)["checks"] == {row.name: row.verdict for row in file.report.checks}
        assert file.report.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
        assert str(Path.home()) not in str(fields(file.path)) and str(run) not in str(fields(file.path))


def test_what_lies_beside_works_and_can_be_moved(run: Path, files: list[Export], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(run / "export", moved)
    readme = (moved / "README.md").read_text()
    for file in files:
        report = read_report(file.path)
        assert report == replace(file.report, types=dict(file.report.types), source=dict(file.report.source), fallbacks=dict(file.report.fallbacks))
        section = readme[readme.index(f"## {file.path.name}") :]
        assert f"llama-server -m {file.path.name} " in section
        made = (moved / file.path.with_suffix(".Modelfile").name).read_text()
        assert made.startswith(f"FROM ./{file.path.name}\n")
        assert 'PARAMETER stop "<|im_end|>"' in made
        assert "<|im_start|>system\n{{ $m.Content }}<|im_end|>\n" in made
    for text in [readme, *(p.read_text() for p in moved.glob("*.Modelfile"))]:
        assert str(run) not in text and "/tmp" not in text and str(Path.home()) not in text
    snippet = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    told = subprocess.run([sys.executable, "-c", snippet.replace("Hello", "What is 12 + 34?")], cwd=moved, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    table = export_table(files[:1])
    assert table.row_count == len(files[0].report.checks)
    assert re.search(r"\d", told.stdout)


def test_an_adapter_has_its_base_beside_it(run: Path, tmp_path: Path) -> None:
    (done,) = export_files(run, Silent(), what="adapter", dtypes=["q8_0"], out=tmp_path)
    assert done.base == tmp_path / "demo-base-q8_0.gguf"
    names = [row.name for row in done.report.checks]
    assert "logits" not in names and "mean KL" in names, "the adapter is F16, and compared on the F32 base first"
    assert {"mean KL, q8_0 base", "reward"} <= set(names)
    made = (tmp_path / "demo-adapter-q8_0.Modelfile").read_text()
    assert made.startswith("FROM ./demo-base-q8_0.gguf\nADAPTER ./demo-adapter-q8_0.gguf\n")
    section = (tmp_path / "README.md").read_text().split("## demo-adapter-q8_0.gguf")[1]
    snippet = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert 'lora_path="demo-adapter-q8_0.gguf"' in snippet
    told = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def test_a_wrong_pre_tokenizer_is_caught(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run, Silent())
    told = [Sample(tuple(trained.policy.tokenizer("What is 12 + 34?")["input_ids"]))]
    fault = plant(lambda path: rewrite(path, "tokenizer.ggml.pre", lambda name: "default"), tmp_path / "x-merged-f32.gguf.tmp")
    with pytest.raises(UserError, match="tokens:"):
        export(trained.policy.model, trained.policy.tokenizer, tmp_path, what="merged", dtype="f32", samples=told, name="x", progress=fault)


def test_damage_that_comes_after_the_comparison_costs_reward(run: Path, tmp_path: Path) -> None:
    """Only the answers to held-out prompts can still tell."""
    file = tmp_path / "demo-merged-f32.gguf.tmp"

    def at_answers(name: str) -> None:
        if "answers held-out" in name:
            output = next(t for t in GGUFReader(file, "r+").tensors if t.name == "output.weight")
            output.data[:] *= -1

    with pytest.raises(UserError, match=r"replies end: .*; reward:"):
        export_files(run, Silent(at_answers), dtypes=["f32"], out=tmp_path)
    assert (tmp_path / "demo-merged-f32.gguf.failed").exists()


def test_cancelled_among_the_answers_leaves_nothing(run: Path, tmp_path: Path) -> None:
    def cancel(name: str) -> None:
        if "answers held-out" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_files(run, Silent(cancel), dtypes=["q8_0"], merge="dequantized", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_llama_cpp_looks_at_the_file(run: Path, tmp_path: Path) -> None:
    """A real signal to a real process, while its child is at work: exit code 130, no file, no child."""
    command = [sys.executable, "-m", "localrl.cli", "export", str(run), "--type", "q8_0", "--merge", "dequantized", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    worker: psutil.Process | None = None
    end = time.monotonic() + 120
    while worker is None and process.poll() is None and time.monotonic() < end:
        found = [c for c in psutil.Process(process.pid).children(recursive=True) if "check_worker.py" in " ".join(c.cmdline())]
        worker = found[0] if found else None
        time.sleep(0.01)
    assert worker is not None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_the_command_ends_with_tables_and_what_comes_next(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["localrl", "export", str(run), "--type", "bf16,q5_k_m", "--shard-size", "1MB", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out = capsys.readouterr().out
    for words in ("demo-merged-bf16-00001-of-00002.gguf", "demo-merged-q5_k_m.gguf", "de-quantised", "localrl chat", "localrl compare", "README.md"):
        assert words in out
    assert out.count("passed") == 2
    made = {f"demo-merged-q5_k_m{end}" for end in (".gguf", ".gguf.check.json", ".Modelfile")}
    parts = {f"demo-merged-bf16-0000{n}-of-00002.gguf" for n in (1, 2)}
    made |= parts | {"demo-merged-bf16-00001-of-00002.gguf.check.json", "demo-merged-bf16.Modelfile"}
    assert {p.name for p in tmp_path.iterdir()} == made | {"README.md"}, "neither parent stays, for nobody asked for it"
    assert out.index("done:") > out.index("passed"), "nothing says done before it passed"
    mistakes = {"--type q9": "q9", "--what all": "all", "--merge both": "both", "--what base --merge original": "merged only",
                "--shard-size 5": "is no size", "--converter /nowhere": "no converter at /nowhere"}  # fmt: skip
    for wrong, words in mistakes.items():
        monkeypatch.setattr(sys, "argv", ["localrl", "export", str(run), *wrong.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert words in capsys.readouterr().err


def test_what_no_gguf_can_hold_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    asked = {mode: anchor(load_run("demo", None, ["adapter.lora_target_modules=['q_proj','lm_head']", f"export.gguf='{mode}'"]), tmp_path)
             for mode in ("auto", "required", "off")}  # fmt: skip
    foresee_export(asked["auto"], None, said.append)
    assert len(said) == 1 and "lm_head" in said[0] and "not exported" in said[0]
    foresee_export(asked["off"], None, said.append)
    assert len(said) == 1
    with pytest.raises(UserError, match=r"export\.gguf = 'required'.*lm_head"):
        foresee_export(asked["required"], None, said.append)
    fine = anchor(load_run("demo", None, ["export.gguf='required'"]), tmp_path)
    foresee_export(fine, None, said.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="llama-cpp-python"):
        foresee_export(fine, None, said.append)


# -- the arithmetic of it ---------------------------------------------------------------------------------------------------


def answered(rewards: list[list[float]], done: bool = True) -> list[Rollout]:
    """A rollout for each reward: a row is a prompt."""
    return [
        Rollout(Request(Prompt(i, (1,), "x"), j), (2,), "y", done, 0, None, (value,)) for i, row in enumerate(rewards) for j, value in enumerate(row)
    ]


def test_differences_are_taken_prompt_by_prompt() -> None:
    before, after = answered([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), answered([[1.0, 1.0], [1.0, 1.0], [0.0, float("nan")]])
    change = change_of(before, after, lambda r: r.rewards[0])
    assert change is not None
    assert change.before.mean == pytest.approx(0.5)
    assert change.change.mean == pytest.approx(0.5 / 3)
    assert change.change.half < change.before.half
    assert change_of(before[:2], after[:2], lambda r: r.rewards[0]) is None


@pytest.mark.parametrize(
    ("mean", "half", "verdict_is"),
    [(0.0, 0.0, "ok"), (-0.02, 0.03, "ok"), (-0.02, 0.01, "warning"), (-0.2, 0.1, "FAILED"), (0.3, 0.1, "ok")],
)
def test_worse_for_certain_is_a_warning_and_much_worse_a_failure(mean: float, half: float, verdict_is: str) -> None:
    change = RewardChange(Interval(1.0, 0.2), Interval(1.0 + mean, 0.2), Interval(mean, half))
    assert verdict("reward", change, 0.5, decides=True).verdict == verdict_is
    assert verdict("reward x", change, 0.5, decides=False).passed
    assert ending(RewardChange(Interval(1.0, 0.0), Interval(0.0, 0.0), Interval(-1.0, 0.0))).verdict == "FAILED"
    assert ending(RewardChange(Interval(0.0, 0.0), Interval(0.0, 0.0), Interval(0.0, 0.0))).verdict == "warning"


def test_the_better_of_two_files() -> None:
    gain = compare_totals({1: 0.0, 2: 0.5, 3: 0.5}, {1: 0.5, 2: 1.0, 3: 1.0})
    assert gain == Interval(0.5, 0.0)
    assert compare_totals({1: 0.0}, {1: 1.0}) is None


def test_one_prompt_is_too_few() -> None:
    with pytest.raises(UserError, match="fewer than 2"):
        HeldOut(answered([[1.0, 0.0]]), np.zeros((3, 2)), 1.0, (), (), (), lambda r: r, lambda rows: [], lambda text: None)


def test_tokens_are_drawn_where_the_running_sum_passes_the_number() -> None:
    from localrl.engines.sampling import inverse_cdf

    rng = np.random.default_rng(0)
    logits, uniform = rng.normal(size=(64, 1000)).astype(np.float32) * 3, rng.random(64)
    wanted = inverse_cdf(torch.softmax(torch.from_numpy(logits) / 0.7, -1), torch.from_numpy(uniform)).flatten().tolist()
    assert sum(a == b for a, b in zip(draw(logits, uniform, 0.7), wanted, strict=True)) >= 63
    assert draw(logits, uniform, 0.0) == logits.argmax(-1).tolist()
