"""GGUF files from anywhere: what one says of itself, and whether llama.cpp can hold it.

A bad file aborts the interpreter that holds it, so llama.cpp first sees every file in a child process.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from localrl.settings import INSTALL_LLAMA_CPP, UserError, how_it_ended

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types as `struct` writes them; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)

PROBE = """
import ctypes, json, sys, llama_cpp
print(json.dumps({"stage": "library"}), flush=True)
model = llama_cpp.Llama(sys.argv[1], n_ctx=32, n_batch=32, n_threads=1, n_threads_batch=1)
hello = model.tokenize(b"Hello", add_bos=True, special=True)[:8] or [0]
model.eval(hello)
print(json.dumps({"stage": "model", "context": model._model.n_ctx_train()}), flush=True)
before = None
for path in sys.argv[2:]:
    adapter = llama_cpp.llama_adapter_lora_init(model.model, path.encode())
    if not adapter:
        sys.exit("failed to fit the adapter")
    if llama_cpp.llama_set_adapters_lora(model.ctx, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)):
        sys.exit("failed to apply the adapter")
    if before:
        llama_cpp.llama_adapter_lora_free(before)
    before = adapter
    model.reset()
    model.eval(hello)
    print(json.dumps({"stage": "adapter"}), flush=True)
"""
"""What the child does: load, tokenise, compute, with every adapter in turn. It tells how far it came."""

PROBE_SECONDS = 1800.0

Fact = int | float | bool | str


def require_llama() -> None:
    """UserError if llama-cpp-python is not installed. (Whether it works is seen in a child.)"""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(f"this needs llama-cpp-python, which is not installed: {INSTALL_LLAMA_CPP}")


def require_gguf(path: Path) -> None:
    """UserError unless this is a GGUF file by its first bytes: llama.cpp is not shown anything else."""
    if not path.is_file():
        raise UserError(f"no file {path}: export one with `localrl export`")
    if path.suffix == ".failed":
        raise UserError(f"{path} did not pass its self-check and may say anything: export again, the report lies beside it")
    with path.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise UserError(f"{path} is not a GGUF file: export one with `localrl export`")


def facts(path: Path) -> dict[str, Fact]:
    """What the header says, by key (`general.type`, `localrl.checkpoint`, ...); arrays such as the vocabulary are passed over.

    UserError if it is no GGUF file, or ends within its header.
    """
    require_gguf(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Header(data).facts()
        except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
            raise UserError(f"the header of {path} is damaged or cut short ({error}): export it, or fetch it, again") from None


class _Header:
    """Reads on from where it stands; little-endian, as all but a few old files are."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def facts(self) -> dict[str, Fact]:
        version, _, count = self._read("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, known: {', '.join(map(str, VERSIONS))}")
        found: dict[str, Fact] = {}
        for _ in range(int(count)):
            key, (kind,) = self._string(), self._read("I")
            if kind == ARRAY:
                self._pass_array()
            else:
                found[key] = self._string() if kind == STRING else self._read(SCALARS[int(kind)])[0]
        return found

    def _read(self, form: str) -> tuple[int | float | bool, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def _string(self) -> str:
        start = self._pass_string()
        return self.data[start : self.at].decode("utf-8")

    def _pass_string(self) -> int:
        """-> where its bytes begin."""
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        if start + length > len(self.data):
            raise ValueError("a text goes on beyond the end of the file")
        self.at = start + length
        return start

    def _pass_array(self) -> None:
        kind, length = (int(value) for value in self._read("IQ"))
        if kind == STRING:
            for _ in range(length):
                self._pass_string()
        elif kind == ARRAY:
            raise ValueError("an array of arrays")
        else:
            self.at += length * struct.calcsize("<" + SCALARS[kind])


def is_adapter(path: Path) -> bool:
    """A LoRA adapter, which needs a base model below it."""
    return facts(path).get("general.type") == "adapter"


def probe(path: Path, adapters: Sequence[Path] = ()) -> int:
    """Open the files in a child process, each adapter on the model in turn. -> tokens of context the model was trained for.

    UserError with llama.cpp's own reason if it cannot.
    """
    require_llama()
    for file in (path, *adapters):
        require_gguf(file)
    if is_adapter(path):
        raise UserError(f"{path} is an adapter, not a model: it goes on top of the base GGUF that was exported with it (--adapter)")
    for adapter in adapters:
        if not is_adapter(adapter):
            raise UserError(f"{adapter} is a whole model, not an adapter: name it alone")
    command = [sys.executable, "-P", "-c", PROBE, str(path), *map(str, adapters)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS, check=False)
    stages = [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{"stage"')]
    if child.returncode == 0:
        return int(stages[1]["context"])
    why = _reason(child)
    if not stages:
        raise UserError(f"llama-cpp-python does not work here ({why}): `localrl doctor` says more")
    if len(stages) == 1:
        raise UserError(f"llama.cpp cannot load {path} ({why}): export it again")
    raise UserError(f"llama.cpp cannot put {adapters[len(stages) - 2]} on {path} ({why}): an adapter needs the very base it was exported with")


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    """The first thing llama.cpp complained of, or how the process ended."""
    said = [line.strip() for line in child.stderr.splitlines() if re.search(r"error|fail|assert|corrupt|mismatch", line, re.IGNORECASE)]
    if said:
        return said[0][:200]
    return how_it_ended(child.returncode)
