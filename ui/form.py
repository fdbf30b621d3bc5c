"""The form for a run, made from `Run`'s schema: a new setting, or a new algorithm, is in it by itself."""

from __future__ import annotations

import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from localrl.algorithms import ALGORITHMS
from localrl.config import Run
from localrl.settings import UserError

Kind = Literal["choice", "switch", "slider", "number", "text", "toml"]
UNSET = "(unset)"
WIDE = 100.0
"""A number whose bounds lie further apart than this is typed, not slid; so is one that is usually less than so small a part of its range."""


@dataclass(frozen=True)
class Item:
    """One setting."""

    key: str
    """As on the command line: rollout.temperature."""
    help: str
    kind: Kind
    default: Any = field(hash=False)
    optional: bool = False
    """May it be left empty?"""
    choices: tuple[str, ...] = ()
    whole: bool = False
    low: float = -math.inf
    high: float = math.inf
    algorithm: str = ""
    """Whose own setting it is; empty: every run has it."""

    @property
    def section(self) -> str:
        """rollout; empty for what stands at the top."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """temperature."""
        return self.key.rpartition(".")[2]


def items() -> list[Item]:
    """Every setting of a run, in the schema's order; where the algorithm's own ones stand, those of every algorithm."""
    return [*_walk(Run, "")]


def _walk(kind: type[BaseModel], place: str) -> Iterator[Item]:
    for name, info in kind.model_fields.items():
        key, inner = f"{place}{name}", info.annotation
        if key == "algorithm":
            names = tuple(ALGORITHMS)
            yield Item("algorithm.name", "How the policy learns; each has a page in docs/algorithms.", "choice", names[0], choices=names)
            for chosen, algorithm in ALGORITHMS.items():
                yield from (_item(f"algorithm.{n}", f, chosen) for n, f in algorithm.model_fields.items() if n != "name")
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _walk(inner, f"{key}.")
        else:
            yield _item(key, info)


def _item(key: str, field: FieldInfo, algorithm: str = "") -> Item:
    parts = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else (field.annotation,)
    kinds, optional = [part for part in parts if part is not type(None)], type(None) in parts
    default = None if field.default is PydanticUndefined else field.default
    help_ = " ".join((field.description or "").split())
    one = kinds[0] if len(kinds) == 1 else None
    if get_origin(one) is Literal:
        return Item(key, help_, "choice", default, optional, tuple(map(str, get_args(one))), algorithm=algorithm)
    if one is bool:
        return Item(key, help_, "choice" if optional else "switch", default, optional, ("true", "false") if optional else (), algorithm=algorithm)
    if one in (int, float):
        low, high = _bounds(field)
        fits = not optional and high - low <= WIDE and (default is None or default >= (high - low) / WIDE or not default)
        kind: Kind = "slider" if fits else "number"
        return Item(key, help_, kind, default, optional, whole=one is int, low=low, high=high, algorithm=algorithm)
    return Item(key, help_, "text" if one is str else "toml", default, optional, algorithm=algorithm)


def _bounds(field: FieldInfo) -> tuple[float, float]:
    low, high = -math.inf, math.inf
    for rule in field.metadata:
        match rule:
            case Ge(ge=value) | Gt(gt=value):
                low = float(value)  # type: ignore[arg-type]
            case Le(le=value) | Lt(lt=value):
                high = float(value)  # type: ignore[arg-type]
    return low, high


# -- what is shown --------------------------------------------------------------------------------------------------------------


def component(item: Item, **more: Any) -> Any:
    """What a person sets it with. Labelled by its key, explained by its help."""
    about: dict[str, Any] = {"label": item.name.replace("_", " "), "info": item.help, "elem_id": f"set-{item.algorithm or 'run'}-{item.key.replace('.', '-')}"}
    value, about = shown(item, item.default), about | more
    if item.kind == "choice":
        return gr.Dropdown(choices=[*([UNSET] if item.optional else []), *item.choices], value=value, **about)
    if item.kind == "switch":
        return gr.Checkbox(value=value, **about)
    if item.kind == "slider":
        step = 1 if item.whole else 0.01 if item.high - item.low <= 5 else 0.1
        return gr.Slider(item.low, item.high, value=value, step=step, **about)
    lines = 4 if item.kind == "toml" and isinstance(item.default, tuple) else 1
    return gr.Textbox(value=value, lines=lines, max_lines=12 if lines > 1 else 1, placeholder="unset" if item.optional else "", **about)


def shown(item: Item, value: Any) -> Any:
    """A setting's value as its component has it."""
    if item.kind == "choice":
        return UNSET if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if item.kind in ("switch", "slider"):
        return value
    if value is None:
        return ""
    if item.kind == "text":
        return str(value)
    if item.kind == "toml" and isinstance(value, list | tuple):
        return "\n".join(map(toml, value))                           # one a line
    return toml(value)


