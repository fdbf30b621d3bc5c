"""A file is opened in a child process first: a bad one aborts whoever holds it, without a word."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SECONDS = 1800.0
SCRIPT = """
import ctypes, json, sys
import llama_cpp as lib
settings = lib.llama_model_default_params()
settings.n_gpu_layers = 0
model = lib.llama_model_load_from_file(sys.argv[1].encode(), settings)
if not model:
    sys.exit("error: it is refused")
wanted = lib.llama_context_default_params()
wanted.n_ctx, wanted.n_batch, wanted.n_ubatch, wanted.n_threads, wanted.n_threads_batch = 256, 32, 32, 1, 1
context = lib.llama_init_from_model(model, wanted)
if not context:
    sys.exit("error: no context")
token = (ctypes.c_int32 * 1)(0)
if lib.llama_decode(context, lib.llama_batch_get_one(token, 1)):
    sys.exit("error: it does not compute")
lib.llama_get_logits(context)[0]
print(json.dumps("well"))
"""
"""What the child does: load, read one token."""


def objection(path: Path) -> str | None:
    """Why llama.cpp does not load a file and compute with it; None: it does."""
    command = [sys.executable, "-P", "-c", SCRIPT, str(path)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    if child.returncode == 0 and child.stdout.strip().endswith(json.dumps("well")):
        return None
    said = [line.strip() for line in child.stderr.splitlines() if re.search("error|failed|assert", line, re.IGNORECASE)]
    return said[0][:200] if said else f"exit code {child.returncode}"
