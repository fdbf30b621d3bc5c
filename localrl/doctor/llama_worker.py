"""llama.cpp's side of the doctor's questions, in a process of its own: a library built for another processor takes its process down.

Prints a line of JSON after each stage: what the library is, then how fast it is. The model is made here and gone afterwards: 26 million
parameters in Q8_0, numbers without sense, for only the time counts.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 512, 1536, 8, 8, 1024
READ, WRITTEN = 256, 64
"""Tokens read at once, and then one by one."""
BLOCK = 32
"""Columns that share a scale in Q8_0: two bytes for the scale, one for each column."""


def library() -> dict[str, str | bool | list[str]]:
    """Where it lies, which version it is, what it was built for."""
    import llama_cpp
    from llama_cpp import _ggml

    devices = []
    ggml = _ggml.libggml
    if llama_cpp.llama_supports_gpu_offload() and hasattr(ggml, "ggml_backend_dev_description"):
        ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
        ggml.ggml_backend_dev_description.argtypes, ggml.ggml_backend_dev_description.restype = [ctypes.c_void_p], ctypes.c_char_p
        devices = [ggml.ggml_backend_dev_description(ggml.ggml_backend_dev_get(i)).decode() for i in range(ggml.ggml_backend_dev_count())]
    return {
        "path": str(llama_cpp.llama_cpp._lib._name), "version": llama_cpp.llama_version().decode(), "devices": devices,
        "info": llama_cpp.llama_print_system_info().decode(), "gpu": bool(llama_cpp.llama_supports_gpu_offload()),
    }  # fmt: skip


def speed(folder: Path, threads: int) -> dict[str, float | int]:
    """Tokens a second, read at once and written one by one."""
    import llama_cpp

    path = folder / "probe.gguf"
    parameters = write(path)
    model = llama_cpp.Llama(str(path), n_ctx=READ + WRITTEN, n_batch=READ, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1, verbose=False)
    model.eval([1] * 8)
    model.reset()
    start = time.perf_counter()
    model.eval([token % VOCABULARY for token in range(READ)])
    middle = time.perf_counter()
    for token in range(WRITTEN - 1):
        model.eval([token])
    end = time.perf_counter()
    model.close()
    return {"read": READ / (middle - start), "written": (WRITTEN - 1) / (end - middle), "parameters": parameters, "threads": threads}


def write(path: Path) -> int:
    """A Llama without a vocabulary. -> its parameters."""
    from gguf import GGMLQuantizationType, GGUFWriter

    draw = np.random.default_rng(0)
    matrices = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        matrices |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        matrices |= {f"blk.{layer}.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")} | {f"blk.{layer}.ffn_down": (WIDTH, INNER)}
    writer = GGUFWriter(path, "llama")
    for key, value in (("vocab_size", VOCABULARY), ("context_length", 4096), ("embedding_length", WIDTH), ("block_count", LAYERS),
                       ("feed_forward_length", INNER), ("attention.head_count", HEADS), ("attention.head_count_kv", HEADS)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "none")
    for name, (rows, columns) in matrices.items():
        writer.add_tensor(f"{name}.weight", packed(draw, rows, columns), raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ["output_norm", *(f"blk.{layer}.{kind}_norm" for layer in range(LAYERS) for kind in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(rows * columns for rows, columns in matrices.values())


def packed(draw: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """A matrix of noise as Q8_0 holds it, small enough that nothing overflows."""
    blocks = draw.integers(0, 256, (rows, columns // BLOCK, 2 + BLOCK), np.uint8)
    blocks[..., :2] = np.array([1e-3], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


if __name__ == "__main__":
    print(json.dumps(library()), flush=True)
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(speed(Path(place), int(sys.argv[1]))), flush=True)
