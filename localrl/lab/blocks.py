"""The built-in rewards as a form needs them: found by looking at the functions, so that a new one appears by itself."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localrl.rewards.builtin import BUILTINS
from localrl.rewards.worker import GIVEN
from localrl.settings import UserError

Kind = Literal["text", "whole", "number", "yes", "words", "json"]
EXAMPLES: Mapping[Kind, Any] = {"text": "", "whole": 1, "number": 1.0, "yes": False, "words": [], "json": {}}


@dataclass(frozen=True)
class Parameter:
    """One keyword of a reward function."""

    name: str
    kind: Kind
    default: Any
    """None where it has none or the default is none: `required` tells which."""
    required: bool

    def read(self, value: Any) -> Any:
        """What a form holds, as the function wants it. UserError if it cannot be that."""
        import json

        if value is None or (value == "" and (self.required or self.default is None)):
            return None
        try:
            match self.kind:
                case "whole":
                    if float(value) != int(float(value)):
                        raise ValueError
                    return int(float(value))
                case "number":
                    return float(value)
                case "yes":
                    return bool(value)
                case "words":
                    return [word.strip() for word in str(value).split(",") if word.strip()]
                case "json":
                    return json.loads(value)
                case _:
                    return str(value)
        except (TypeError, ValueError):
            wanted = {"whole": "a whole number", "number": "a number", "json": "JSON"}.get(self.kind, "text")
            raise UserError(f"{self.name} = {str(value)[:80]!r}: {wanted} is wanted") from None

    def shown(self, value: Any) -> Any:
        """What the function wants, as a form holds it."""
        import json

        if value is None:
            return None
        if self.kind == "words":
            return ", ".join(map(str, value))
        return json.dumps(value) if self.kind == "json" else value


@dataclass(frozen=True)
class Block:
    """One built-in reward."""

    name: str
    summary: str
    """The first line of what its docstring says."""
    help: str
    """All of it but the examples."""
    parameters: tuple[Parameter, ...]


def blocks() -> dict[str, Block]:
    """Every built-in, by name.

    >>> [p.name for p in blocks()["length_target"].parameters if p.required]
    ['target', 'limit']
    """
    return {name: _block(name, function) for name, function in BUILTINS.items()}


def _block(name: str, function: Any) -> Block:
    doc = inspect.getdoc(function) or name
    told = doc.split(">>>")[0].strip()
    hints = typing.get_type_hints(function)
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN]
    return Block(name, " ".join(told.split("\n\n")[0].split()), told, tuple(_parameter(p, hints.get(p.name, str)) for p in own))


def _parameter(found: inspect.Parameter, hint: Any) -> Parameter:
    required = found.default is found.empty
    default = None if required else list(found.default) if isinstance(found.default, tuple) else found.default
    return Parameter(found.name, _kind(hint), default, required)


def _kind(hint: Any) -> Kind:
    """
    >>> [_kind(h) for h in (int, bool, str | None, Sequence[str], dict[str, Any] | None)]
    ['whole', 'yes', 'text', 'words', 'json']
    """
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    simple: dict[Any, Kind] = {int: "whole", float: "number", bool: "yes", str: "text"}
    if hint in simple:
        return simple[hint]
    origin = typing.get_origin(hint)
    return "words" if isinstance(origin, type) and issubclass(origin, Sequence) and typing.get_args(hint) == (str,) else "json"