def entered(item: Item, value: Any) -> Any:
    """The way back; None: unset. UserError for what is no value."""
    if item.kind == "choice":
        return None if value in (None, UNSET) else value == "true" if item.choices == ("true", "false") else value
    if item.kind in ("switch", "slider"):
        return int(value) if item.whole and value is not None and float(value).is_integer() else value
    text = str(value or "").strip()
    if not text:
        return None if item.optional else () if isinstance(item.default, tuple) else "" if item.kind == "text" else None
    if item.kind == "text":
        return str(value)
    if item.kind == "number":
        return _toml(item, text)
    lines = [line.strip().rstrip(",") for line in text.splitlines() if line.strip()]
    if isinstance(item.default, tuple) or len(lines) > 1 or not isinstance(item.default, tuple | str | dict):
        return [_toml(item, line) for line in lines] if isinstance(item.default, tuple) or len(lines) > 1 else _toml(item, lines[0])
    return _toml(item, lines[0])


def _toml(item: Item, text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        if all(c.isalnum() or c in "-_./:" for c in text) and item.kind == "toml":
            return text                                              # a bare word, as on the command line
        example = 'TOML, as in { function = "exact_answer", weight = 0.5 }, one a line'
        wanted = "a whole number" if item.whole else "a number" if item.kind == "number" else example
        raise UserError(f"{item.key} = {text[:80]!r}: it wants {wanted}") from None


def toml(value: Any) -> str:
    """A value on one line of TOML.

    >>> toml({"function": "regex", "weight": 0.5, "args": {"pattern": "a+"}})
    '{ function = "regex", weight = 0.5, args = { pattern = "a+" } }'
    >>> toml([1, True, "x"]), toml(1e-05)
    ('[1, true, "x"]', '1e-05')
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        parts = [f"{key if str(key).replace('_', '').replace('-', '').isalnum() else json.dumps(str(key))} = {toml(inner)}" for key, inner in value.items()]
        return "{ " + ", ".join(parts) + " }" if parts else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


# -- a run in the form, and out of it -------------------------------------------------------------------------------------------


def fill(run: Run, all_items: Sequence[Item]) -> list[Any]:
    """What the components show for a run; other algorithms' own settings stand at their defaults."""
    found = []
    for item in all_items:
        value: Any = run
        if item.algorithm and item.algorithm != run.algorithm.name:
            value = item.default
        else:
            for part in item.key.split("."):
                value = getattr(value, part)
        found.append(shown(item, value))
    return found


def collect(all_items: Sequence[Item], values: Sequence[Any]) -> dict[str, Any]:
    """Plain values for `localrl.config.build`, without what is unset. UserError names the setting that cannot be read."""
    algorithm = next(value for item, value in zip(all_items, values, strict=True) if item.key == "algorithm.name")
    found: dict[str, Any] = {}
    for item, value in zip(all_items, values, strict=True):
        if item.algorithm and item.algorithm != algorithm:
            continue
        got = entered(item, value)
        if got is not None:
            *sections, name = item.key.split(".")
            place = found
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = got
    return found
