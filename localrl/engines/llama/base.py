"""The base's file: the frozen weights as they are multiplied with, de-quantised, written once and kept in the cache folder.

Of the weights that learn, and not of the checkpoint they were quantised from: in NF4 those differ by several times what Q8_0 rounds. It holds no
vocabulary, tokens come and go as numbers. What is kept is named by a hash of every byte it was made from, so that it is never another model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localrl import __version__
from localrl.engines.llama.check import objection
from localrl.export.families import Value, family_of, hyperparameters
from localrl.export.quantize import quantize
from localrl.export.weights import causal_lm, check_model, model_sources, modules_of, shape_of, stored
from localrl.export.writer import FILE_TYPES, write
from localrl.memory.cards import gib
from localrl.memory.reality import store
from localrl.sections import Gguf
from localrl.settings import UserError

UNUSED_DAYS = 30
"""A kept file that nobody asked for as long as this is deleted when another one is written."""
Say = Callable[[str], None]


def folder() -> Path:
    """Where bases are kept: beside what runs teach about memory."""
    return store().parent / "rollout"


def base_file(model: nn.Module, adapter: str, kind: Gguf, say: Say) -> Path:
    """The base of a live model as a GGUF that llama.cpp has been seen to load: from the cache, or written now.

    UserError if the model or its adapter cannot be expressed, there is no room, or llama.cpp refuses what was written.
    """
    check_model(model, adapter)
    path = folder() / f"{fingerprint(model, kind)}-{kind}.gguf"
    if path.is_file():
        if (reason := objection(path)) is None:
            os.utime(path)
            return path
        say(f"{path} is damaged ({reason}): it is made again")
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_unused(path.parent)
    start, part = time.perf_counter(), path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(part, model, kind)
        if (reason := objection(part)) is not None:
            raise UserError(f"llama.cpp cannot load the base that was written for it ({reason}): take rollout.engine=torch")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    say(f"the base as {kind} for llama.cpp: {gib(path.stat().st_size)}, written in {time.perf_counter() - start:.1f} s and kept as {path}")
    return path


def _write(path: Path, model: nn.Module, kind: Gguf) -> None:
    if kind == "q4_k_m":                                             # llama.cpp's own, from half precision
        half = path.with_suffix(".half")
        try:
            _write(half, model, "f16")
            quantize(half, path, kind)
        finally:
            half.unlink(missing_ok=True)
        return
    keys = {**_keys(model), "general.file_type": FILE_TYPES[kind]}
    write(path, family_of(causal_lm(model).config).arch, keys, model_sources(model, None), kind, None)


def _keys(model: nn.Module) -> dict[str, Value]:
    """All that llama.cpp has to know beside the weights."""
    config, rows = causal_lm(model).config, shape_of(causal_lm(model).model.embed_tokens)[0]
    return {
        "general.type": "model", "general.name": "rollout", "general.quantization_version": 2, "tokenizer.ggml.model": "none",
        **hyperparameters(config, rows),
    }  # fmt: skip


def _forget_unused(place: Path) -> None:
    for file in place.glob("*.gguf"):
        if time.time() - file.stat().st_mtime > UNUSED_DAYS * 86400:
            file.unlink(missing_ok=True)


def fingerprint(model: nn.Module, kind: Gguf) -> str:
    """Of every byte that the file is made from: the base's weights as they are held, quantisation and all, and the configuration."""
    digest = hashlib.sha256(f"{__version__} {kind} {json.dumps(_keys(model), sort_keys=True)}".encode())
    for name, _, module in modules_of(model):
        for part in _parts(stored(module)):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def _parts(module: Any) -> Iterator[Tensor]:
    """Every tensor of a layer that its values depend on."""
    yield from module.parameters(recurse=False)
    if (state := getattr(module.weight, "quant_state", None)) is not None:
        packed = state.as_dict(packed=True)
        yield from (packed[name] for name in sorted(packed))
    scales = getattr(module.weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is not None:
        yield scales
