"""The doctor looks at everything, says what it means, and never falls over."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from localrl import allocator, doctor
from localrl.doctor import diagnose, gpu, llama, show
from localrl.doctor.finding import Finding
from localrl.memory.reality import remember


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

    for check in ("_four_bit", "_processor"):                       # slow ones too: this is about the others
        monkeypatch.setattr(doctor, check, broken)
    monkeypatch.setattr(llama, "findings", broken)
    monkeypatch.setattr(gpu, "cards", broken)
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


def test_llama_cpp_is_asked_and_timed(findings: list[Finding]) -> None:
    what, fast = named(findings, "llama.cpp"), named(findings, "llama.cpp's speed")
    assert what.verdict == fast.verdict == "ok"
    assert re.match(r"0\.3\.\d+ \(llama\.cpp .+\), (CPU|GPU) build", what.value) and "libllama" in what.meaning
    read, written = (float(number.replace(",", "")) for number in re.findall(r"([\d,]+) tok/s", fast.value))
    assert read > 1 and written > 1 and "28 million parameters" in fast.meaning


def test_without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "installed", lambda: None)
    (finding,) = llama.findings()
    assert finding.verdict == "warn" and "pip install" in finding.meaning


def test_a_llama_cpp_that_kills_its_process_does_not_kill_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(llama, "WORKER", worker)
    worker.write_text("import os; os.abort()")
    (finding,) = llama.findings()
    assert finding.verdict == "bad" and "does not load" in finding.value and "--no-binary" in finding.meaning
    told = {"path": "x", "version": "1", "devices": ["RTX 4080"], "info": "CPU : AVX2 = 1 | FMA = 1 | SVE = 0 |", "gpu": True}
    worker.write_text(f"import json, sys; print(json.dumps({told})); sys.exit('no such luck')")
    what, fast = llama.findings()
    assert what.verdict == "ok" and what.value.endswith("(llama.cpp 1), GPU build (RTX 4080): AVX2, FMA")
    assert fast.verdict == "bad" and "while computing: no such luck" in fast.value
    worker.write_text(f"import json; print(json.dumps({told | {'gpu': False, 'info': 'CPU : REPACK = 1 |'}}))")
    assert llama.findings()[0].verdict == "warn"
    worker.write_text("import time; time.sleep(30)")
    monkeypatch.setattr(llama, "SECONDS", 0.2)
    (finding,) = llama.findings()
    assert finding.verdict == "bad" and "no answer" in finding.value


def test_other_programs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"--query-gpu": "575.51, 900 MiB, 16376 MiB\n", "--query-compute-apps": "4242, /usr/bin/game, 2000 MiB\n"}
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said[command[1].split("=")[0]], ""))
    driver, others = gpu.neighbours()
    assert driver.value == "575.51 (900 MiB of 16376 MiB in use)"
    assert others.verdict == "warn" and others.value == "game (pid 4242) 2000 MiB"


def test_a_processor_with_a_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: "flags : fpu avx512_bf16" if str(path) == "/proc/cpuinfo" else "")
    (finding,) = doctor._avx()
    assert "switches that off" in finding.meaning
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    assert doctor._avx() == []


def test_a_guest_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "under_wsl", lambda: True)
    (finding,) = doctor._wsl()
    assert "pin" in finding.meaning
    monkeypatch.setattr(allocator, "under_wsl", lambda: False)
    assert doctor._wsl() == []


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A machine with a card of 16 GiB of which so many GiB are free. (What torch asks the driver is replaced: there is no GPU here.)"""

    def of(free: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (round(free * 2**30), 16 * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4080")

    return of


def test_a_desktop_on_the_card_is_seen_and_subtracted(a_card: Callable[[float], None]) -> None:
    a_card(15.3)
    (quiet,) = gpu.left()
    assert quiet.verdict == "ok" and "a plan has 15.0 GiB" in quiet.value
    a_card(13.4)
    (finding,) = gpu.left()
    assert finding.verdict == "warn" and "13.4 GiB of 16.0 GiB free, a plan has 13.1 GiB" in finding.value
    assert "hold about 2.0 GiB" in finding.meaning and "would have 15.0 GiB" in finding.meaning


@pytest.mark.parametrize(
    ("told", "wsl", "verdict", "words"),
    [
        (None, False, "ok", "4%"),
        (None, True, "warn", "under WSL"),
        ("expandable_segments:True", True, "ok", "4%"),
        ("max_split_size_mb:128", False, "warn", "add expandable_segments:True to PYTORCH_ALLOC_CONF"),
    ],
)
def test_what_fragmentation_costs(
    a_card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, told: str | None, wsl: bool, verdict: str, words: str
) -> None:
    a_card(15)
    for name in allocator.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if told:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", told)
    monkeypatch.setattr(allocator.platform, "system", lambda: "Linux")
    monkeypatch.setattr(allocator, "under_wsl", lambda: wsl)
    (finding,) = gpu.segments()
    assert finding.verdict == verdict and words in finding.meaning


def test_pinned_memory_is_tried(a_card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(15)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: real(*size, **more))
    (finding,) = gpu.pinned()
    assert finding.verdict == "ok" and "memory.offload" in finding.meaning

    def refused(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(torch, "empty", refused)
    (finding,) = gpu.pinned()
    assert finding.verdict == "warn" and "(CUDA error: out of memory)" in finding.meaning


def test_without_a_gpu_nothing_is_said_of_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.segments() == gpu.pinned() == gpu.left() == []


def test_what_past_runs_have_taught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALRL_CACHE", str(tmp_path))
    assert gpu.taught() == []
    remember("RTX 4080 | qwen3 0123 | nf4 | 16 bit | 1.0", {"backward": 1.04, "rollout": 1.01})
    (finding,) = gpu.taught()
    assert "RTX 4080, qwen3: rollout 1.01, backward 1.04" in finding.value
    for number in range(9):
        remember(f"card {number} | llama 0123 | nf4 | 16 bit | 1.0", {"backward": 1.04})
    assert len(gpu.taught()) == gpu.SHOWN_LESSONS + 1 and len({f.name for f in gpu.taught()}) == gpu.SHOWN_LESSONS + 1
    (tmp_path / "memory.json").write_text("{")
    (finding,) = gpu.taught()
    assert finding.verdict == "warn"


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    runs, models = doctor._disk(tmp_path / "runs")[:2]
    assert "free at" in runs.value and str(tmp_path) in models.value
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor._disk(tmp_path / "runs")[0].value.endswith("free at ~/runs")
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
