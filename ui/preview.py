"""The first rows of a data file, read from its head alone: a file may be larger than memory."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localrl.settings import UserError

from .html import notice, table
from .place import Place

ROWS, CELL, HEAD = 5, 240, 2**20
"""Rows that are shown, characters of a cell, bytes of a text file that are read."""
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SKIPPED = {"runs", "node_modules", "completions", "export"}
LARGEST = 64 * 2**20


def data_files(place: Place) -> list[str]:
    """Files of the workspace that could be data, by name."""
    return sorted(place.shown(path) for path in _files(place.root, 3) if path.suffix in KINDS)[:500]


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_file():
            yield path
        elif depth and path.is_dir() and path.name not in SKIPPED and not path.name.startswith("checkpoint-") and not (path / "run.toml").exists():
            yield from _files(path, depth - 1)


def preview(place: Place, name: str, column: str) -> str:
    """The head of a data file as a table. UserError with what is wrong with it."""
    path = place.inside(name)
    rows = head(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = table([f"{c} (the prompt)" if c == column else c for c in columns], [[cut(row.get(c)) for c in columns] for row in rows])
    if column not in columns:
        raise UserError(f"{name} has no column '{column}' for the prompts (columns: {', '.join(map(str, columns))}): set prompt column under Data")
    return shown + notice(f"The first {len(rows)} rows of {name}. Other columns than the prompt go to the rewards.")


def cut(value: Any) -> str:
    """A cell's text, no longer than a person reads."""
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return said if len(said) <= CELL else f"{said[:CELL]} ... ({len(said):,} characters)"


def head(path: Path) -> list[dict[str, Any]]:
    """Some rows from the beginning. UserError where there are none."""
    if not path.is_file():
        raise UserError(f"there is no data file {path.name}")
    if path.suffix not in KINDS:
        raise UserError(f"{path.name} is no data file: it must end in {', '.join(KINDS)}")
    if path.suffix == ".parquet":
        return _parquet(path)
    with path.open("rb") as file:
        raw = file.read(HEAD)
    whole = len(raw) < HEAD
    try:
        said = raw.decode("utf-8-sig", "strict" if whole else "ignore")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    rows = _json(path, said, whole) if path.suffix == ".json" else _lines(path, said, whole) if path.suffix == ".jsonl" else _csv(said, path.suffix)
    if not rows:
        raise UserError(f"{path.name} is empty: there is no prompt in it")
    return rows


def _lines(path: Path, said: str, whole: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    lines = said.splitlines()
    for number, line in enumerate(lines if whole else lines[:-1] or lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if not whole and len(lines) == 1:
                raise UserError(f"{path.name}: its first line is longer than {HEAD // 2**20} MiB, this is no data for a prompt") from None
            raise UserError(f"{path.name}, line {number} is no JSON ({error}): mend or remove it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path.name}, line {number} is {cut(row)[:60]}, where an object with a prompt is expected")
        found.append(row)
        if len(found) == ROWS:
            break
    return found


def _json(path: Path, said: str, whole: bool) -> list[dict[str, Any]]:
    if not whole:
        raise UserError(f"{path.name} is larger than {HEAD // 2**20} MiB: it can be trained on, but only the head of .jsonl, .csv and .parquet is shown here")
    try:
        rows = json.loads(said)
    except ValueError as error:
        raise UserError(f"{path.name} is no JSON ({error}): mend it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows[:ROWS]):
        raise UserError(f"{path.name} is no list of objects: one object with a prompt for each row is expected")
    return rows[:ROWS]


def _csv(said: str, suffix: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(said), delimiter="\t" if suffix == ".tsv" else ",")
    found: list[dict[str, Any]] = []
    try:
        for row in reader:
            found.append({str(key): value for key, value in row.items() if key is not None})
            if len(found) == ROWS:
                break
    except csv.Error as error:
        raise UserError(f"a row cannot be read ({error}): is it a CSV file?") from None
    return found


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError('Parquet files need pyarrow: pip install "localrl[data]"') from None
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS):
            rows: list[dict[str, Any]] = batch.to_pylist()
            return rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path.name} cannot be read as Parquet ({str(error).splitlines()[0][:120]})") from None
    raise UserError(f"{path.name} is empty: there is no prompt in it")


def take(place: Place, uploaded: str, name: str) -> str:
    """Keep an uploaded file as data/NAME of the workspace, beside what is there. -> its name. UserError for another kind of file."""
    clean = Path(name).name
    if Path(clean).suffix not in KINDS:
        raise UserError(f"{clean} is no data file: it must end in {', '.join(KINDS)}")
    if Path(uploaded).stat().st_size > LARGEST:
        raise UserError(f"{clean} is larger than {LARGEST // 2**20} MiB: copy it into {place.root} instead, and pick it above")
    folder = place.root / "data"
    folder.mkdir(exist_ok=True)
    target, number = folder / clean, 2
    while target.exists():
        target, number = folder / f"{Path(clean).stem}-{number}{Path(clean).suffix}", number + 1
    shutil.copyfile(uploaded, target)
    return place.shown(target)
