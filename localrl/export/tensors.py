"""The weights within a file, read back from the disk and held against where they came from.

An F32, F16 or BF16 file must hold the live model's weights to the last bit; a quantised one must lie within its type's rounding of the file that it
was made from. What the live weights were is kept as a hash of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from numpy.typing import NDArray

from localrl.export.report import Row
from localrl.export.weights import Source

EXACT = frozenset({"F32", "F16", "BF16"})
"""Types that hold each number by itself, rounded."""
ROUNDING: Mapping[str, float] = {
    "Q8_0": 0.006, "Q6_K": 0.06, "Q5_K": 0.08, "Q5_0": 0.08, "Q5_1": 0.08, "Q4_K": 0.15, "Q4_0": 0.15, "Q4_1": 0.15, "IQ4_NL": 0.2, "IQ4_XS": 0.2,
    "Q3_K": 0.35, "Q2_K": 0.6, "IQ3_S": 0.6,
}  # fmt: skip
"""Most that an entry may move, as a share of the largest entry of its block of 256 (32 where the width has no 256)."""
ROUNDING_ELSE = 1.0
CHANGING = frozenset({"general.file_type", "general.quantization_version", "localrl.checks"})
"""Keys that tell of the file's own type, or of what its check found."""
BLOCK = 2**22
"""Entries that are looked at at a time."""


@dataclass(frozen=True)
class Weights:
    """What the file holds."""

    row: Row
    types: Mapping[str, str]
    """Tensor -> GGUF type."""
    source: Mapping[str, str]
    """Tensor -> sha256 of the live weight; empty for a file that was made from another file."""
    largest: tuple[float, str] = (0.0, "")
    """The largest magnitude of the live weights, and where it is."""


def against_model(file: Path, sources: Sequence[Source]) -> Weights:
    """An F32, F16 or BF16 file against the live weights, to the last bit."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    wrong, hashes = sorted(set(tensors) ^ {source.name for source in sources}), {}
    largest = (0.0, "")
    for source in sources:
        digest, tensor, row, same = hashlib.sha256(), tensors.get(source.name), 0, True
        for block in source.blocks():
            values: NDArray[np.float32] = np.ascontiguousarray(block.numpy())
            digest.update(values.tobytes())
            largest = max(largest, (float(np.abs(values).max(initial=0.0)), source.name))
            if tensor is not None:
                held = np.asarray(tensor.data)[row : row + len(values)]
                same = same and np.array_equal(as_floats(held, tensor.tensor_type), rounded(values, tensor.tensor_type.name))
            row += len(values)
        hashes[source.name] = digest.hexdigest()
        if not same:
            wrong.append(source.name)
    detail = f"first: {wrong[0]}" if wrong else ""
    row_of = Row("weights", not wrong, f"{len(tensors) - len(wrong)} of {len(tensors)} as in the trained model", "all, bit for bit", detail)
    return Weights(row_of, kinds(tensors), hashes, largest)


def against_parent(file: Path, parent: Path) -> Weights:
    """A quantised file against the one it was made from, entry by entry."""
    tensors, before = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (file, parent))
    wrong = sorted(set(tensors) ^ set(before))
    error = size = 0.0
    for name in sorted(tensors.keys() & before.keys()):
        with np.errstate(all="ignore"):  # a damaged scale is infinite: it is found, and need not be announced
            fits, squares, total = compare(tensors[name], before[name])
        error, size = error + squares, size + total
        if not fits:
            wrong.append(name)
    found = f"{len(tensors) - len(wrong)} of {len(tensors)} within their type's rounding"
    detail = f"first: {wrong[0]}" if wrong else f"relative error {np.sqrt(error / max(size, 1e-30)):.2%}"
    return Weights(Row("weights", not wrong, found, "all, entry by entry", detail), kinds(tensors), {})


def keys_row(file: Path, wanted: Mapping[str, Any]) -> Row:
    """Whether every key of the file is as it was meant, but for those that tell of its type: one wrong epsilon hides behind any quantisation."""
    fields = GGUFReader(file).fields
    wrong = [key for key, value in wanted.items() if key not in CHANGING and (key not in fields or not alike(fields[key].contents(), value))]
    count = len(wanted.keys() - CHANGING)
    return Row("keys", not wrong, f"{count - len(wrong)} of {count} as they were written", "all", f"first: {wrong[0]}" if wrong else "")


def keys_of(file: Path) -> dict[str, Any]:
    """Every key of a file."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items() if not key.startswith("GGUF.")}


def alike(found: Any, wanted: Any) -> bool:
    """Equal, where floats are held in 32 bits.

    >>> alike(1e-6, 1e-6), alike([0.10000000149011612], [0.1]), alike(1e-5, 1e-6)
    (True, True, False)
    """
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(alike, found, wanted))
    return bool(np.float32(found) == np.float32(wanted)) if isinstance(wanted, float) else bool(found == wanted)


def compare(tensor: Any, before: Any) -> tuple[bool, float, float]:
    """(every entry within the type's rounding, sum of squared errors, sum of squares)."""
    kind, origin = tensor.tensor_type.name, before.tensor_type.name
    if list(tensor.shape) != list(before.shape):
        return False, 0.0, 0.0
    width = int(tensor.shape[0])
    rows, fits, error, size = max(1, BLOCK // width), True, 0.0, 0.0
    held, wanted = (np.asarray(t.data).reshape(-1, t.data.shape[-1]) for t in (tensor, before))
    for start in range(0, len(wanted), rows):
        w = wanted[start : start + rows].astype(np.float32)
        h = as_floats(held[start : start + rows], tensor.tensor_type)
        error, size = error + float(np.square(h - w, dtype=np.float64).sum()), size + float(np.square(w, dtype=np.float64).sum())
        if kind in EXACT:
            fits = fits and np.array_equal(h, rounded(w, kind))
        else:
            assert origin in EXACT
            cells = (-1, 256 if width % 256 == 0 else 32)
            off, largest = np.abs(h - w).reshape(cells).max(-1), np.abs(w).reshape(cells).max(-1)
            fits = fits and bool((off <= ROUNDING.get(kind, ROUNDING_ELSE) * largest + 1e-12).all())
    return fits, error, size


def fallbacks(file: Path, dtype: str) -> dict[str, str]:
    """Matrices that are larger than their type asked, because their width is no multiple of its block: tensor -> what it is instead.

    (The K-quants' recipes give some matrices more bits than others. That is meant, and not counted.)
    """
    block = 256 if "_k" in dtype or dtype.endswith("_xs") else 32
    if dtype.upper() in EXACT:
        return {}
    found = [t for t in GGUFReader(file).tensors if len(t.shape) > 1 and int(t.shape[0]) % block and t.tensor_type.name != "F32"]
    return {t.name: t.tensor_type.name for t in found}


def as_floats(data: NDArray[Any], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Rows of a tensor of any type in float32."""
    floats: NDArray[np.float32] = data.astype(np.float32) if kind.name in ("F32", "F16") else quants.dequantize(data, kind)
    return floats


def rounded(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """float32 as one of EXACT holds it: rounded to the nearest, by torch (not by what wrote the file), and back.

    >>> rounded(np.array([1.00390625, 1.01171875], np.float32), "BF16")
    array([1.      , 1.015625], dtype=float32)
    """
    there = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    back: NDArray[np.float32] = torch.from_numpy(np.array(values, np.float32)).to(there).float().numpy()
    return back


def kinds(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> GGUF type."""
    return {name: tensor.tensor_type.name for name, tensor in tensors.items()}
