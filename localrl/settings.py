"""The base of every settings class, and the one error that a person is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(Exception):
    """Something that the person at the keyboard can put right: one sentence with the value, the limit and the way out.

    The command line prints it and exits with code 2. Everything else that is raised is a bug of ours and keeps its traceback.
    """


class Settings(BaseModel):
    """Frozen, closed settings. The docstring under a field is its help text, on the command line and in the UI."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or lists them all.

    >>> nearest("temprature", ["temperature", "top_p"])
    "did you mean 'temperature'?"
    >>> nearest("zzz", ["a", "b"])
    'known: a, b'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def explain(error: ValidationError, known_at: dict[str, list[str]] | None = None) -> str:
    """One sentence out of pydantic's report: where, what stands there, what is allowed.

    `known_at` maps a dotted section ('' for the top) to its valid keys, for the hint at an unknown key.
    """
    sentences = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            section, key = ".".join(place[:-1]), place[-1]
            hint = nearest(key, (known_at or {}).get(section, [])) if (known_at or {}).get(section) else "remove it"
            sentences.append(f"unknown key '{'.'.join(place)}': {hint}")
        elif item["type"] == "missing":
            sentences.append(f"{'.'.join(place)} is missing")
        else:
            value = repr(item.get("input"))
            sentences.append(f"{'.'.join(place) or 'settings'} = {value[:80]}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(sentences)
