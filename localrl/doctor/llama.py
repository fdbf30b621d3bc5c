"""llama.cpp: whether it is there, what it was built for, how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from localrl.doctor.finding import Finding, short
from localrl.settings import how_it_ended

BUILD = 'CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install "llama-cpp-python>=0.3.36,<0.4"'
"""Without the image parts, which nothing here uses; it needs a C++ compiler: docs/llama.md."""
REBUILD = f"build it here: {BUILD} --force-reinstall --no-binary llama-cpp-python --no-deps --no-cache-dir"
WORKER = Path(__file__).with_name("llama_worker.py")
SECONDS = 60.0
VECTORS = ("AVX", "AVX2", "NEON", "SVE", "VSX", "RVV", "VXE", "WASM_SIMD", "RISCV_V")
"""What llama.cpp calls a processor's vector instructions; a build without any is many times slower."""
SHOWN_FLAGS = 12


def installed() -> str | None:
    """llama-cpp-python's version, if it is there."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def findings() -> list[Finding]:
    """Asked in a process of its own: a library built for another processor would take this one down."""
    here = installed()
    if here is None:
        return [Finding("llama.cpp", "not installed", "warn", f"training works; export, chat, compare and serve need it: {BUILD}")]
    from localrl.engines.llama_cpp import free_cores  # imports torch, which may be what is broken

    try:
        asked = subprocess.run(
            [sys.executable, "-P", str(WORKER), str(free_cores())], capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding("llama.cpp", f"{here}, no answer within {SECONDS:.0f} s", "bad", f"chat, compare and exports would hang; {REBUILD}")]
    said = [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("{")]
    reason = (asked.stderr.strip().splitlines() or [how_it_ended(asked.returncode)])[-1][:120]
    if not said:
        return [Finding("llama.cpp", f"{here}, does not load: {reason}", "bad", f"chat, compare and exports will not work; {REBUILD}")]
    told = said[0]
    kind = f"GPU build ({', '.join(told['devices'])})" if told["gpu"] else "CPU build"
    flags = features(told["info"])
    value = f"{here} (llama.cpp {told['version']}), {kind}: {', '.join(flags[:SHOWN_FLAGS])}"
    plain = not told["gpu"] and not set(flags) & {*VECTORS}
    slow = f"built without vector instructions, many times slower than it could be; {REBUILD}"
    found = [Finding("llama.cpp", value, "warn" if plain else "ok", slow if plain else f"library {short(Path(told['path']))}")]
    if asked.returncode or len(said) < 2:
        return [*found, Finding("llama.cpp's speed", f"it failed while computing: {reason}", "bad", f"chat, compare and exports will fail; {REBUILD}")]
    fast = said[1]
    value = f"{fast['read']:,.0f} tok/s read, {fast['written']:,.0f} tok/s written with {count(fast['threads'], 'thread')}"
    meaning = f"on {fast['parameters'] / 1e6:.0f} million parameters in Q8_0, which a processor's cache holds: larger models slow down by more than their size"
    return [*found, Finding("llama.cpp's speed", value, "ok", meaning)]


def features(info: str) -> list[str]:
    """
    >>> features("CPU : SSE3 = 1 | AVX2 = 1 | SVE = 0 | REPACK = 1 | ")
    ['SSE3', 'AVX2', 'REPACK']
    """
    return [part.split("=")[0].strip().split(":")[-1].strip() for part in info.split("|") if part.strip().endswith("= 1")]


def count(number: int, what: str) -> str:
    """
    >>> count(1, "thread"), count(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
