"""What this machine has, what works, and what each of it means for training. A few seconds, nothing changed, nothing sent."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from localrl.memory.cards import gib, machine_memory, usable_bytes

Verdict = Literal["ok", "warn", "bad"]
BUILD_LLAMA = 'CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install "llama-cpp-python>=0.3.36,<0.4"'
"""Without the image parts it builds in about three minutes on two cores; it needs a C++ compiler."""
SMALL_DISK, SMALL_MEMORY = 10 * 2**30, 6 * 2**30
OPTIONAL = {"math-verify": "the maths reward", "jsonschema": "the JSON schema reward", "pyarrow": "Parquet files", "datasets": "hub data sets"}
ASK_LLAMA = """
import json, llama_cpp
print(json.dumps({"info": llama_cpp.llama_print_system_info().decode(), "gpu": bool(llama_cpp.llama_supports_gpu_offload())}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    verdict: Verdict
    meaning: str
    """What follows from it, for somebody who has never heard of it. May be empty where all is well."""


def diagnose(folder: Path | None = None) -> list[Finding]:
    """Look at everything. `folder`: where runs will go (None: here). Never raises: a check that fails is a finding itself."""
    place = folder or Path.cwd()
    checks: dict[str, Callable[[], list[Finding]]] = {
        "Python": _python,
        "libraries": _libraries,
        "GPU": _gpu,
        "other programs on the GPU": _neighbours,
        "4-bit training": _four_bit,
        "CUDA allocator": _allocator,
        "llama.cpp": _llama,
        "memory": _memory,
        "processor": _processor,
        "AVX512-BF16": _avx,
        "disk": lambda: _disk(place),
        "WSL": _wsl,
        "terminal": _terminal,
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings += check()
        except Exception as error:                                  # a doctor who falls over helps nobody: what happened is a finding
            findings.append(Finding(name, "could not be found out", "warn", f"{type(error).__name__}: {_first_line(error)}"))
    return findings


def show(findings: Sequence[Finding]) -> Table:
    """As a table; the colour and the word say how bad it is."""
    table = Table("", "what", "found", "what it means", title="localrl doctor", title_justify="left")
    styles = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    for finding in findings:
        table.add_row(Text(finding.verdict, style=styles[finding.verdict]), Text(finding.name), Text(finding.value), Text(finding.meaning))
    return table


# -- software ---------------------------------------------------------------------------------------------------------------------


def _python() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("Python", value, "ok" if good else "bad", "" if good else "localrl needs Python 3.11 or newer")]


def _libraries() -> list[Finding]:
    """Versions alone: importing them all would take longer than the rest together."""
    found = []
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "gguf"):
        here = _version(name)
        if here is None:
            found.append(Finding(name, "not installed", "bad", f"nothing runs without it: pip install {name}"))
        elif name == "torch" and not (2, 8) <= _numbers(here) < (2, 14):
            found.append(Finding(name, here, "warn", "tested with 2.8 to 2.13: numbers may differ"))
        elif name == "bitsandbytes" and _numbers(here)[:2] != (0, 50):
            found.append(Finding(name, here, "bad", "localrl works around parts of 0.50 by name: pip install 'bitsandbytes>=0.50,<0.51'"))
        else:
            found.append(Finding(name, here, "ok", ""))
    missing = {name: use for name, use in OPTIONAL.items() if _version(name) is None}
    value = "all there" if not missing else f"without {', '.join(missing)}"
    meaning = "" if not missing else f"only needed for {', '.join(missing.values())}: pip install {' '.join(missing)}"
    return [*found, Finding("optional libraries", value, "ok", meaning)]


def _four_bit() -> list[Finding]:
    """A small NF4 layer, forward and backward, against the same products with its unpacked weights, and those against the original."""
    import bitsandbytes as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(64, 128, generator=draw)
    x = torch.randn(8, 128, generator=draw).to(device).requires_grad_()
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(plain.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    out = layer.to(device)(x)
    out.sum().backward()
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()

    def off(found: torch.Tensor | None, expected: torch.Tensor) -> float:
        return float(((found - expected).norm() / expected.norm()).detach()) if found is not None else float("inf")

    rounding = off(weight.cpu(), plain)                              # four bits lose a tenth
    error = max(off(out, x @ weight.T), off(x.grad, weight.sum(0).expand(8, -1)), rounding - 0.15)
    if error < 0.01:
        return [Finding("4-bit training", f"works on {device}", "ok", "")]
    meaning = "a quantised layer computes wrongly here, training would learn nothing: reinstall bitsandbytes, or use model.quantization=none"
    return [Finding("4-bit training", f"wrong by {error:.0%} on {device}", "bad", meaning)]


def _llama() -> list[Finding]:
    """Asked in a process of its own: a library built for another processor would take this one down."""
    here = _version("llama-cpp-python")
    if here is None:
        return [Finding("llama.cpp", "not installed", "warn", f"training works; chat, compare and the check of exports need it: {BUILD_LLAMA}")]
    asked = subprocess.run([sys.executable, "-c", ASK_LLAMA], capture_output=True, text=True, timeout=30, check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or [f"ended with code {asked.returncode}"])[-1]
        meaning = f"chat, compare and the check of exports will not work; build it here: {BUILD_LLAMA} --force-reinstall --no-binary :all: --no-deps"
        return [Finding("llama.cpp", f"{here}, does not load: {reason[:120]}", "bad", meaning)]
    told = json.loads(asked.stdout.strip().splitlines()[-1])
    features = [part.split("=")[0].strip().split(":")[-1].strip() for part in told["info"].split("|") if part.strip().endswith("= 1")]
    build = "GPU build" if told["gpu"] else "CPU build"
    return [Finding("llama.cpp", f"{here}, {build} ({', '.join(features)})", "ok", "")]


# -- hardware ---------------------------------------------------------------------------------------------------------------------


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why = "this build of torch is for CPUs" + ("; a driver is there, so install torch's CUDA build" if shutil.which("nvidia-smi") else "")
        elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            why = "CUDA_VISIBLE_DEVICES hides every GPU: unset it"
        else:
            why = f"torch is built for CUDA {torch.version.cuda} but sees no device: is the driver installed and new enough?"
        return [Finding("GPU", "none", "warn", f"{why}. The demo and small models train on the CPU; a real model wants a card of 8 GiB or more")]
    found = []
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        value = f"{told.name}, {gib(told.total_memory)}, compute capability {told.major}.{told.minor}, CUDA {torch.version.cuda}"
        half = "" if told.major >= 8 else "; no bfloat16 in hardware, float16 is used"
        meaning = f"a plan may use {gib(usable_bytes(told.total_memory))} of it{half}"
        if index:
            meaning = "localrl trains on the first GPU only; CUDA_VISIBLE_DEVICES chooses another"
        found.append(Finding(f"GPU {index}", value, "ok" if told.major >= 7 else "warn", meaning))
    return found


def _neighbours() -> list[Finding]:
    """Who else holds memory, and which driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    driver = _smi("--query-gpu=driver_version,memory.used,memory.total")
    others = _smi("--query-compute-apps=pid,process_name,used_memory")
    found = [Finding("GPU driver", "; ".join(f"{row[0]} ({row[1]} of {row[2]} in use)" for row in driver if len(row) > 2) or "unknown", "ok", "")]
    others = [row for row in others if row and row[0] != str(os.getpid())]
    if others:
        value = "; ".join(f"{Path(row[1]).name} (pid {row[0]}) {row[2]}" for row in others if len(row) > 2)
        meaning = "what they hold is missing from the plan's card, and may grow: close them, or name a smaller memory.card"
        found.append(Finding("other programs on the GPU", value, "warn", meaning))
    return found


def _allocator() -> list[Finding]:
    import torch

    told = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if not torch.cuda.is_available():
        return []
    good = "expandable_segments:True" in (told or "")
    meaning = "" if good else "set PYTORCH_ALLOC_CONF=expandable_segments:True: rows of many lengths fragment less (about 4 % instead of 9 to 17 %)"
    return [Finding("CUDA allocator", told or "default", "ok" if good else "warn", meaning)]


def _memory() -> list[Finding]:
    available, total = machine_memory()
    small = available < SMALL_MEMORY
    meaning = "little: loading a real model and merging it for export want 6 GiB or more" if small else "a CPU run's card is what is available"
    return [Finding("memory", f"{gib(available)} available of {gib(total)}", "warn" if small else "ok", meaning)]


def _processor() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    value = f"{cores} cores, torch uses {threads} threads" + (f" (OMP_NUM_THREADS={told})" if told else "")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads > cores:
        meaning = f"more threads than cores wait for each other and can be many times slower: set OMP_NUM_THREADS={cores}"
        return [Finding("processor", value, "warn", meaning)]
    if busy > cores and threads > 1:
        meaning = f"other work keeps it busy (load {busy:.1f}): threads wait for each other, OMP_NUM_THREADS=1 may be faster"
        return [Finding("processor", value, "warn", meaning)]
    return [Finding("processor", value, "ok", "")]


def _avx() -> list[Finding]:
    flags = _read(Path("/proc/cpuinfo"))
    if "avx512_bf16" not in flags:
        return []
    meaning = (
        "here bitsandbytes would repack 4-bit weights in evaluation mode, after which gradients are silently wrong (down to a fifth in the first "
        "layers): localrl switches that off for every layer, so nothing is to be done"
    )
    return [Finding("AVX512-BF16", "present", "ok", meaning)]


def _disk(place: Path) -> list[Finding]:
    found = []
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, path, use in (("disk for runs", place, "checkpoints and exports"), ("disk for models", cache, "downloaded models")):
        real = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(real).free
        little = free < SMALL_DISK
        meaning = f"little for {use}: an 8B model takes 16 GiB, its F16 export as much again" if little else ""
        found.append(Finding(name, f"{gib(free)} free at {path}", "warn" if little else "ok", meaning))
    if not os.access(next(p for p in (place.absolute(), *place.absolute().parents) if p.exists()), os.W_OK):
        found.append(Finding("run folder", f"{place} cannot be written to", "bad", "choose another: log.dir=/path/with/room"))
    return found


def _wsl() -> list[Finding]:
    if "microsoft" not in _read(Path("/proc/version")).lower():
        return []
    meaning = (
        "Windows lets a guest pin only part of its memory, so offloading to pinned memory can fail early, and gives it half of the machine's memory "
        "unless .wslconfig says otherwise; keep runs on the Linux disk, /mnt/c is many times slower"
    )
    return [Finding("WSL", platform.release(), "warn", meaning)]


def _terminal() -> list[Finding]:
    encoding = (getattr(sys.stdout, "encoding", None) or "unknown").lower()
    kind = "a terminal" if sys.stdout is not None and sys.stdout.isatty() else "no terminal (lines instead of live bars)"
    good = "utf" in encoding
    meaning = "" if good else "bars and tables fall back to plain characters, completions may show as '?': set PYTHONUTF8=1"
    return [Finding("output", f"{kind}, {encoding}", "ok" if good else "warn", meaning)]


# -- small parts ------------------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """
    >>> _numbers("2.13.0+cpu"), _numbers("0.50.2")
    ((2, 13, 0), (0, 50, 2))
    """
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def _smi(query: str) -> list[list[str]]:
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=5, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:                                                 # not Linux
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
