"""A set of rewards under construction, and the person's own reward code: files in the workspace's `rewards/`, written only when asked to."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from localrl.folder import write_whole
from localrl.rewards import RewardSettings
from localrl.rewards.sets import FOLDER, checked_name
from localrl.settings import UserError, explain

TEMPLATE = '''def mine(completions, **kwargs):
    """1 for an answer that holds a digit. `completions`: a list of texts, or of chats whose last message is the answer.

    A data column of the same name comes as a list too: add a parameter `answer`, say. One number a completion; None: does not apply.
    """
    scores = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        scores.append(1.0 if any(c.isdigit() for c in text) else 0.0)
    return scores
'''
"""Works as it is."""
LARGEST = 2**18
"""Characters of code that are saved."""


def checked(functions: Sequence[Mapping[str, Any]], **limits: Any) -> RewardSettings:
    """Rewards as a form or a file has them. UserError says in one sentence what is wrong."""
    known = {"": list(RewardSettings.model_fields), "functions": []}
    try:
        return RewardSettings.model_validate({"functions": list(functions), **limits})
    except ValidationError as error:
        raise UserError(explain(error, known)) from None


def save_set(base: Path, name: str, settings: RewardSettings) -> Path:
    """`rewards/<name>.toml`, whole or not at all; own files in the same folder by their names alone. UserError for a name that is none."""
    folder = _folder(base)
    functions = [_plain(spec.model_dump(mode="json", exclude_defaults=True), folder) for spec in settings.functions]
    limits = settings.model_dump(mode="json", exclude_defaults=True, exclude={"functions"})
    path = folder / f"{checked_name(name)}.toml"
    write_whole(path, tomli_w.dumps({"rewards": {**limits, "functions": functions}}))
    return path


def _plain(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    file, colon, rest = spec["function"].partition(":")
    near = file.endswith(".py") and Path(file).is_absolute() and Path(file).parent == folder
    return {**spec, "function": f"{Path(file).name}{colon}{rest}"} if near else spec


def save_code(base: Path, name: str, code: str) -> list[str]:
    """`rewards/<name>.py`; what it defines comes back as `<absolute path>:<function>`. Nothing is run. UserError if it is no Python, or defines nothing."""
    names = functions_in(code)
    if not names:
        raise UserError("the code defines no function that could be a reward: start with `def mine(completions, **kwargs):`")
    path = _folder(base) / f"{checked_name(name)}.py"
    write_whole(path, code)
    return [f"{path}:{function}" for function in names]


def functions_in(code: str) -> list[str]:
    """Public functions at the top of some Python, read and not run. UserError if it is none."""
    if len(code) > LARGEST:
        raise UserError(f"the code has {len(code)} characters, the limit is {LARGEST}")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"the code is no Python: {where}{getattr(error, 'msg', error)}") from None
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")]


def own_functions(base: Path) -> dict[str, str]:
    """What the workspace's `rewards/*.py` define: shown name -> path:function. A file that is no Python is left out."""
    found: dict[str, str] = {}
    for path in sorted((base / FOLDER).glob("*.py")):
        try:
            names = functions_in(path.read_text("utf-8"))
        except (UserError, OSError, UnicodeDecodeError):
            continue
        found |= {f"{path.stem}.py:{name}": f"{path.resolve()}:{name}" for name in names}
    return found


def _folder(base: Path) -> Path:
    """`rewards/` of the workspace. UserError if a link leads out of it."""
    folder = base.resolve() / FOLDER
    if folder.exists() and folder.resolve() != folder:
        raise UserError(f"{folder} leads to {folder.resolve()}: a set is only saved in the workspace itself")
    folder.mkdir(exist_ok=True)
    return folder
