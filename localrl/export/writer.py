"""GGUF files out of sources, tensor by tensor: the header is known before the first weight is read, so nothing waits in memory."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from numpy.typing import NDArray

from localrl.export.families import Value
from localrl.export.weights import Source
from localrl.settings import UserError

DType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q4_0", "iq4_xs"]
"""What matrices are written as. Norms, biases and rotary factors are always F32. From q6_k on only llama.cpp's quantiser writes them."""

Progress = Callable[[int, int, str], None]
"""(bytes done, bytes in all, name of the tensor just written)."""

TYPES: Mapping[DType, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES: Mapping[DType, int] = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q3_k_m": 12, "q4_0": 2, "iq4_xs": 30,
}  # fmt: skip
"""general.file_type, what most of the file is."""

F16_MAX = 65504.0
LARGEST: Mapping[GGMLQuantizationType, float] = {GGMLQuantizationType.F32: np.inf, GGMLQuantizationType.BF16: 3.3895e38}
"""Beyond which a value becomes infinite; of the others F16_MAX, for their blocks' scales are F16."""
PACKED = frozenset({GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0})
"""Types that numpy does not have: they are written as bytes."""


def type_of(source: Source, dtype: DType) -> GGMLQuantizationType:
    """What a tensor is written as: vectors F32; Q8_0 holds blocks of 32 columns, other widths stay F16."""
    if len(source.shape) == 1:
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and source.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return TYPES[dtype]


def stored_shape(source: Source, kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of the tensor as the array that is written: Q8_0 packs 32 columns in 34 bytes, BF16 one in two."""
    return quants.quant_shape_to_byte_shape(source.shape, kind) if kind in PACKED else source.shape


ARRAYS: Mapping[GGMLQuantizationType, type[Any]] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: np.uint8,
    GGMLQuantizationType.Q8_0: np.uint8,
}


def encode(source: Source, kind: GGMLQuantizationType) -> NDArray[Any]:
    """The whole tensor in its final type. UserError for values that are not finite, or beyond the type."""
    out = np.empty(stored_shape(source, kind), ARRAYS[kind])
    row = 0
    for block in source.blocks():
        values: NDArray[np.float32] = block.numpy()
        largest = float(np.abs(values).max(initial=0.0))
        if not np.isfinite(largest):
            raise UserError(f"the weight '{source.name}' holds NaN or infinity: the training diverged, export an earlier checkpoint")
        if largest > (limit := LARGEST.get(kind, F16_MAX)):
            raise UserError(f"the weight '{source.name}' reaches {largest:g}, beyond {kind.name}'s {limit:g}: export with dtype = 'f32'")
        packed = quants.quantize(values, kind) if kind in PACKED else values
        out[row : row + len(values)] = packed
        row += len(values)
    return out


def write(path: Path, arch: str, keys: Mapping[str, Value], sources: Sequence[Source], dtype: DType, progress: Progress | None) -> dict[str, int]:
    """One GGUF file. -> how many tensors of each type it holds. Half a file is left behind if this is interrupted: the caller removes it.

    UserError if the disk has no room for it.
    """
    kinds = [type_of(source, dtype) for source in sources]
    sizes = [size_of(source, kind) for source, kind in zip(sources, kinds, strict=True)]
    total, free = sum(sizes), shutil.disk_usage(path.parent).free
    if total > free:
        need, have = (f"{size / 2**30:.2f} GiB" for size in (total, free))
        raise UserError(f"the export needs {need} in {path.parent}, which has {have} left: free some, or take dtype = 'q8_0'")
    writer = GGUFWriter(path, arch)
    try:
        add_keys(writer, keys)
        for source, kind, size in zip(sources, kinds, sizes, strict=True):
            writer.add_tensor_info(source.name, stored_shape(source, kind), np.dtype(ARRAYS[kind]), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for source, kind, size in zip(sources, kinds, sizes, strict=True):
            writer.write_tensor_data(encode(source, kind))
            done += size
            if progress is not None:
                progress(done, total, source.name)
        writer.flush()
    finally:
        writer.close()
    return dict(Counter(kind.name for kind in kinds))


def size_of(source: Source, kind: GGMLQuantizationType) -> int:
    """Bytes of the tensor in the file."""
    return int(np.prod(stored_shape(source, kind), dtype=np.int64)) * np.dtype(ARRAYS[kind]).itemsize


def add_keys(writer: GGUFWriter, keys: Mapping[str, Value]) -> None:
    """Every key with the type that llama.cpp expects: whole numbers unsigned, but token types and signed ones."""
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, element_of(key, value))
        else:
            writer.add_key_value(key, value, scalar_of(value))


def scalar_of(value: int | float | bool | str) -> GGUFValueType:
    """The GGUF type of a scalar.

    >>> scalar_of(True).name, scalar_of(3).name, scalar_of(-3).name, scalar_of(0.5).name
    ('BOOL', 'UINT32', 'INT64', 'FLOAT32')
    """
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32 if 0 <= value < 2**32 else GGUFValueType.INT64
    return GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.STRING


def element_of(key: str, values: Iterable[Any]) -> GGUFValueType:
    """The GGUF type of an array's elements: by the first of them; token types are signed."""
    first = next(iter(values))
    return GGUFValueType.INT32 if isinstance(first, int) and key == "tokenizer.ggml.token_type" else scalar_of(first)
