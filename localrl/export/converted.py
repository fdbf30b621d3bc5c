"""A model file by llama.cpp's own converter: a merged checkpoint on the disk, the script over it, and then this package's keys in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

from localrl.export.check import sha256
from localrl.export.checkpoint import save_merged
from localrl.export.converter import Converter
from localrl.export.families import Value
from localrl.export.report import Row
from localrl.export.shards import scratch_folder
from localrl.export.tensors import Weights, as_floats
from localrl.export.writer import DType, add_keys

GELU_LOOSE = 50.0
"""By how much the strict limits are wider where llama.cpp takes GELU from a table in F16."""


def converted(converter: Converter, model: Any, tokenizer: Any, adapter: str | None, dtype: DType, file: Path) -> Mapping[str, str]:
    """`file` as the script writes it, without a vocabulary where it can be told. -> sha256 of every weight of the checkpoint by transformers' name.

    Half a file is left behind if this is interrupted: the caller removes it.
    """
    with scratch_folder(file) as folder:
        hashes = save_merged(model, tokenizer, adapter, folder)
        converter.convert(folder, file, dtype)
    return hashes


def with_keys(source: Path, target: Path, keys: Mapping[str, Value]) -> None:
    """`source` with `keys` in the place of its own of the same names; its vocabulary goes, tensors stay as they are."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    try:
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "tokenizer.")) and field.name != "general.architecture" and field.name not in keys:
                writer.add_key_value(field.name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        add_keys(writer, keys)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def parameters_of(file: Path) -> int:
    """Entries of all tensors."""
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in GGUFReader(file).tensors)


def read_back(file: Path, hashes: Mapping[str, str]) -> Weights:
    """What the file holds. Its names and its order of rows are the converter's: that they are right is told by the logits."""
    largest = (0.0, "")
    tensors = GGUFReader(file).tensors
    for tensor in tensors:
        rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
        for start in range(0, len(rows), 4096):
            high = float(np.abs(as_floats(rows[start : start + 4096], tensor.tensor_type)).max(initial=0.0))
            largest = max(largest, (high, tensor.name))
    finite = bool(np.isfinite(largest[0]))
    row = Row("weights", finite, f"{len(tensors)} tensors by the converter", "finite; that they are the model's is told by the logits")
    return Weights(row, {tensor.name: tensor.tensor_type.name for tensor in tensors}, hashes, largest)


def looseness_of(config: Any) -> float:
    """By how much the strict limits are wider for a model of this configuration."""
    acts = [str(getattr(config, name, "")) for name in ("hidden_act", "hidden_activation", "activation_function")]
    return GELU_LOOSE if any("gelu" in act for act in acts) else 1.0


def told(converter: Converter) -> str:
    """For the report."""
    return f"Converted by llama.cpp's own converter (`{converter.script.name}`, sha256 `{sha256(converter.script)}`), with this package's vocabulary."
