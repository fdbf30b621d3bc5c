"""Tables: files and hub data sets as rows, each a dictionary, and a sentence for whatever is wrong with them.

JSONL, JSON and CSV need nothing but Python; Parquet and the hub need the extra `localrl[data]`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.settings import UserError


@dataclass(frozen=True)
class Table:
    """Rows as they were read: dictionaries that may lack keys."""

    source: str
    rows: list[dict[str, Any]]
    lines: list[int] | None = None
    """The line of each row in the file, where a row is a line."""

    def place(self, row: int) -> str:
        """Where a person finds row `row`.

        >>> Table("a.jsonl", [{}, {}], [1, 3]).place(1), Table("a.csv", [{}, {}]).place(1)
        ('a.jsonl, line 3', 'a.csv, row 2')
        """
        return f"{self.source}, line {self.lines[row]}" if self.lines else f"{self.source}, row {row + 1}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in the order of their first appearance."""
        return tuple(dict.fromkeys(key for row in self.rows for key in row))


def read_table(path: str, subset: str | None, split: str, base_dir: Path) -> Table:
    """The rows of a file, or of a split of a hub data set. Raises UserError if there are none, or they cannot be read."""
    file = base_dir / Path(path).expanduser()
    if not file.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and file.suffix not in READERS:
        table = Table(path, _hub_rows(path, subset, split))
    elif not file.exists():
        raise UserError(f"there is no data file {file}")
    elif file.suffix not in READERS or not file.is_file():
        raise UserError(f"{file} is not a file that can be read: it must end in {', '.join(READERS)}")
    else:
        try:
            numbered = list(READERS[file.suffix](file))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
        table = Table(file.name, [row for _, row in numbered], [n for n, _ in numbered] if file.suffix in LINES else None)
    if not table.rows:
        raise UserError(f"{file if file.exists() else path} is empty: there is no prompt in it")
    for at, row in enumerate(table.rows):
        if not isinstance(row, dict):
            raise UserError(f"{table.place(at)}: {shown(row)} where an object {{\"prompt\": ...}} is expected")
    return table


Numbered = Iterator[tuple[int, Any]]


def _json_lines(file: Path) -> Numbered:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{file}, line {number} is not valid JSON: {error.msg} at column {error.colno}") from error


def _json(file: Path) -> Numbered:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; if every line is an object of its own, call the file .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{file}, line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(rows, list):
        raise UserError(f"{file} holds {shown(rows)} where a list of objects is expected")
    yield from enumerate(rows, 1)


def _csv(file: Path) -> Numbered:
    csv.field_size_limit(2**30)                               # the default refuses cells beyond 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            header = list(reader.fieldnames or ())
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{file} has two columns called '{twice[0]}': rename one")
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    cells = len(header) + len(row.get(None, ())) - sum(value is None for value in row.values())
                    raise UserError(f"{file}, line {reader.line_num} has {cells} cells, the header has {len(header)}: "
                                    "quote cells that hold a separator")
                yield number, row
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num} is not valid CSV: {error}") from error


def _parquet(file: Path) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{file.name}: reading Parquet needs pyarrow: pip install "localrl[data]"') from None
    try:
        yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} cannot be read as Parquet: {first_line(error)}") from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}
LINES = (".jsonl", ".ndjson")
"""Files in which a row is a line."""


def _hub_rows(name: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise UserError(f'there is no file {name}, and to read it as a data set from the hub, pip install "localrl[data]"') from None
    try:
        return list(datasets.load_dataset(name, subset, split=split))
    except (OSError, ValueError) as error:                    # not found, no network, no such configuration, no such split
        raise UserError(f"the data set {name} (subset {subset}, split {split}) cannot be read: {first_line(error)}") from error


def shown(value: Any) -> str:
    """A value for a message: its type and its beginning.

    >>> shown([1, "two"])
    'list [1, "two"]'
    """
    return f"{type(value).__name__} {json.dumps(value, default=repr)[:60]}"


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
