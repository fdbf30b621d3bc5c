"""A finished file in parts, as llama.cpp splits it: `name-00001-of-0000N.gguf`, every key in the first, the tensors in their order over all.

llama.cpp is given the first part and finds the others by their names, so they stay in one folder and keep them. The parts are cut from a file that has
passed its check, tensor for tensor; then llama.cpp loads them, and each tensor is compared with the file's, byte for byte.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from localrl.export.report import Row
from localrl.export.writer import Progress
from localrl.settings import UserError

UNITS = {"B": 1, **{f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)}, **{f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}}
LEAST, MOST_PARTS = 2**16, 9999
HEADER, TENSOR = 1024, 160
"""Bytes of a later part's header, and of a tensor's entry in it, at most. (A tensor's name has up to 63.)"""
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})$")


def size_of(text: str) -> int:
    """Bytes from a text, G = 10^9 and Gi = 2^30 as on the hub.

    >>> size_of("2GiB"), size_of("500 MiB"), size_of("48GB")
    (2147483648, 524288000, 48000000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not found or found[2].lower() not in units:
        raise UserError(f"shard size '{text}' is no size: a number with B, kB, MB, GB, MiB or GiB, for example 2GiB")
    size = int(float(found[1]) * units[found[2].lower()])
    if size < LEAST:
        raise UserError(f"shard size '{text}' is too small: at least {LEAST // 1024}KiB, for example 2GiB")
    return size


def whole_name(name: str) -> str:
    """What a part's file is called without its number.

    >>> whole_name("m-q8_0-00001-of-00003.gguf"), whole_name("m-q8_0.gguf")
    ('m-q8_0.gguf', 'm-q8_0.gguf')
    """
    return NUMBERED.sub("", name.removesuffix(".gguf")) + ".gguf"


def parts_of(path: Path) -> list[Path]:
    """All files of a model, given its only or its first."""
    found = NUMBERED.search(path.stem)
    if not found:
        return [path]
    return [path.with_name(f"{path.stem[: found.start()]}-{i:05d}-of-{found[2]}.gguf") for i in range(1, int(found[2]) + 1)]


def plan(sizes: Sequence[int], header: int, limit: int) -> list[slice]:
    """Which tensors go in which part. `sizes`: bytes of each with its padding. One that is larger than the limit has a part to itself.

    >>> plan([40, 40, 40, 200, 10], 30, 2000), plan([900, 900, 900, 5000, 10], 30, 2200)
    ([slice(0, 5, None)], [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)])
    """
    starts, room = [0], limit - header
    for i, size in enumerate(sizes):
        cost = size + TENSOR if len(starts) > 1 else size
        if cost > room and i > starts[-1]:
            starts.append(i)
            room, cost = limit - HEADER, size + TENSOR
        room -= cost
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """`path`.parts, a folder beside it that is gone afterwards: llama.cpp knows parts by their names, so they have those from the start."""
    folder = path.with_name(path.name + ".parts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def split(file: Path, name: str, folder: Path, limit: int, progress: Progress | None) -> list[Path]:
    """The parts of `file`, at most `limit` bytes each, in `folder`. `name`: what the whole would be called. UserError if the disk has no room."""
    reader = GGUFReader(file)
    sizes = [-(-int(t.n_bytes) // reader.alignment) * reader.alignment for t in reader.tensors]
    parts, total = plan(sizes, int(reader.data_offset) + HEADER, limit), sum(sizes)
    if len(parts) > MOST_PARTS:
        raise UserError(f"shard size {limit} bytes makes {len(parts)} parts, at most {MOST_PARTS} can be numbered here: take a larger one")
    if (free := shutil.disk_usage(folder).free) < total:
        raise UserError(f"the parts need {total / 2**30:.2f} GiB beside the file, {free / 2**30:.2f} are free in {folder.parent}: free some, or do not split")
    paths = [folder / f"{name.removesuffix('.gguf')}-{i:05d}-of-{len(parts):05d}.gguf" for i in range(1, len(parts) + 1)]
    done = [0, *accumulate(sizes)]

    def tell(i: int) -> None:
        if progress is not None:
            progress(done[i + 1], total, "splitting")

    for number, (path, which) in enumerate(zip(paths, parts, strict=True)):
        write_part(reader, path, which, number, len(parts), tell)
    return paths


def write_part(reader: GGUFReader, path: Path, which: slice, number: int, count: int, tell: Callable[[int], None]) -> None:
    """One part, the first with every key of the file. `tell`: hears the number of each tensor that is written."""
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    try:
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                writer.add_key_value(field.name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        for key, value, kind in (
            ("split.no", number, GGUFValueType.UINT16), ("split.count", count, GGUFValueType.UINT16),
            ("split.tensors.count", len(reader.tensors), GGUFValueType.INT32),
        ):  # fmt: skip
            writer.add_key_value(key, value, kind)
        tensors = reader.tensors[which]
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, int(tensor.n_bytes), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, tensor in enumerate(tensors, which.start):
            writer.write_tensor_data(np.asarray(tensor.data))
            tell(i)
        writer.flush()
    finally:
        writer.close()


def parts_row(file: Path, parts: Sequence[Path], limit: int) -> Row:
    """Whether the parts hold every key and every byte of the file that they were cut from, once, in order, and are no larger than was asked."""
    whole, opened = GGUFReader(file), [GGUFReader(part) for part in parts]
    held, wanted = [t for reader in opened for t in reader.tensors], whole.tensors
    wrong = [] if [t.name for t in held] == [t.name for t in wanted] else ["the list of tensors"]
    for tensor, before in zip(held, wanted, strict=False):
        same = tensor.tensor_type == before.tensor_type and list(tensor.shape) == list(before.shape)
        if not same or not np.array_equal(np.asarray(tensor.data).view(np.uint8), np.asarray(before.data).view(np.uint8)):
            wrong.append(tensor.name)
    told = {key: field.contents() for key, field in opened[0].fields.items() if not key.startswith(("GGUF.", "split."))}
    if told != {key: field.contents() for key, field in whole.fields.items() if not key.startswith("GGUF.")}:
        wrong.append("the keys")
    large = [len(reader.tensors) for part, reader in zip(parts, opened, strict=True) if part.stat().st_size > limit]
    detail = f"first: {wrong[0]}" if wrong else f"{len(large)} larger than {limit} bytes, for one tensor is" if large else ""
    if any(count > 1 for count in large):
        wrong, detail = [*wrong, "size"], f"a part of several tensors is larger than {limit} bytes"
    return Row("parts", not wrong, f"{len(wanted)} tensors in {len(parts)} parts", "every byte of the whole file", detail)
