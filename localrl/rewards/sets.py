"""Sets of rewards in files of their own: `rewards/<name>.toml` with one table `[rewards]`, beside the Python that they call.

Within such a file `file.py:function` starts from the file's folder, so that a set can be used from anywhere.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from localrl.settings import UserError, nearest

FOLDER = "rewards"
"""Within the folder that one works in."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def sets(base: Path) -> dict[str, Path]:
    """The sets in a folder's `rewards/`, by name."""
    return {path.stem: path for path in sorted((base / FOLDER).glob("*.toml"))}


def set_path(given: str, base: Path) -> Path:
    """The file that a name or a path stands for. UserError, with the nearest name, if there is none."""
    known = sets(base)
    if given in known:
        return known[given]
    path = base / Path(given).expanduser()
    if path.is_file():
        return path
    if path.suffix == ".toml" or "/" in given:
        raise UserError(f"there is no file {path} with rewards")
    hint = nearest(given, known) if known else f"there is no {FOLDER}/*.toml in {base}"
    raise UserError(f"no set of rewards '{given}': {hint}")


def read_set(given: str, base: Path) -> dict[str, Any]:
    """`{"rewards": {...}}` of a set, its own Python files by absolute paths. Values are checked by whoever builds a run of them; UserError for no TOML."""
    path = set_path(given, base)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is no valid TOML: {error}") from None
    table = values.get("rewards")
    if set(values) != {"rewards"} or not isinstance(table, dict):
        others = ", ".join(key for key in values if key != "rewards")
        raise UserError(f"{path} must hold one table [rewards]" + (f" and nothing else, it has {others}: give that with --config" if others else ""))
    functions = table.get("functions", [])
    if isinstance(functions, list):
        table = {**table, "functions": [_anchored(spec, path.parent) for spec in functions]}
    return {"rewards": table}


def _anchored(spec: Any, folder: Path) -> Any:
    if isinstance(spec, str):
        return absolute(spec, folder)
    return {**spec, "function": absolute(spec["function"], folder)} if isinstance(spec, dict) and isinstance(spec.get("function"), str) else spec


def absolute(function: str, folder: Path) -> str:
    """`file.py:name` from a folder on as an absolute path; anything else as it is.

    >>> absolute("numeric_answer", Path("/x"))
    'numeric_answer'
    """
    file, colon, name = function.partition(":")
    return f"{(folder / file).resolve()}{colon}{name}" if file.endswith(".py") and (folder / file).is_file() else function


def checked_name(name: str) -> str:
    """A name that a file may have, and a module. UserError otherwise."""
    if not NAME.fullmatch(name) or len(name) > 64:
        raise UserError(f"'{name[:80]}' cannot be a file's name here: letters, digits and _ , a letter first, at most 64")
    return name
