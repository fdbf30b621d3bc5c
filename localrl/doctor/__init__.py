"""What this machine has, what works, and what each of it means for training. A few seconds, nothing changed, nothing sent."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from localrl import allocator
from localrl.doctor import gpu, llama
from localrl.doctor.finding import Finding, first_line, short
from localrl.memory.cards import gib, machine_memory

SMALL_DISK, SMALL_MEMORY = 10 * 2**30, 6 * 2**30
OPTIONAL = {"math-verify": "the maths reward", "jsonschema": "the JSON schema reward", "pyarrow": "Parquet files", "datasets": "hub data sets"}


def diagnose(folder: Path | None = None) -> list[Finding]:
    """Look at everything. `folder`: where runs will go (None: here). Never raises: a check that fails is a finding itself."""
    place = folder or Path.cwd()
    checks: dict[str, Callable[[], list[Finding]]] = {
        "Python": _python,
        "libraries": _libraries,
        "GPU": gpu.cards,
        "other programs on the GPU": gpu.neighbours,
        "4-bit training": _four_bit,
        "CUDA allocator": gpu.segments,
        "pinned memory": gpu.pinned,
        "lessons on memory": gpu.taught,
        "llama.cpp": llama.findings,
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
            findings.append(Finding(name, "could not be found out", "warn", f"{type(error).__name__}: {first_line(error)}"))
    return findings


def show(findings: Sequence[Finding]) -> Table:
    """As a table; the colour and the word say how bad it is."""
    table = Table("", "what", title="localrl doctor", title_justify="left")
    for heading in ("found", "what it means"):
        table.add_column(heading, overflow="fold")                   # an ellipsis is no ASCII
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


# -- hardware ---------------------------------------------------------------------------------------------------------------------


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
        found.append(Finding(name, f"{gib(free)} free at {short(path)}", "warn" if little else "ok", meaning))
    if not os.access(next(p for p in (place.absolute(), *place.absolute().parents) if p.exists()), os.W_OK):
        found.append(Finding("run folder", f"{place} cannot be written to", "bad", "choose another: log.dir=/path/with/room"))
    return found


def _wsl() -> list[Finding]:
    if not allocator.under_wsl():
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


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:                                                 # not Linux
        return ""
