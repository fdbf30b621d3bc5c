"""The doctor looks at everything, says what it means, and never falls over."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from localrl import doctor
from localrl.doctor import Finding, diagnose, show


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return diagnose()


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_it_finds_what_is_here(findings: list[Finding]) -> None:
    assert named(findings, "Python").value.startswith(sys.version.split()[0])
    assert named(findings, "4-bit training").verdict == "ok"
    for name in ("torch", "transformers", "peft", "bitsandbytes", "gguf", "memory", "processor", "disk for runs", "output"):
        assert named(findings, name).value
    assert not [finding for finding in findings if finding.value == "could not be found out"]
    assert all(finding.meaning for finding in findings if finding.verdict != "ok")
    assert len({finding.name for finding in findings}) == len(findings)


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("no such luck\nand more")

    for check in ("_four_bit", "_llama", "_gpu", "_processor"):     # slow ones too: this is about the others
        monkeypatch.setattr(doctor, check, broken)
    findings = diagnose()
    failed = named(findings, "4-bit training")
    assert (failed.value, failed.verdict) == ("could not be found out", "warn") and failed.meaning == "RuntimeError: no such luck"
    assert named(findings, "Python").verdict == "ok"


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes as bnb

    right = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: right(*args) * 1.5)
    (finding,) = doctor._four_bit()
    assert finding.verdict == "bad" and "quantization=none" in finding.meaning


def test_missing_and_unknown_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.14.0", "bitsandbytes": "0.49.1", "transformers": "5.1.0", "accelerate": "1.0", "gguf": "0.19.0", "jsonschema": "4"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = doctor._libraries()
    assert {f.name: f.verdict for f in found}["peft"] == "bad" and "pip install peft" in named(found, "peft").meaning
    assert named(found, "torch").verdict == "warn" and named(found, "bitsandbytes").verdict == "bad"
    assert "math-verify" in named(found, "optional libraries").value and "jsonschema" not in named(found, "optional libraries").value
    (llama,) = doctor._llama()
    assert llama.verdict == "warn" and "pip install" in llama.meaning


def test_a_llama_cpp_that_kills_its_process_does_not_kill_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.3.36")
    monkeypatch.setattr(doctor, "ASK_LLAMA", "import os; os.abort()")
    (finding,) = doctor._llama()
    assert finding.verdict == "bad" and "does not load" in finding.value and "--no-binary" in finding.meaning
    monkeypatch.setattr(doctor, "ASK_LLAMA", 'print(\'{"info": "CPU : AVX2 = 1 | FMA = 1 | SVE = 0 |", "gpu": true}\')')
    (finding,) = doctor._llama()
    assert finding.verdict == "ok" and finding.value == "0.3.36, GPU build (AVX2, FMA)"


def test_other_programs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"--query-gpu": "575.51, 900 MiB, 16376 MiB\n", "--query-compute-apps": "4242, /usr/bin/game, 2000 MiB\n"}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said[command[1].split("=")[0]], ""))
    driver, others = doctor._neighbours()
    assert driver.value == "575.51 (900 MiB of 16376 MiB in use)"
    assert others.verdict == "warn" and others.value == "game (pid 4242) 2000 MiB"


@pytest.mark.parametrize(
    ("file", "text", "check", "word"),
    [
        ("/proc/version", "Linux version 6.6.87-microsoft-standard-WSL2", doctor._wsl, "pin"),
        ("/proc/cpuinfo", "flags : fpu avx512_bf16", doctor._avx, "switches that off"),
    ],
)
def test_traps_of_some_machines(monkeypatch: pytest.MonkeyPatch, file: str, text: str, check: Callable[[], list[Finding]], word: str) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: text if str(path) == file else "")
    (finding,) = check()
    assert word in finding.meaning
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    assert check() == []


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    runs, models = doctor._disk(tmp_path / "runs")[:2]
    assert "free at" in runs.value and str(tmp_path) in models.value
    monkeypatch.setattr(doctor, "SMALL_DISK", 2**60)
    assert {f.verdict for f in doctor._disk(tmp_path)} == {"warn"}


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    (finding,) = doctor._processor()
    assert finding.verdict == "warn" and "OMP_NUM_THREADS" in finding.meaning


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_is_shown_anywhere(findings: list[Finding], encoding: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=100).print(show(findings))
    file.flush()
    text = file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert all(finding.verdict in text and finding.name.split()[0] in text for finding in findings)
